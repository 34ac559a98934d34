// Lessons 12 to 15: attention. Looking back, the Transformer, GPT-2, today's GPT.

import { get } from "./api.js";
import { CandidateList } from "./candidates.js";
import { el } from "./dom.js";
import { choice, range, toggle } from "./learn-controls.js";
import { dot, mix, normalVector, random, softmax, steps, sum } from "./learn-math.js";
import { bars, heat, Plot } from "./learn-plot.js";
import { integer, number } from "./format.js";

const SOURCE = ["I", "love", "cats"];
const STATES = [[-1, 0], [0, 1], [1, 0]]; // encoder states, in two dimensions so that they can be drawn

const attention = {
  chapter: 12, title: "Attention", page: "12-attention.md",
  idea: "All encoder states are still there. To write “J'aime”, the decoder asks with a query, each source word answers with a score, and the context is the average of the states, weighted by the softmax of the scores. The chapter's model computes its scores with a small network; here a score is query times key.",
  equations: ["e_i = q k_i", "α = softmax(e)", "c = ∑_i α_i h_i"],
  controls: [
    range("q", "Query q", [-10, 10, 0.5], 1),
    ...SOURCE.map((word, i) => range(word, `Key of “${word}”`, [-1, 1, 0.01], [0.31, 0.85, 0.24][i])),
  ],
  show(values, width) {
    const scores = SOURCE.map((word) => values.q * values[word]), weights = softmax(scores), context = mix(weights, STATES);
    const plot = new Plot(width, "The context among the three encoder states", { x: { range: [-1.7, 1.7] }, y: { range: [-0.15, 1.2] }, height: 230 });
    STATES.forEach((state, i) => plot.line([state, context], `var(--series-${i})`, { thickness: 0.5 + 8 * weights[i] }));
    STATES.forEach((state, i) => plot.dots([state], `var(--series-${i})`, { radius: 6 }).text(...state, SOURCE[i], { anchor: ["end", "middle", "start"][i], shift: [[-10, 4], [0, -10], [10, 4]][i] }));
    plot.dots([context], "var(--text)", { radius: 6, name: "context c; lines are as thick as the weights" });
    const rows = SOURCE.map((name, i) => ({ name, value: weights[i], text: `e ${scores[i].toFixed(2)}, α ${weights[i].toFixed(2)}`, color: `var(--series-${i})` }));
    return {
      picture: [bars(width, "Attention weights", rows), plot.element],
      facts: {
        "Scores e": scores.map((score) => score.toFixed(2)).join(", "), "Weights α": weights.map((weight) => weight.toFixed(2)).join(", "),
        "Sum of the weights": number(sum(weights)), "Context c": `(${context.map((value) => value.toFixed(2)).join(", ")})`,
      },
    };
  },
  question: "What does a query of 0 look at? And -10? Where can the context not go, whatever the weights?",
  answer: "At everything alike: ⅓ each. At -10 the order is reversed, and the smallest key takes most.\n\nNever outside the triangle of the states: an average adds nothing of its own. It is a mixture of what the words offer.",
};

const WIDTH = 8;
const VECTORS = Object.fromEntries(["I", "eat", "bread"].map((word, i) => [word, normalVector(WIDTH, random(20 + i))]));
const matrix = (seed) => {
  const uniform = random(seed);
  return Array.from({ length: WIDTH }, () => normalVector(WIDTH, uniform, WIDTH ** -0.5));
};
const [QUERY, KEY, VALUE] = [matrix(30), matrix(31), matrix(32)];
const project = (weights, x) => weights.map((row) => dot(row, x));
const position = (t) => Array.from({ length: WIDTH }, (_, i) => (i % 2 ? Math.cos : Math.sin)(t / 10000 ** ((i - (i % 2)) / WIDTH)));

