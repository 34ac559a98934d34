// Form controls that several views share: sampling parameters, model selection, keyboard shortcuts.

import { el } from "./dom.js";

const SLIDERS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, value: 0.8, format: (value) => (value === 0 ? "0 (greedy)" : value.toFixed(2)) },
  { name: "top_k", label: "Top-k", min: 0, max: 100, step: 1, value: 0, format: (value) => value || "off" },
  { name: "top_p", label: "Top-p", min: 0.05, max: 1, step: 0.05, value: 1, format: (value) => (value === 1 ? "off" : value.toFixed(2)) },
];

export class SamplingControls {
  constructor(element, onChange = () => {}) {
    this.inputs = {};
    element.parentElement.open = matchMedia("(min-width: 50rem)").matches; // on mobile the prompt comes first
    for (const { name, label, format, ...range } of SLIDERS) {
      const output = el("output", {}, String(format(range.value)));
      const input = el("input", { type: "range", name, ...range });
      input.addEventListener("input", () => {
        output.textContent = String(format(Number(input.value)));
        onChange();
      });
      this.inputs[name] = input;
      element.append(el("label", { class: "slider" }, label, output, input));
    }
    this.maxTokens = el("input", { type: "number", min: 1, max: 65536, value: 200, name: "max_tokens", inputmode: "numeric" });
    this.seed = el("input", { type: "number", min: 0, max: 2 ** 31, name: "seed", placeholder: "random", inputmode: "numeric" });
    element.append(el("label", {}, "Max tokens", this.maxTokens), el("label", {}, "Seed", this.seed));
    element.closest("form").addEventListener("submit", (event) => event.preventDefault());
  }

  // The parameters that the next-token distribution depends on.
  get sampling() {
    const params = Object.fromEntries(Object.entries(this.inputs).map(([name, input]) => [name, Number(input.value)]));
    if (!params.top_k) delete params.top_k;
    if (params.top_p === 1) delete params.top_p;
    return params;
  }

  // All fields of a completion request but its prompt. A random seed is drawn here, so that it can be shown.
  get request() {
    const seed = this.seed.value === "" ? Math.floor(Math.random() * 1e6) : Number(this.seed.value);
    return { ...this.sampling, max_tokens: Math.max(1, Number(this.maxTokens.value) || 200), seed };
  }
}

// Fill a form's model selection; return a function that returns the selected model.
export function modelSelect(form, models, onChange) {
  const select = form.elements.model, summary = form.querySelector("[data-summary]");
  const selected = () => models.find((model) => model.id === select.value);
  const showSummary = () => { summary.textContent = summarize(selected()); };
  select.replaceChildren(...models.map((model) => el("option", { value: model.id }, model.id)));
  select.addEventListener("change", () => {
    showSummary();
    onChange();
  });
  showSummary();
  return selected;
}

export function summarize(model) {
  const facts = [`${model.rung}, ${model.year}`, `${model.parameters.toLocaleString("en")} parameters`];
  if (model.bits_per_byte) facts.push(`${model.bits_per_byte.toFixed(3)} bits per byte`);
  if (model.dtype !== "float32") facts.push(model.dtype);
  if (model.translates) facts.push("translation");
  return facts.join(" · ");
}

// Ctrl-Enter runs and Escape stops, anywhere in a view.
export function addShortcuts(section, run, stop) {
  section.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      run();
    } else if (event.key === "Escape" && stop) stop();
  });
}
