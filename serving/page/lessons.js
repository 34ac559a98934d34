// The lessons in order. A lesson is an object:
//   chapter, title, page, idea, question, answer: text
//   equations: in the notation of learn-equation.js
//   controls: what can be moved; their values are what the functions below are called with
//   setUp(values), onChange(values, name): set further values at the start, and after a control has changed
//   show(values, width): the numbers (`facts`: texts by name) and their drawing (`picture`)
//   extra(): a further element, if any

import { LINES } from "./lessons-1-4.js";
import { LAYERS } from "./lessons-5-7.js";
import { MEMORY } from "./lessons-8-11.js";
import { ATTENTION } from "./lessons-12-15.js";

export const LESSONS = [...LINES, ...LAYERS, ...MEMORY, ...ATTENTION];