// Self-attention of a sentence: the weights of each head, and the output of each word.
function selfAttention(words, { mask, positions, equal, heads }) {
  const x = words.map((word, t) => (positions ? VECTORS[word].map((value, i) => value + position(t)[i]) : VECTORS[word]));
  const [queries, keys, values] = [QUERY, KEY, VALUE].map((weights) => x.map((vector) => project(weights, vector)));
  const size = WIDTH / heads, part = (vector, head) => vector.slice(head * size, (head + 1) * size);
  const weights = steps(0, heads - 1, heads).map((_, head) => queries.map((query, t) => softmax(keys.map((key, s) =>
    (mask && s > t ? -Infinity : equal ? 0 : dot(part(query, head), part(key, head)) / Math.sqrt(size))))));
  const output = words.map((_, t) => weights.flatMap((rows, head) => mix(rows[t], values.map((value) => part(value, head)))));
  return { weights, output };
}

const ORDERS = { forward: ["I", "eat", "bread"], backward: ["bread", "eat", "I"] };

const transformer = {
  chapter: 13, title: "The Transformer", page: "13-transformer.md",
  idea: "Throw away the recurrence: every word attends to every word at once, with a query, a key and a value. A mask hides the words ahead, positions tell the words' order, and several heads look for different things. The weights here are random: nothing is trained, and all of this holds already.",
  equations: ['A = softmax({Q K^T}/{sqrt{d}} + "mask") V', "Q = X W_Q", "K = X W_K", "V = X W_V"],
  controls: [
    choice("order", "Sentence", { forward: "I eat bread", backward: "bread eat I" }, "forward"),
    toggle("mask", "Causal mask", false),
    toggle("positions", "Positions", false),
    toggle("equal", "Equal scores", false),
    choice("heads", "Heads", { 1: "1", 2: "2", 4: "4" }, "1"),
  ],
  show(values, width) {
    const options = { ...values, heads: Number(values.heads) }, words = ORDERS[values.order], { weights } = selfAttention(words, options);
    const [forward, backward] = Object.values(ORDERS).map((order) => selfAttention(order, options).output[1]);
    const change = Math.sqrt(sum(forward.map((value, i) => (value - backward[i]) ** 2)));
    const columns = weights.length > 1 && width >= 480 ? 2 : 1, size = Math.min(360, (width - (columns - 1) * 16) / columns);
    const maps = weights.map((rows, head) => el("figure", {}, el("figcaption", { class: "hint" }, weights.length > 1 ? `Head ${head + 1}` : "Rows attend to columns"),
      heat(size, `Attention of head ${head + 1}`, { rows: words, columns: words, values: rows })));
    const [eat, bread] = [words.indexOf("eat"), words.indexOf("bread")];
    return {
      picture: el("div", { class: "maps-of-heads" }, maps),
      facts: {
        "First row": weights[0][0].map((weight) => weight.toFixed(2)).join(", "), "Last row": weights[0].at(-1).map((weight) => weight.toFixed(2)).join(", "),
        "“eat” to “bread”, and back": `${weights[0][eat][bread].toFixed(2)}, ${weights[0][bread][eat].toFixed(2)}`,
        "What the order changes in “eat”": change < 1e-9 ? "nothing: 0.000" : change.toFixed(3),
      },
    };
  },
  question: "Without mask and positions, does “eat” notice which of the other two comes first? Which of the two switches tells it? And what are the rows behind the mask if all scores are equal?",
  answer: "No: an average does not know the order of what it averages, and the change is exactly 0. Each switch tells it: positions because they are added to the words, the mask because “eat” then sees only what comes before it.\n\n`1`, `½ ½`, `⅓ ⅓ ⅓`, and exact zeros ahead.",
};

const VOCABULARY = 50_257, HEAD_WIDTH = 128;
const SIZES = { small: { name: "GPT-2 small", width: 768, depth: 12 }, large: { name: "GPT-2 XL", width: 1600, depth: 48 }, gpt3: { name: "GPT-3", width: 12_288, depth: 96 } };

