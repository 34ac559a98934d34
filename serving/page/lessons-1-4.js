// Lessons 1 to 4: one equation. A line, products, a probability, many classes.

import { action, choice, range } from "./learn-controls.js";
import { mean, sigmoid, softmax, steps, sum } from "./learn-math.js";
import { bars, Plot } from "./learn-plot.js";
import { number } from "./format.js";

const CUPS = steps(1, 5, 9);
const rice = (ratio) => CUPS.map((x) => [x, ratio * x]);

// Data of lesson 1: points [x, y], the first weights, and the axes.
const DATA = {
  throw: { points: [[10, 50]], w: 4, b: 5, x: { label: "distance (meters)", range: [0, 12] }, y: { label: "power", range: [0, 80] } },
  white: { points: rice(2), w: 0.5, b: 4, x: { label: "cups of rice", range: [0, 6] }, y: { label: "cups of water", range: [0, 18] } },
  rices: { points: [...rice(2), ...rice(3)], w: 0.5, b: 4, x: { label: "cups of rice", range: [0, 6] }, y: { label: "cups of water", range: [0, 18] } },
};

function gradient({ w, b, data }) {
  const errors = DATA[data].points.map(([x, y]) => ({ x, error: w * x + b - y }));
  return {
    loss: mean(errors.map(({ error }) => error ** 2)),
    dw: 2 * mean(errors.map(({ x, error }) => error * x)),
    db: 2 * mean(errors.map(({ error }) => error)),
  };
}

function descend(values, count) {
  for (let i = 0; i < count; i++) {
    const { dw, db } = gradient(values);
    values.w -= values.rate * dw;
    values.b -= values.rate * db;
  }
}

const line = {
  chapter: 1, title: "A line", page: "01-line.md",
  idea: "How hard must you throw a ball from ten meters? Guess a line, measure how wrong it is, and move its two weights a little against the error. Every model below learns in this way.",
  equations: ["ŷ = w x + b", "L = mean (ŷ - y)^2", "{∂ L}/{∂ w} = mean 2 (ŷ - y) x"],
  controls: [
    choice("data", "Data", { throw: "One throw", white: "White rice", rices: "White and brown rice" }, "throw"),
    range("w", "Weight w", [-2, 10, 0.1], 4),
    range("b", "Bias b", [-10, 20, 0.1], 5),
    choice("rate", "Learning rate", { 0.001: "0.001", 0.01: "0.01", 0.02: "0.02" }, "0.001"),
    action("One step", (values) => descend(values, 1)),
    action("Ten steps", (values) => descend(values, 10)),
  ],
  onChange(values, name) {
    if (name === "data") ({ w: values.w, b: values.b } = DATA[values.data]);
  },
  show(values, width) {
    const { w, b, data } = values, { points, x, y } = DATA[data], { loss, dw, db } = gradient(values), f = (x) => w * x + b;
    const plot = new Plot(width, `The line and the data: ${x.label} against ${y.label}`, { x, y });
    for (const [px, py] of points) plot.line([[px, py], [px, f(px)]], "var(--series-1)", { thickness: 1.5 });
    plot.curve(f, x.range, "var(--series-0)", { name: "the line" }).dots(points, "var(--series-1)", { name: "the data, and each error" });
    return {
      picture: plot.element,
      facts: {
        ...(data === "throw" ? { "Prediction ŷ": `${number(f(10))} (it needs 50)` } : {}),
        "Weights": `w = ${number(w)}, b = ${number(b)}`,
        "Loss L": number(loss), "∂L/∂w": number(dw), "∂L/∂b": number(db),
      },
    };
  },
  question: "With w = 4, b = 5 and a rate of 0.001, one step moves the throw from 45 to 46.01. Where do one step at 0.01 and one at 0.02 take it? And which line fits both rices best?",
  answer: "To 55.1, as far above 50 as it was below; and to 65.2, three times as far away. Each further step at 0.02 triples the error: training diverges.\n\nThe best line for both rices is midway, `2.5 x`, and wrong for both.",
};

const RATIOS = { 0: ["white rice", 2], 0.25: ["rice with a little bran", 2.5], 0.5: ["brown rice", 3], 1: ["franken-grain", 1] };

const products = {
  chapter: 2, title: "Products", page: "02-products.md",
  idea: "White rice (darkness `z` = 0) needs 2 cups of water per cup, brown rice (`z` = ½) 3. A plane can only add water for darkness. A product lets the darkness change the slope.",
  equations: ['y_{"product"} = 2 x z + 2 x', 'y_{"plane"} = 2.5 x + 6 z - 1.5'],
  controls: [
    range("z", "Darkness z", [0, 1, 0.05], 0),
    range("x", "Cups x", [0, 10, 0.5], 10),
  ],
  show({ x, z }, width) {
    const product = (x) => 2 * x * z + 2 * x, plane = (x) => 2.5 * x + 6 * z - 1.5, [name, ratio] = RATIOS[z] ?? [];
    const plot = new Plot(width, "Water that the product and the plane give for cups of grain of this darkness", {
      x: { label: "cups of grain", range: [0, 10.5] }, y: { label: "cups of water", range: [0, 42] },
    });
    plot.curve(product, [0, 10], "var(--series-0)", { name: "the product" }).curve(plane, [0, 10], "var(--series-1)", { name: "the plane" });
    if (name) plot.dots(CUPS.map((x) => [x, ratio * x]), "var(--series-2)", { name: `what ${name} needs` });
    plot.dots([[x, product(x)]], "var(--series-0)", { radius: 6 }).dots([[x, plane(x)]], "var(--series-1)", { radius: 6 });
    return {
      picture: plot.element,
      facts: {
        "Product": `${number(product(x))} cups of water`, "Plane": `${number(plane(x))} cups of water`,
        "Truth": name ? `${number(ratio * x)} cups, ${name}` : "nobody has cooked this grain",
        "Slope of the product": `${number(2 * z + 2)} cups per cup`,
      },
    };
  },
  question: "At which darkness do the plane and the product agree for any number of cups? And what does the product give for the darkest grain, z = 1, which needs one cup per cup?",
  answer: "At `z` = ¼, midway between the two rices the plane was fitted to: there both are `2.5 x`. On either side the plane has the wrong slope.\n\nFour cups per cup: mush. The law is smooth, and cannot switch.",
};

