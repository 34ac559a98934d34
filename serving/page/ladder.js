// Ladder: bits per byte of each model by its cost, and a description of the selected one.

import { get } from "./api.js";
import { Chart, seriesColor } from "./chart.js";
import { $, el, prose } from "./dom.js";
import { duration, integer } from "./format.js";

const X_LABELS = { parameters: "parameters", seconds: "seconds of training", tokens: "training tokens" };

export function ladder() {
  const axis = $("#ladder-x"), article = $("#ladder-rung"), chart = new Chart($("#ladder-chart"), "Bits per byte of each model");
  let data = null, selected = null;

  function draw() {
    const x = axis.value;
    const rows = data.rows.filter((row) => row[x] > 0);
    // Without bits per byte, because the tokenizer loses text, the loss still compares models.
    const hasBits = rows.every((row) => row.bits_per_byte != null);
    const y = (row) => (hasBits ? row.bits_per_byte : row.loss), yLabel = hasBits ? "bits per byte" : "nats per token";
    chart.show({
      x: { label: X_LABELS[x], log: true },
      y: { label: yLabel },
      dots: rows.map((row) => ({
        x: row[x], y: y(row), name: row.rung, color: seriesColor(row.rung === selected ? 1 : 0), pressed: row.rung === selected,
        description: `${row.rung}: ${y(row).toFixed(3)} ${yLabel}, ${integer(row[x])} ${X_LABELS[x]}`,
        onClick: () => select(row.rung),
      })),
    });
  }

  function select(name) {
    selected = name;
    const row = data.rows.find((row) => row.rung === name);
    const rung = data.rungs.find((rung) => rung.name === name) ?? row;
    const fact = (label, value) => (value == null ? [] : [el("dt", {}, label), el("dd", {}, value)]);
    article.replaceChildren(
      el("h3", {}, `${rung.chapter}. ${name}`),
      el("p", {}, rung.idea),
      el("p", { class: "hint" }, rung.paper),
      ...(row ? [el("dl", {},
        ...fact("bits per byte", row.bits_per_byte?.toFixed(4)), ...fact("perplexity", row.perplexity?.toFixed(2)),
        ...fact("parameters", integer(row.parameters)), ...fact("training", `${duration(row.seconds)}, ${integer(row.tokens)} tokens`))] : []),
      ...(rung.description ? prose(rung.description) : []),
      ...(row?.sample ? [el("h3", {}, "Sample without a prompt"), el("pre", { tabindex: 0, role: "group", dir: "auto", "aria-label": "Sample" }, row.sample)] : []),
    );
    if (data.rows.length) draw();
    else listRungs();
  }

  // Without results, the models are buttons in place of the chart.
  function listRungs() {
    $("#ladder-chart").replaceChildren(el("div", { class: "toolbar" }, data.rungs.map((rung) =>
      el("button", { type: "button", "aria-pressed": String(rung.name === selected), onclick: () => select(rung.name) }, `${rung.chapter}. ${rung.name}`))));
  }

  axis.addEventListener("change", draw);
  return {
    async onShow() {
      data = await get("v1/ladder");
      axis.disabled = !data.rows.length;
      const [first] = data.rows;
      $("#ladder-source").replaceChildren(...(first
        ? [`${first.data}; ${integer(first.tokens_scored)} tokens scored; ${first.device}, ${first.date}`]
        : ["No results yet. ", el("code", {}, "make ladder"), " trains every model on one corpus under one budget."]));
      select(selected ?? data.rows.at(-1)?.rung ?? data.rungs.at(-1).name);
    },
  };
}
