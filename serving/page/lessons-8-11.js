// Lessons 8 to 11: memory. The RNN, the LSTM, the GRU, encoder and decoder.

import { el } from "./dom.js";
import { choice, range, toggle } from "./learn-controls.js";
import { dot, mean, normalVector, random, steps, unit } from "./learn-math.js";
import { bars, Plot } from "./learn-plot.js";
import { number } from "./format.js";

const rnn = {
  chapter: 8, title: "The RNN", page: "08-rnn.md",
  idea: "Feed the state back in, and it remembers. But a gradient on its way back is multiplied at every step by the weight `u` and by the slope of tanh, `1 - h²`. A power decides what is left of it.",
  equations: ["h_t = tanh(w x_t + u h_{t-1} + b)", "{∂ h_t}/{∂ h_{t-1}} = u (1 - h_t^2)"],
  controls: [
    range("u", "Recurrent weight u", [0.1, 2.5, 0.05], 0.2),
    range("h", "State h", [0, 0.95, 0.05], 0),
    range("steps", "Steps back", [1, 100, 1], 5),
  ],
  show({ u, h, steps: count }, width) {
    const factor = u * (1 - h ** 2), left = factor ** count;
    const low = Math.max(1e-30, Math.min(1e-3, left / 10)), high = Math.min(1e30, Math.max(1e3, left * 10));
    const plot = new Plot(width, "The gradient that is left after each step back", {
      x: { label: "steps back", range: [0, Math.max(10, count)] }, y: { label: "gradient left", range: [low, high], log: true },
    });
    plot.line([[0, 1], [count, 1]], "var(--muted)", { dashed: true, thickness: 1, name: "undiminished" });
    plot.curve((t) => factor ** t, [0, count], "var(--series-0)", { name: "what is left" }).dots([[count, left]], "var(--series-1)", { radius: 6 });
    return {
      picture: plot.element,
      facts: { "Factor per step": number(factor), "Gradient left": number(left), "So the gradient": factor < 1 ? "vanishes" : factor > 1 ? "explodes" : "stays" },
    };
  },
  question: "Five steps of 0.2 leave 0.00032. What do a hundred steps of 0.5 leave, and of 2? Is there a weight that is safe?",
  answer: "8e-31 and 1e+30: nothing to learn from, or a step that ruins every weight.\n\nOnly 1, and only while `h` is 0: any other state makes the slope of tanh smaller than 1. The next chapter builds that 1 in.",
};

const caption = (text) => el("p", { class: "hint" }, text);

// A sentence whose last word turns on the one before it. Gates and candidates are set by hand.
const SENTENCE = ["the", "film", "was", "not", "good"];
const KEEP = { f: 1, i: 0, g: 0, o: 1 };
const GATES = [KEEP, KEEP, KEEP, { f: 1, i: 1, g: -0.9, o: 1 }, { f: 1, i: 0, g: 0.9, o: 1 }];

const lstm = {
  chapter: 9, title: "The LSTM", page: "09-lstm.md",
  idea: "A second memory, `C`, is changed by addition, and gates between 0 and 1 decide what is kept (`f`), written (`i`) and shown (`o`). In a trained LSTM regressions set the gates; here you do, word by word.",
  equations: ["C_t = f C_{t-1} + i g", "h_t = o tanh(C_t)", "f, i, o = σ(…), g = tanh(…)"],
  controls: [
    choice("word", "Word", Object.fromEntries(SENTENCE.map((word, t) => [t, word])), "4"),
    range("f", "Forget gate f (1 keeps)", [0, 1, 0.05], 1),
    range("i", "Input gate i", [0, 1, 0.05], 0),
    range("g", "Candidate g", [-1, 1, 0.05], 0),
    range("o", "Output gate o", [0, 1, 0.05], 1),
  ],
  setUp(values) {
    values.gates = GATES.map((gates) => ({ ...gates }));
    Object.assign(values, values.gates[values.word]);
  },
  onChange(values, name) {
    if (name in KEEP) values.gates[values.word][name] = values[name];
    Object.assign(values, values.gates[values.word]);
  },
  show({ gates, word }, width) {
    const states = [];
    for (const { f, i, g, o } of gates) {
      const C = f * (states.at(-1)?.C ?? 0) + i * g;
      states.push({ C, h: o * Math.tanh(C) });
    }
    const rows = (key, color) => SENTENCE.map((name, t) => ({ name: `${Number(word) === t ? "▸ " : ""}${name}`, value: states[t][key], text: states[t][key].toFixed(2), color }));
    const { C, h } = states[word], { f, i, g } = gates[word], before = states[word - 1]?.C ?? 0;
    return {
      picture: [
        caption("Cell state C after each word"), bars(width, "Cell state C", rows("C", "var(--series-0)"), [-2, 2]),
        caption("Hidden state h, which the next layer sees"), bars(width, "Hidden state h", rows("h", "var(--series-1)"), [-2, 2]),
      ],
      facts: {
        "C at the word": `${number(f)} · ${number(before)} + ${number(i)} · ${number(g)} = ${number(C)}`, "h at the word": number(h),
        "C at the end": number(states.at(-1).C), "h at the end": number(states.at(-1).h),
        "First C left at the end": number(gates.slice(1).reduce((left, gate) => left * gate.f, 1)),
      },
    };
  },
  question: "“not” has written -0.9, and the input gate at “good” is shut, so the verdict stays negative. What is C at the end if you open that gate? And if you also shut the forget gate there?",
  answer: "0: the two cancel, and the cell no longer knows. With `f` = 0 as well it is 0.9: “not” is forgotten, and the film is good.\n\nNote that `f` + `i` need not be 1: with both gates open, C can grow beyond 1.",
};

