// Ladder: bits per byte of each model by its cost, the equations of all, and a description of the selected one.

import { get } from "./api.js";
import { Chart, seriesColor } from "./chart.js";
import { $, $$, el, prose } from "./dom.js";
import { duration, integer } from "./format.js";

const X_LABELS = { parameters: "parameters", seconds: "seconds of training", tokens: "training tokens" };

export function ladder() {
  const axis = $("#ladder-x"), article = $("#ladder-rung"), list = $("#ladder-rungs");
  const chart = new Chart($("#ladder-chart"), "Bits per byte of each model");
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

  // In place of the chart, before any model is trained.
  function explainChart() {
    $("#ladder-chart").replaceChildren(
      el("p", {}, "Nothing is measured yet. ", el("code", {}, "make ladder"), " trains every language model below on one corpus, with one tokenizer and one budget. It takes about 20 minutes on two cores."),
      el("p", {}, "A chart here will then show the bits per byte of each: how well it predicts text that it was not trained on, by its number of parameters, its training time or its training tokens. Lower is better."),
      el("p", { class: "hint" }, "Linear and logistic regression have no dot: they predict numbers. Nor has word2vec, which learns vectors and predicts no next word."));
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
    for (const button of $$("button", list)) button.setAttribute("aria-pressed", String(button.dataset.name === name));
    if (data.rows.length) draw();
  }

  function listRungs() {
    list.replaceChildren(...data.rungs.map((rung) => el("li", {}, el("button", {
      type: "button", "aria-pressed": "false", "data-name": rung.name,
      onclick: () => {
        select(rung.name);
        article.scrollIntoView({ block: "nearest" }); // on a phone it is below the list
      },
    }, el("span", {}, `${rung.chapter}. ${rung.name} `, el("small", {}, rung.year)), el("code", {}, rung.equation)))));
  }

  axis.addEventListener("change", draw);
  return {
    async onShow() {
      data = await get("v1/ladder");
      const [first] = data.rows;
      $("#ladder-axis").hidden = !first;
      $("#ladder-source").textContent = first ? `${first.data}; ${integer(first.tokens_scored)} tokens scored; ${first.device}, ${first.date}` : "";
      listRungs();
      if (!first) explainChart();
      select(selected ?? data.rows.at(-1)?.rung ?? data.rungs[0].name);
    },
  };
}
