// Compare: one prompt and seed, several models, side by side.

import { $, all, el } from "./dom.js";
import { Knobs, describe, keys } from "./knobs.js";
import { TokenView } from "./tokens.js";
import { Writing } from "./writing.js";

const MOST = 4; // at first; more can be ticked

export function compare(models) {
  const section = $("#compare"), columns = $("#compare-columns"), stop = $("#compare-stop");
  const prompt = $("#compare-prompt"), knobs = new Knobs($("[data-knobs]", section));
  const writings = new Map();
  const list = $("#compare-models");
  list.append(...models.map((model, i) => el("label", {},
    el("input", { type: "checkbox", name: "models", value: model.id, checked: i < MOST, onchange: arrange }),
    el("span", {}, model.id, " ", el("small", {}, model.rung)))));
  if (models.length < 2) list.append(el("p", { class: "about" }, "Only one model is served. Side by side: ", el("code", {}, "python -m serving serve RUN RUN …")));

  function arrange() {
    const ticked = all("input:checked", list).map((input) => models.find((model) => model.id === input.value));
    for (const [id, { writing, column }] of writings) {
      if (ticked.some((model) => model.id === id)) continue;
      writing.stop();
      column.remove();
      writings.delete(id);
    }
    for (const model of ticked) {
      if (!writings.has(model.id)) {
        const sheet = el("div", { class: "sheet" }), figures = el("p", { class: "figures", role: "status" });
        const column = el("article", { "aria-label": model.id }, el("h3", {}, model.id), el("p", { class: "about" }, describe(model)), sheet, figures);
        writings.set(model.id, { column, model, writing: new Writing(new TokenView(sheet), figures, changed) });
      }
      columns.append(writings.get(model.id).column);
    }
  }

  function changed() {
    stop.disabled = ![...writings.values()].some(({ writing }) => writing.running);
  }

  function write() {
    const body = { prompt: prompt.value, ...knobs.request };
    for (const { model, writing } of writings.values()) writing.run(model, body);
  }

  const stopAll = () => writings.forEach(({ writing }) => writing.stop());
  arrange();
  $("#compare-go").addEventListener("click", write);
  stop.addEventListener("click", stopAll);
  keys(section, write, stopAll);
  return {};
}