// Weights by kind; biases, norms and positions are not counted.
const countWeights = (width, depth) => ({
  embedding: VOCABULARY * width,
  attention: 4 * width * width * depth, // query, key, value and output
  "feed-forward": 2 * width * 4 * width * depth, // up and down
  unembedding: VOCABULARY * width,
});

const gpt2 = {
  chapter: 14, title: "GPT-2", page: "14-gpt2.md",
  idea: "Keep only the decoder. Every token has a vector, the residual stream, and each block adds to it: what attention found, then what a small network made of it. Behind the mask one pass predicts the next token after every prefix. The rest is size, and depth is possible because of the stream: a block that adds `s x` multiplies a gradient by `1 + s`, not by `s`.",
  equations: ["x ← x + attention(norm(x))", "x ← x + mlp(norm(x))", '"weights" = 2 V D + 12 D^2 L', '"gradient" = (1 + s)^L'],
  controls: [
    choice("model", "Size", { ...Object.fromEntries(Object.entries(SIZES).map(([key, { name }]) => [key, name])), own: "Your own" }, "gpt3"),
    range("width", "Width D", [64, 12_288, 64], 12_288, integer),
    range("depth", "Blocks L", [1, 96, 1], 96),
    range("slope", "Slope s of what a block adds", [0.01, 0.5, 0.01], 0.02),
  ],
  onChange(values, name) {
    if (name === "model" && values.model in SIZES) ({ width: values.width, depth: values.depth } = SIZES[values.model]);
    if (name === "width" || name === "depth") values.model = "own";
  },
  show({ width: size, depth, slope }, width) {
    const counts = countWeights(size, depth), total = sum(Object.values(counts)), heads = size / HEAD_WIDTH;
    const rows = Object.entries(counts).map(([name, count], i) => ({ name, value: count / total, text: `${(100 * count / total).toFixed(1)}%`, color: `var(--series-${i})` }));
    return {
      picture: bars(width, "Share of the weights", rows),
      facts: {
        "Weights": integer(total),
        ...Object.fromEntries(Object.entries(counts).map(([name, count]) => [`… ${name}`, integer(count)])),
        "Matrices": Number.isInteger(heads) ? `${integer(2 + depth * (3 * heads + 3))}, with heads of ${HEAD_WIDTH}` : `no whole number of heads of ${HEAD_WIDTH}`,
        "Memory at 2 bytes per weight": `${number(2 * total / 1e9)} GB`,
        "Gradient through all blocks": `${number((1 + slope) ** depth)}, and ${number(slope ** depth)} without the stream`,
      },
    };
  },
  question: "Double the width, and then double the depth instead: which costs more? And which part of GPT-2 small is larger than in GPT-3, as a share?",
  answer: "The width: blocks grow with its square, so four times the weights, and twice for the depth.\n\nThe two embeddings: nearly half of GPT-2 small (which stores one matrix for both, and so has 124 million weights), and 0.7% of GPT-3. In both, the feed-forward layers hold twice as much as attention.",
};

const PAIRS = 4, BASE = 10_000; // a head of width 8
const frequency = (pair) => BASE ** (-pair / PAIRS);
const MAX_DISTANCE = 63;

// The score of a query and a key whose components are all 1, each pair rotated by its position's angle.
function rotaryScore(m, n) {
  const rotated = (t) => steps(0, PAIRS - 1, PAIRS).flatMap((i) => {
    const [cos, sin] = [Math.cos(t * frequency(i)), Math.sin(t * frequency(i))];
    return [cos - sin, sin + cos];
  });
  return dot(rotated(m), rotated(n)) / Math.sqrt(2 * PAIRS);
}

