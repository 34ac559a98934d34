// Lessons 5 to 7: many equations. Layers, experts, word vectors.

import { action, choice, range } from "./learn-controls.js";
import { dot, mean, random, sigmoid, softmax, steps, sum } from "./learn-math.js";
import { bars, Plot } from "./learn-plot.js";
import { number } from "./format.js";

const CURVES = {
  square: ["x² + 1", (x) => x ** 2 + 1],
  cubic: ["x³ - 2x² + 1", (x) => x ** 3 - 2 * x ** 2 + 1],
  sine: ["sin 2x", (x) => Math.sin(2 * x)],
};
const [LEFT, RIGHT] = [-1.5, 2.5]; // the range of the data

// The kinks and bends with which `count` ReLUs follow a curve from point to point.
function follow(f, count) {
  const kinks = steps(LEFT, RIGHT, count + 1), slopes = kinks.slice(1).map((x, i) => (f(x) - f(kinks[i])) / (x - kinks[i]));
  return { start: f(LEFT), units: slopes.map((slope, i) => ({ kink: kinks[i], bend: slope - (i ? slopes[i - 1] : 0) })) };
}

const network = ({ start, units }) => (x) => start + sum(units.map(({ kink, bend }) => bend * Math.max(0, x - kink)));

const layers = {
  chapter: 5, title: "Layers", page: "05-layers.md",
  idea: "Feed regressions into a regression, with a nonlinearity between. Each ReLU is 0 up to its kink and a line after it, so each unit bends the sum once. Place them by hand, or let them follow the curve.",
  equations: ["y = c + ∑_i v_i ReLU(x - k_i)", "ReLU(z) = max(0, z)"],
  controls: [
    choice("curve", "Curve", { square: "x² + 1", cubic: "x³ - 2x² + 1", sine: "sin 2x" }, "square"),
    range("count", "ReLUs", [1, 10, 1], 3),
    range("unit", "Unit to move", [1, 10, 1], 1),
    range("kink", "Its kink k", [-1.5, 2.5, 0.1], 0),
    range("bend", "Its bend v", [-10, 10, 0.25], 0),
    range("start", "Start c", [-6, 6, 0.25], 0),
    action("Follow the curve", (values) => {
      Object.assign(values, follow(CURVES[values.curve][1], values.count));
      layers.select(values);
    }),
  ],
  setUp(values) {
    Object.assign(values, { start: 3.25, units: [{ kink: -1.5, bend: -1.5 }, { kink: 0, bend: 1 }, { kink: 1, bend: 1 }] });
    layers.select(values);
  },
  select(values) {
    values.unit = Math.min(values.unit, values.count);
    Object.assign(values, values.units[values.unit - 1]);
  },
  onChange(values, name) {
    const { units, count } = values;
    if (name === "kink" || name === "bend") units[values.unit - 1] = { kink: values.kink, bend: values.bend };
    if (name === "count") {
      const free = steps(LEFT, RIGHT, count + 1); // where a new unit starts, without a bend
      values.units = Array.from({ length: count }, (_, i) => units[i] ?? { kink: free[i], bend: 0 });
    }
    layers.select(values);
  },
  show(values, width) {
    const [name, curve] = CURVES[values.curve], f = network(values), { units, unit } = values;
    const error = mean(steps(LEFT, RIGHT, 60).map((x) => (f(x) - curve(x)) ** 2));
    const plot = new Plot(width, `A sum of ${units.length} ReLUs beside ${name}`, { x: { label: "x", range: [-2.5, 4] }, y: { label: "y", range: [-8, 12] } });
    plot.curve(curve, [-2.5, 4], "var(--series-2)", { dashed: true, name });
    plot.line([[LEFT, -8], [LEFT, 12]], "var(--muted)", { thickness: 1, name: "range of the data" }).line([[RIGHT, -8], [RIGHT, 12]], "var(--muted)", { thickness: 1 });
    plot.curve(f, [-2.5, 4], "var(--series-0)", { name: "the network" });
    plot.dots(units.filter((_, i) => i !== unit - 1).map(({ kink }) => [kink, f(kink)]), "var(--series-0)");
    plot.dots([[units[unit - 1].kink, f(units[unit - 1].kink)]], "var(--series-1)", { radius: 6, name: `unit ${unit}` });
    return {
      picture: plot.element,
      facts: {
        "Mean squared error": number(error), "Slope after the last kink": number(sum(units.map(({ bend }) => bend))),
        "y at x = 4": `${number(f(4))} (the curve: ${number(curve(4))})`, "Weights": `${3 * units.length + 1}: 3 per unit, and c`,
      },
    };
  },
  question: "Let 3 ReLUs follow x² + 1, then 6. By what factor does the error fall? And what does the network do to the right of the data?",
  answer: "By 16: with twice the pieces each is half as long and deviates a quarter as much, and the error is a square.\n\nIt continues straight from its last kink, whatever the curve does: a network knows nothing beyond its data.",
};