const gru = {
  chapter: 10, title: "The GRU", page: "10-gru.md",
  idea: "One memory and two gates. `z` carries the old state on or takes the candidate: the two weights add up to 1, a weighted average. `r` decides how much of the past the candidate may see.",
  equations: ["n = tanh(w x + r u h)", "h_{new} = z h + (1 - z) n"],
  controls: [
    range("h", "Old state h", [-1, 1, 0.05], 0.8),
    range("input", "Input w x", [-2, 2, 0.1], -1),
    range("r", "Reset gate r", [0, 1, 0.05], 1),
    range("z", "Update gate z (1 keeps)", [0, 1, 0.05], 0.5),
  ],
  show({ h, input, r, z }, width) {
    const n = Math.tanh(input + r * h), next = z * h + (1 - z) * n;
    const plot = new Plot(width, "Old state, candidate, and the new state between them", {
      x: { label: "value of the state", range: [-1.1, 1.1] }, y: { range: [0, 1] }, height: 110,
    });
    plot.line([[h, 0.5], [n, 0.5]], "var(--muted)", { thickness: 1.5 });
    plot.dots([[h, 0.5]], "var(--series-0)", { radius: 8, name: "old h" }).dots([[n, 0.5]], "var(--series-1)", { radius: 8, name: "candidate n" });
    plot.dots([[next, 0.5]], "var(--series-2)", { radius: 6, name: "new h" });
    const old = steps(0, 20, 21).map((t) => [t, z ** t]);
    const decay = new Plot(width, "What is left of the old state if this step repeats", { x: { label: "steps", range: [0, 20] }, y: { label: "share of the old", range: [0, 1.05] }, height: 200 });
    decay.line(old, "var(--series-0)").dots(old, "var(--series-0)", { radius: 3, name: "weight of the old state if each step has this z" });
    return {
      picture: [plot.element, decay.element],
      facts: { "Candidate n": number(n), "New state h": number(next), "Weights": `${number(z)} + ${number(1 - z)} = 1`, "Weight of the old after 10 steps": number(z ** 10) },
    };
  },
  question: "Which gate makes the candidate forget, and which makes the state forget? Set z = 0.9: how much of the old state is left after ten steps?",
  answer: "`r` = 0 makes the candidate `tanh(w x)`, as if there were no past. `z` = 0 puts that candidate in the place of the state.\n\n`0.9¹⁰` = 0.35. A plain RNN has no such gate. Here the text decides, word by word.",
};

const VOCABULARY = 500, TRIALS = 30, MAX_WORDS = 30;

// The share of a sentence's words that can be read from the average of their vectors, by sentence length.
function recall(width) {
  const uniform = random(width), vectors = Array.from({ length: VOCABULARY }, () => unit(normalVector(width, uniform)));
  const products = vectors.map((v) => Float64Array.from(vectors, (other) => dot(v, other)));
  return steps(1, MAX_WORDS, MAX_WORDS).map((length) => mean(Array.from({ length: TRIALS }, () => {
    const words = new Set();
    while (words.size < length) words.add(Math.floor(uniform() * VOCABULARY));
    // The score of a word, times n: the product with an average is the average of the products.
    const scores = new Float64Array(VOCABULARY);
    for (const word of words) products[word].forEach((product, other) => { scores[other] += product; });
    const lowest = Float64Array.from(scores).sort()[VOCABULARY - length]; // of the n words that are read back
    return [...words].filter((word) => scores[word] >= lowest).length / length;
  })));
}

const recalls = {};

const encoderDecoder = {
  chapter: 11, title: "Encoder and decoder", page: "11-encoder-decoder.md",
  idea: "To translate, read everything first: one network encodes the sentence into one vector, `c`, and another writes from it. The vector is as wide for thirty words as for three. Here the encoder is the plainest there is, an average of random word vectors, and we count how many of its words are among the `n` best scores of 500. A trained encoder is better, and has the same limit.",
  equations: ['c = {1}/{n} ∑_i x_i', "score(v) = c · v"],
  controls: [
    range("words", "Words in the sentence", [1, MAX_WORDS, 1], 20),
    choice("width", "Width of the vector", { 16: "16", 32: "32", 64: "64", 128: "128" }, "32"),
    toggle("all", "Keep every state (chapter 12)", false),
  ],
  show({ words, width: size, all }, width) {
    const shares = recalls[size] ??= recall(Number(size)), share = all ? 1 : shares[words - 1];
    const plot = new Plot(width, "Share of the words that can be read back, by the length of the sentence", {
      x: { label: "words in the sentence", range: [0, MAX_WORDS] }, y: { label: "share read back", range: [0, 1.05] },
    });
    plot.line(shares.map((value, i) => [i + 1, value]), "var(--series-0)", { name: `one vector of ${size} numbers` });
    if (all) plot.line([[1, 1], [MAX_WORDS, 1]], "var(--series-2)", { name: "all states kept" });
    plot.dots([[words, share]], "var(--series-1)", { radius: 6, name: "your sentence" });
    return {
      picture: plot.element,
      facts: { "Words read back": `${number(share * words)} of ${words}`, "Share": `${(100 * share).toFixed(0)}%`, "Numbers kept": number(all ? words * Number(size) : Number(size)) },
    };
  },
  question: "Does twice the width carry twice the words? Find the longest sentence of which nine words in ten survive, at 32, 64 and 128.",
  answer: "Yes, here: 2, 4 and 8 words. But a longer sentence needs a wider vector still, and an average has lost the order too.\n\nThe way out is not a wider vector. Keep the state of every word, and look back: chapter 12.",
};

export const MEMORY = [rnn, lstm, gru, encoderDecoder];
