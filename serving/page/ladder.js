// The ladder: each model's bits per byte against what it cost, and what each of them is.

import { get } from "./api.js";
import { Chart, color } from "./chart.js";
import { $, clock, el, long, prose } from "./dom.js";

const UNITS = { parameters: "parameters", seconds: "seconds of training", tokens: "tokens of training" };

export function ladder() {
  const against = $("#ladder-x"), article = $("#ladder-rung"), chart = new Chart($("#ladder-chart"), "Bits per byte of each model");
  let found = null, chosen = null;

  function draw() {
    const x = against.value;
    const rows = found.rows.filter((row) => row[x] > 0);
    chart.show({
      x: { label: UNITS[x], log: true },
      y: { label: "bits per byte" },
      dots: rows.map((row) => ({
        x: row[x], y: row.bits_per_byte, name: row.rung, color: color(row.rung === chosen ? 1 : 0), pressed: row.rung === chosen,
        told: `${row.rung}: ${row.bits_per_byte.toFixed(3)} bits per byte, ${long(row[x])} ${UNITS[x]}`,
        on: () => choose(row.rung),
      })),
    });
  }

  function choose(name) {
    chosen = name;
    const row = found.rows.find((one) => one.rung === name);
    const rung = found.rungs.find((one) => one.name === name) ?? row;
    const fact = (what, value) => (value == null ? [] : [el("dt", {}, what), el("dd", {}, value)]);
    article.replaceChildren(
      el("h3", {}, `${rung.chapter}. ${name}`),
      el("p", {}, rung.idea),
      el("p", { class: "about" }, rung.paper),
      ...(row ? [el("dl", {},
        ...fact("bits per byte", row.bits_per_byte.toFixed(4)), ...fact("perplexity", row.perplexity?.toFixed(2)),
        ...fact("parameters", long(row.parameters)), ...fact("training", `${clock(row.seconds)}, ${long(row.tokens)} tokens`))] : []),
      ...(rung.description ? prose(rung.description) : []),
      ...(row?.sample ? [el("h3", {}, "What it writes when nothing is given"), el("pre", { tabindex: 0, role: "group", dir: "auto", "aria-label": "A sample" }, row.sample)] : []),
    );
    if (found.rows.length) draw();
    else list();
  }

  // Before anything was measured, the rungs by name.
  function list() {
    $("#ladder-chart").replaceChildren(el("div", { class: "actions" }, found.rungs.map((rung) =>
      el("button", { type: "button", "aria-pressed": String(rung.name === chosen), onclick: () => choose(rung.name) }, `${rung.chapter}. ${rung.name}`))));
  }

  against.addEventListener("change", draw);
  return {
    async shown() {
      found = await get("v1/ladder");
      against.disabled = !found.rows.length;
      const [first] = found.rows;
      $("#ladder-source").replaceChildren(...(first
        ? [`${first.data}; ${long(first.tokens_scored)} tokens scored; ${first.device}, ${first.date}`]
        : ["Nothing is measured yet: ", el("code", {}, "make ladder"), " trains every model on one corpus under one budget, and draws them here."]));
      choose(chosen ?? found.rows.at(-1)?.rung ?? found.rungs.at(-1).name);
    },
  };
}