const GRAINS = [["white rice: 2x", 0, 2], ["brown rice: 3x", 0.5, 3], ["franken-grain: x", 1, 1]];

// Scores that are lines in z, each the largest around its grain's darkness.
const gates = (z, sharpness) => softmax(GRAINS.map(([, darkness]) => sharpness * (2 * darkness * z - darkness ** 2)));

const experts = {
  chapter: 6, title: "Experts", page: "06-experts.md",
  idea: "Separate two questions: what holds, and when. Three experts know a grain each; the gate, a softmax of the darkness, says how much each of them counts. This is attention, with experts in the place of words.",
  equations: ["y = ∑_i g_i(z) f_i(x)", "g(z) = softmax(p z + q)", "f(x) = (2 x, 3 x, x)"],
  controls: [
    range("z", "Darkness z", [0, 1, 0.01], 0),
    range("x", "Cups x", [0, 10, 0.5], 4),
    range("sharpness", "Sharpness of the gate", [0, 80, 1], 40),
  ],
  show({ z, x, sharpness }, width) {
    const g = gates(z, sharpness), y = sum(g.map((gate, i) => gate * GRAINS[i][2] * x)), slope = sum(g.map((gate, i) => gate * GRAINS[i][2]));
    const plot = new Plot(width, "The three gates against the darkness", { x: { label: "darkness z", range: [-0.03, 1.03] }, y: { label: "gate", range: [-0.04, 1.05] }, height: 230 });
    GRAINS.forEach(([name], i) => plot.curve((z) => gates(z, sharpness)[i], [0, 1], `var(--series-${i})`, { name }));
    plot.line([[z, 0], [z, 1.05]], "var(--muted)", { dashed: true, thickness: 1 });
    GRAINS.forEach((_, i) => plot.dots([[z, g[i]]], `var(--series-${i})`, { radius: 5 }));
    const water = GRAINS.map(([name, , ratio], i) => ({
      name: name.split(":")[0], value: g[i] * ratio * x, text: `${g[i].toFixed(2)} · ${number(ratio * x)} = ${(g[i] * ratio * x).toFixed(2)}`, color: `var(--series-${i})`,
    }));
    return {
      picture: [plot.element, bars(width, "Gate times expert", water, [0, 30])],
      facts: { "Water y": `${number(y)} cups`, "Gates": g.map((gate) => gate.toFixed(3)).join(", "), "The mix as one line": `${number(slope)} x` },
    };
  },
  question: "What does the mix give midway between white and brown rice, at z = 0.25? And what is left of the experts when the gate's sharpness is 0?",
  answer: "Half of each: `2.5 x`. A mix of lines is a line, so it holds at ten cups as at one.\n\nTheir average, `2 x` for every grain: a gate that cannot tell the grains apart weighs all alike.",
};

const TEMPLATES = [
  ["the * eats and sleeps", ["cat", "dog", "horse", "cow"]],
  ["a * dress and a * hat", ["red", "blue", "green", "white"]],
  ["we saw * ships and * men", ["two", "three", "four", "five"]],
  ["he went from * to * by train", ["paris", "rome", "london", "berlin"]],
];
const NOUNS = TEMPLATES.flatMap(([, words]) => words);
const WIDTH = 16, WINDOW = 2, NEGATIVES = 5, RATE = 0.05, SENTENCES_AT_ONCE = 100;

