// How to choose a token: the sliders that Play and Compare share.

import { el } from "./dom.js";

const KNOBS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, value: 0.8, shown: (value) => (value === 0 ? "0, the likeliest" : value.toFixed(2)) },
  { name: "top_k", label: "Top-k", min: 0, max: 100, step: 1, value: 0, shown: (value) => value || "all" },
  { name: "top_p", label: "Top-p", min: 0.05, max: 1, step: 0.05, value: 1, shown: (value) => (value === 1 ? "all" : value.toFixed(2)) },
];

export class Knobs {
  constructor(element, onChange = () => {}) {
    this.inputs = {};
    element.parentElement.open = matchMedia("(min-width: 50rem)").matches; // on a phone the prompt comes first
    for (const knob of KNOBS) {
      const output = el("output", {}, String(knob.shown(knob.value)));
      const input = el("input", { type: "range", min: knob.min, max: knob.max, step: knob.step, value: knob.value, name: knob.name });
      input.addEventListener("input", () => {
        output.textContent = String(knob.shown(Number(input.value)));
        onChange();
      });
      this.inputs[knob.name] = input;
      element.append(el("label", { class: "knob" }, knob.label, output, input));
    }
    this.length = el("input", { type: "number", min: 1, max: 65536, value: 200, name: "max_tokens", inputmode: "numeric" });
    this.seed = el("input", { type: "number", min: 0, max: 2 ** 31, name: "seed", placeholder: "a new one each time", inputmode: "numeric" });
    element.append(el("label", {}, "Length, in tokens", this.length), el("label", {}, "Seed", this.seed));
    element.closest("form").addEventListener("submit", (event) => event.preventDefault());
  }

  // What decides which tokens are likely to be drawn.
  get sampling() {
    const found = Object.fromEntries(Object.entries(this.inputs).map(([name, input]) => [name, Number(input.value)]));
    if (!found.top_k) delete found.top_k;
    if (found.top_p === 1) delete found.top_p;
    return found;
  }

  // Everything about a text but its prompt; without a seed, one is drawn, so that it can be told.
  get request() {
    const seed = this.seed.value === "" ? Math.floor(Math.random() * 1e6) : Number(this.seed.value);
    return { ...this.sampling, max_tokens: Math.max(1, Number(this.length.value) || 200), seed };
  }
}

// The choice of a model, with a line about it. Gives what tells the one that is chosen.
export function choice(form, models, onChange) {
  const select = form.elements.model, about = form.querySelector("[data-about]");
  const chosen = () => models.find((model) => model.id === select.value);
  const tell = () => { about.textContent = describe(chosen()); };
  select.replaceChildren(...models.map((model) => el("option", { value: model.id }, model.id)));
  select.addEventListener("change", () => {
    tell();
    onChange();
  });
  tell();
  return chosen;
}

export function describe(model) {
  if (!model) return "";
  const facts = [`${model.rung}, ${model.year}`, `${model.parameters.toLocaleString("en")} parameters`];
  if (model.bits_per_byte) facts.push(`${model.bits_per_byte.toFixed(3)} bits per byte`);
  if (model.dtype !== "float32") facts.push(model.dtype);
  if (model.translates) facts.push("translates");
  return facts.join(" · ");
}

// Ctrl-Enter and Escape, wherever one is in a view.
export function keys(section, go, stop) {
  section.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      go();
    } else if (event.key === "Escape" && stop) stop();
  });
}