const probability = {
  chapter: 3, title: "A probability", page: "03-probability.md",
  idea: "A line gives a score, and the sigmoid squashes it into a probability: a soft switch. The bias is a threshold: with `w` = 1 and `b` = -10 the answer is yes above 10.",
  equations: ["p = σ(w x + b)", "σ(z) = {1}/{1 + e^{-z}}", 'L_{"yes"} = - ln p', 'L_{"no"} = - ln (1 - p)'],
  controls: [
    range("x", "Input x", [0, 20, 0.5], 12),
    range("w", "Weight w", [-3, 3, 0.1], 1),
    range("b", "Bias b", [-30, 10, 0.5], -10),
  ],
  show({ x, w, b }, width) {
    const p = sigmoid(w * x + b), threshold = -b / w;
    const plot = new Plot(width, "Probability against the input", { x: { label: "input x", range: [0, 20] }, y: { label: "probability p", range: [0, 1] } });
    plot.line([[threshold, 0], [threshold, 1]], "var(--muted)", { dashed: true, thickness: 1, name: "threshold: p = ½" });
    plot.curve((x) => sigmoid(w * x + b), [0, 20], "var(--series-0)", { name: "σ(w x + b)" }).dots([[x, p]], "var(--series-1)", { radius: 6, name: "your input" });
    return {
      picture: plot.element,
      facts: {
        "Score w x + b": number(w * x + b), "Probability p": p.toFixed(3), "Answer": p >= 0.5 ? "yes (p ≥ ½)" : "no (p < ½)",
        "Threshold -b/w": w === 0 ? "none" : number(threshold), "Slope p (1 - p)": (p * (1 - p)).toFixed(3),
        "Loss if yes is true": (Math.log1p(Math.exp(-(w * x + b)))).toFixed(3), "Loss if no is true": (Math.log1p(Math.exp(w * x + b))).toFixed(3),
      },
    };
  },
  question: "Double both: w = 2 and b = -20. What happens to the threshold, and to the probability at 12? And how large can the slope p (1 - p) become?",
  answer: "The threshold stays at 10, as only `b/w` counts. The switch is twice as steep: the score at 12 is 4 and not 2, so `p` is 0.982 and not 0.881.\n\nAt most ¼, where `p` = ½. Remember it: chapters 5 and 8 multiply many such slopes.",
};

const WORDS = ["mat", "hat", "dog"];

const classes = {
  chapter: 4, title: "Many classes", page: "04-classes.md",
  idea: "“The cat sat on the …”: each possible answer gets a score, and the softmax turns scores into probabilities that add up to 1. The temperature `T` decides how much a difference in score counts.",
  equations: ["p_k = {e^{z_k ∕ T}}/{∑_j e^{z_j ∕ T}}", 'L = - ln p_{"true"}'],
  controls: [
    ...WORDS.map((word, i) => range(word, `Score of “${word}”`, [-10, 10, 0.5], 3 - i)),
    range("T", "Temperature T", [0.05, 5, 0.05], 1),
  ],
  show(values, width) {
    const p = softmax(WORDS.map((word) => values[word]), values.T);
    const entropy = -sum(p.map((share) => (share > 0 ? share * Math.log2(share) : 0)));
    return {
      picture: bars(width, "Probabilities", WORDS.map((name, i) => ({ name, value: p[i], text: p[i].toFixed(3), color: `var(--series-${i})` }))),
      facts: {
        "Probabilities": p.map((share) => share.toFixed(3)).join(", "), "Their sum": number(sum(p)), "Entropy": `${entropy.toFixed(3)} bits`,
        ...Object.fromEntries(WORDS.map((word, i) => [`Loss if “${word}” is true`, `${number(-Math.log(p[i]))} nats`])),
      },
    };
  },
  question: "Add 5 to all three scores: what changes? Then set the temperature to 0.25, and to 5: which of the two makes a model say surprising things?",
  answer: "Nothing changes: only differences count. That is why the largest score can be moved to 0 first, and nothing overflows.\n\nAt 0.25 “mat” takes 98.2%: towards 0 the best takes all. At 5 they are nearly equal (0.402, 0.329, 0.269): unlikely words are drawn often.",
};

export const LINES = [line, products, probability, classes];