// Skip-gram with negative sampling, trained here: `snapshot(n)` returns the vectors after n sentences.
function skipGram() {
  const uniform = random(1), draw = (list) => list[Math.floor(uniform() * list.length)];
  const vocabulary = [...new Set(TEMPLATES.flatMap(([text, words]) => [...text.split(" "), ...words]))].filter((word) => word !== "*");
  const vectors = Object.fromEntries(vocabulary.map((word) => [word, Array.from({ length: WIDTH }, () => uniform() - 0.5)]));
  const contexts = Object.fromEntries(vocabulary.map((word) => [word, Array(WIDTH).fill(0)]));
  const snapshots = [structuredClone(vectors)];

  function readSentence() {
    const [template, fillers] = draw(TEMPLATES), rest = [...fillers];
    return template.split(" ").map((word) => (word === "*" ? rest.splice(Math.floor(uniform() * rest.length), 1)[0] : word));
  }

  // One logistic regression: does the word occur near the other (label 1), or was it drawn at random (0)?
  function learn(center, context, label, gradient) {
    const v = vectors[center], u = contexts[context], error = sigmoid(dot(v, u)) - label;
    for (let i = 0; i < WIDTH; i++) {
      gradient[i] += error * u[i];
      u[i] -= RATE * error * v[i];
    }
  }

  function train() {
    const sentence = readSentence();
    sentence.forEach((center, position) => {
      for (let other = Math.max(0, position - WINDOW); other <= Math.min(sentence.length - 1, position + WINDOW); other++) {
        if (other === position) continue;
        const gradient = Array(WIDTH).fill(0);
        learn(center, sentence[other], 1, gradient);
        for (let n = 0; n < NEGATIVES; n++) learn(center, draw(vocabulary), 0, gradient);
        gradient.forEach((value, i) => { vectors[center][i] -= RATE * value; });
      }
    });
  }

  return (count) => {
    while (snapshots.length <= count / SENTENCES_AT_ONCE) {
      for (let i = 0; i < SENTENCES_AT_ONCE; i++) train();
      snapshots.push(structuredClone(vectors));
    }
    return snapshots[Math.floor(count / SENTENCES_AT_ONCE)];
  };
}

const cosine = (a, b) => dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b));
let snapshot = null;

const wordVectors = {
  chapter: 7, title: "Word vectors", page: "07-word-vectors.md",
  idea: "A word is known by its company. Your browser reads sentences such as “the cat eats and sleeps” and “he went from paris to rome by train”, and learns with one logistic regression which words occur near which. Nobody tells it what an animal is.",
  equations: ["L = - ln σ(v · u) - ∑_n ln σ(- v · u_n)", 'cosine(a, b) = {a · b}/{|a| |b|}'],
  controls: [
    range("sentences", "Sentences read", [0, 3000, SENTENCES_AT_ONCE], 1000),
    choice("word", "Word", Object.fromEntries(NOUNS.map((word) => [word, word])), "cat"),
  ],
  show({ sentences, word }, width) {
    snapshot ??= skipGram();
    const vectors = snapshot(sentences);
    const near = NOUNS.filter((other) => other !== word).map((name) => ({ name, value: cosine(vectors[word], vectors[name]) })).sort((a, b) => b.value - a.value);
    const group = (name) => TEMPLATES.findIndex(([, words]) => words.includes(name));
    const shown = near.map(({ name, value }) => ({ name, value, text: value.toFixed(2), color: `var(--series-${group(name)})` }));
    const own = near.filter(({ name }) => group(name) === group(word)), others = near.filter(({ name }) => group(name) !== group(word));
    return {
      picture: bars(width, `Cosine of “${word}” and each word`, shown, [-1, 1]),
      facts: {
        "Nearest words": near.slice(0, 3).map(({ name }) => name).join(", "),
        "Mean cosine in its group": mean(own.map(({ value }) => value)).toFixed(2), "Mean cosine with the others": mean(others.map(({ value }) => value)).toFixed(2),
      },
    };
  },
  question: "“cat” and “dog” never occur in the same sentence. Will their vectors be similar? And what are the cosines before the first sentence?",
  answer: "Yes: they have the same neighbors, “the” before and “eats and” after, so the same predictions suit both.\n\nBefore the first sentence the vectors are random, and the cosines say nothing.",
};

export const LAYERS = [layers, experts, wordVectors];
