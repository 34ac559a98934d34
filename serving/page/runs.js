// Runs: loss curves, samples and configurations of training runs, updated while they train.

import { get } from "./api.js";
import { Chart, seriesColor } from "./chart.js";
import { $, $$, coalesce, el } from "./dom.js";
import { duration, integer } from "./format.js";

const X_LABELS = { step: "step", tokens: "tokens", seconds: "seconds of training" };
const POLL_INTERVAL = 2000; // milliseconds; ten times as long in a background tab
const INITIALLY_SELECTED = 3; // runs

export function runs() {
  const section = $("#runs"), form = $("#runs-form"), list = $("#runs-list"), stats = $("#runs-stats");
  const chart = new Chart($("#runs-chart"), "Training and validation loss");
  const loaded = new Map(); // name -> { metrics, next, config, finished, updated }
  let available = [], selected = null, timer = null;

  const poll = coalesce(async () => {
    clearTimeout(timer);
    if (section.hidden) return;
    try {
      available = (await get("v1/runs")).data;
      selected ??= new Set(available.slice(0, INITIALLY_SELECTED).map((run) => run.name));
      updateList();
      await Promise.all(available.filter((run) => selected.has(run.name)).map(load));
      draw();
    } catch (error) {
      stats.textContent = error.message;
    }
    timer = setTimeout(poll, document.hidden ? 10 * POLL_INTERVAL : POLL_INTERVAL);
  });

  // Fetch the metrics that were written since the last call.
  async function load(run) {
    const previous = loaded.get(run.name) ?? { metrics: [], next: 0, updated: null };
    if (previous.updated === run.updated && previous.finished) return;
    const path = run.name.split("/").map(encodeURIComponent).join("/");
    const response = await get(`v1/runs/${path}?after=${previous.next}`);
    const { next, config, finished, restarted } = response;
    const metrics = restarted ? response.metrics : [...previous.metrics, ...response.metrics];
    loaded.set(run.name, { metrics, next, config, finished, updated: run.updated });
  }

  function updateList() {
    const names = available.map((run) => run.name).join("\n");
    if (list.dataset.names !== names) {
      list.dataset.names = names;
      list.replaceChildren(el("legend", {}, "Runs"), ...available.map((run) => el("label", {},
        el("input", { type: "checkbox", value: run.name, checked: selected.has(run.name), onchange: updateSelection }), el("span"))));
      if (!available.length) list.append(el("p", { class: "hint" }, "No runs yet. Start one with ", el("code", {}, "make train"), "."));
    }
    $$("label > span", list).forEach((span, i) => {
      const run = available[i], score = run.final_bits_per_byte ?? null;
      const status = run.finished ? (score === null ? "finished" : `${score.toFixed(3)} bits per byte`) : `step ${integer(run.step ?? 0)} of ${integer(run.steps ?? 0)}`;
      span.replaceChildren(run.name, " ", el("small", {}, status));
    });
  }

  function updateSelection() {
    selected = new Set($$("input:checked", list).map((input) => input.value));
    poll();
  }

  // A run's loss curves over the selected axis. Validation lines have only a step: their x value is that of the step's training line.
  function curves(name) {
    const x = form.elements.x.value, { metrics } = loaded.get(name);
    const xOfStep = new Map([[0, 0]]);
    for (const line of metrics) if (line[x] !== undefined) xOfStep.set(line.step, line[x]);
    const points = (key) => metrics.filter((line) => line[key] !== undefined && xOfStep.has(line.step)).map((line) => [xOfStep.get(line.step), line[key]]);
    return { training: points("loss"), validation: points("validation_loss") };
  }

  function draw() {
    const names = available.map((run) => run.name).filter((name) => selected.has(name) && loaded.has(name));
    const series = names.flatMap((name, i) => {
      const { training, validation } = curves(name), color = seriesColor(i);
      return [{ name: "", color, points: training, thin: true }, { name, color, points: validation, markers: validation.length < 60 }];
    });
    const log = form.elements.log.checked, x = form.elements.x.value;
    const showStats = (value) => { stats.textContent = value === null ? "Thin lines: training loss. Thick lines: validation loss." : lossesAt(names, value); };
    chart.show({ series, x: { label: X_LABELS[x], log }, y: { label: "loss", log }, onHover: showStats });
    showStats(null);
    $("#runs-chart").dataset.points = series.reduce((sum, { points }) => sum + points.length, 0);
    showSamples(names);
    showConfigs(names);
  }

  function lossesAt(names, value) {
    const nearest = (points) => points.reduce((best, point) => (Math.abs(point[0] - value) < Math.abs(best[0] - value) ? point : best), points[0]);
    const losses = names.map((name) => {
      const { training, validation } = curves(name), [train, val] = [nearest(training), nearest(validation)];
      return `${name}: ${train ? train[1].toFixed(3) : "–"} training${val ? `, ${val[1].toFixed(3)} validation` : ""}`;
    });
    const x = form.elements.x.value;
    return `${x === "seconds" ? duration(value) : `${integer(Math.round(value))} ${X_LABELS[x]}`} · ${losses.join(" · ")}`;
  }

  // The samples of each run, with a slider from the first validation to the last.
  function showSamples(names) {
    const container = $("#runs-samples");
    for (const article of [...container.children]) if (!names.includes(article.dataset.name)) article.remove();
    for (const name of names) {
      const lines = loaded.get(name).metrics.filter((line) => line.sample);
      if (!lines.length) continue;
      let article = $$("article", container).find((element) => element.dataset.name === name);
      if (!article) {
        const slider = el("input", { type: "range", min: 0, max: 0, value: 0, "aria-label": `Validation whose sample of ${name} is shown` });
        article = el("article", { class: "panel", "data-name": name }, el("h3", {}, name), el("p", { class: "hint" }), slider, el("pre", { dir: "auto", tabindex: 0, "aria-label": `Sample of ${name}` }));
        slider.addEventListener("input", () => article.update());
        container.append(article);
      }
      const slider = $("input", article), atEnd = slider.value === slider.max;
      slider.max = lines.length - 1;
      if (atEnd) slider.value = slider.max;
      article.update = () => {
        const line = lines[slider.value];
        $(".hint", article).textContent = `Sample at step ${integer(line.step)}, validation loss ${line.validation_loss?.toFixed(3)}`;
        $("pre", article).textContent = line.sample;
      };
      article.update();
    }
  }

  function showConfigs(names) {
    const container = $("#runs-config > div"), key = names.join("\n");
    if (container.dataset.names === key) return; // keep the reader's scroll position
    container.dataset.names = key;
    const options = [...new Set(names.flatMap((name) => Object.keys(loaded.get(name).config)))];
    container.replaceChildren(el("div", { class: "scroll-x", tabindex: 0, role: "group", "aria-label": "Configurations" }, el("table", {},
      el("thead", {}, el("tr", {}, el("td"), names.map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, options.map((option) => {
        const values = names.map((name) => JSON.stringify(loaded.get(name).config[option]) ?? "");
        return el("tr", { class: new Set(values).size > 1 ? "differs" : null }, el("th", { scope: "row" }, option), values.map((value) => el("td", {}, value)));
      })))));
  }

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", (event) => { if (event.target.name) draw(); });
  return { onShow: poll };
}
