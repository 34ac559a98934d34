// Compare: the same prompt and seed for several models, side by side.

import { SamplingControls, addShortcuts, summarize } from "./controls.js";
import { $, $$, el } from "./dom.js";
import { Generation } from "./generation.js";
import { TokenView } from "./tokens.js";

const INITIALLY_SELECTED = 4; // models

export function compare(models) {
  const section = $("#compare"), container = $("#compare-columns"), stop = $("#compare-stop"), list = $("#compare-models");
  const prompt = $("#compare-prompt"), controls = new SamplingControls($("[data-sampling]", section));
  const columns = new Map(); // model id -> { element, model, generation }
  list.append(...models.map((model, i) => el("label", {},
    el("input", { type: "checkbox", name: "models", value: model.id, checked: i < INITIALLY_SELECTED, onchange: updateColumns }),
    el("span", {}, model.id, " ", el("small", {}, model.rung)))));
  if (models.length < 2) list.append(el("p", { class: "hint" }, "Only one model is served. To compare several: ", el("code", {}, "python -m serving serve RUN RUN …")));

  function updateColumns() {
    const selected = $$("input:checked", list).map((input) => models.find((model) => model.id === input.value));
    for (const [id, { generation, element }] of columns) {
      if (selected.some((model) => model.id === id)) continue;
      generation.stop();
      element.remove();
      columns.delete(id);
    }
    for (const model of selected) {
      if (!columns.has(model.id)) {
        const output = el("div", { class: "tokens" }), stats = el("p", { class: "stats", role: "status" });
        const element = el("article", { "aria-label": model.id }, el("h3", {}, model.id), el("p", { class: "hint" }, summarize(model)), output, stats);
        columns.set(model.id, { element, model, generation: new Generation(new TokenView(output), stats, updateStop) });
      }
      container.append(columns.get(model.id).element);
    }
  }

  function updateStop() {
    stop.disabled = ![...columns.values()].some(({ generation }) => generation.running);
  }

  function run() {
    const body = { prompt: prompt.value, ...controls.request };
    for (const { model, generation } of columns.values()) generation.run(model, body);
  }

  const stopAll = () => columns.forEach(({ generation }) => generation.stop());
  updateColumns();
  $("#compare-run").addEventListener("click", run);
  stop.addEventListener("click", stopAll);
  addShortcuts(section, run, stopAll);
  return {};
}