const gpt = {
  chapter: 15, title: "Today's GPT", page: "15-gpt.md",
  idea: "The same two lines, with better parts. One of them: queries and keys are rotated, pair by pair, by an angle that grows with their position. Their product then depends on the distance of the two words only, not on where they stand. Here `q` and `k` are eight ones, that is four pairs.",
  equations: ["q_m · k_n = ∑_i 2 cos((m - n) θ_i)", "θ_i = 10000^{- 2 i ∕ d}"],
  controls: [
    range("m", "Position of the query", [0, MAX_DISTANCE, 1], 10),
    range("n", "Position of the key", [0, MAX_DISTANCE, 1], 3),
    range("shift", "Text before both", [0, 1000, 1], 0, (value) => `${value} tokens`),
  ],
  show({ m, n, shift }, width) {
    const score = rotaryScore(m + shift, n + shift);
    const plot = new Plot(width, "Score by distance", { x: { label: "distance m - n", range: [-MAX_DISTANCE, MAX_DISTANCE] }, y: { label: "score", range: [-1, 3] } });
    plot.curve((distance) => rotaryScore(distance, 0), [-MAX_DISTANCE, MAX_DISTANCE], "var(--series-0)", { name: "score by distance" });
    plot.dots([[m - n, score]], "var(--series-1)", { radius: 6, name: "this query and key" });
    const turns = steps(0, PAIRS - 1, PAIRS).map((i) => {
      const angle = (m - n) * frequency(i);
      return { name: `pair ${i + 1}`, value: Math.cos(angle), text: `cos ${number(angle)} = ${Math.cos(angle).toFixed(3)}`, color: `var(--series-${i})` };
    });
    return {
      picture: [plot.element, bars(width, "Cosine of the angle between query and key, by pair", turns, [-1, 1])],
      facts: {
        "Positions": `${m + shift} and ${n + shift}`, "Distance m - n": number(m - n), "Score q·k / √d": score.toFixed(4),
      },
    };
  },
  question: "Put 500 tokens before both words: how does the score change? At which distance is it largest? And which pair can still tell 10 tokens from 1,000?",
  answer: "Not at all: only the distance counts, so what was learned at the start of a text holds everywhere.\n\nAt 0. The fourth pair turns by a thousandth of a radian per token, so it tells far from near; the first turns by a whole one, and tells neighbors apart.",
  extra: nextToken,
};

// The next-token distribution of a served run, under temperature and top-k.
function nextToken() {
  const values = { temperature: 1, top_k: 0 }, panel = el("div"), prompt = el("input", { type: "text", value: "The", spellcheck: "false", dir: "auto" });
  const hint = el("p", { class: "hint", role: "status" }, "Asking the server for its models …"), list = new CandidateList(panel);
  let model = null;
  const update = () => {
    for (const control of controls) control.refresh();
    const { temperature, top_k } = values;
    if (model) list.show({ model: model.id, prompt: prompt.value, temperature, ...(top_k ? { top_k } : {}) });
  };
  const controls = [
    range("temperature", "Temperature", [0, 3, 0.05], 1, (value) => (value === 0 ? "0 (greedy)" : value.toFixed(2))),
    range("top_k", "Top-k", [0, 20, 1], 0, (value) => value || "off"),
  ].map((control) => control.build(values, update));
  panel.hidden = true;
  prompt.addEventListener("input", update);
  async function findModel() {
    for (;;) {
      const { data } = await get("v1/models");
      model = data.find(({ translates }) => !translates) ?? data[0];
      if (model) break;
      await new Promise((resolve) => setTimeout(resolve, 1000)); // the server is still loading its models
    }
    hint.textContent = `Answered by the run “${model.id}” of this server.`;
    panel.hidden = false;
    update();
  }
  findModel().catch((error) => { hint.textContent = error.message; });
  return el("div", { class: "lab panel", id: "learn-next" },
    el("form", { class: "controls", "aria-label": "Prompt and sampling parameters", onsubmit: (event) => event.preventDefault() },
      el("label", {}, "Ask a model of your own", prompt), controls.map(({ element }) => element), hint),
    panel);
}

export const ATTENTION = [attention, transformer, gpt2, gpt];
