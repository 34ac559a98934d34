// Runs: loss curves, samples and configurations of training runs, updated while they train.

import { get } from "./api.js";
import { Chart, seriesColor } from "./chart.js";
import { $, $$, coalesce, el } from "./dom.js";
import { duration, integer, lossText } from "./format.js";

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
      // Losses of different tasks are not comparable.
      const comparable = available.filter((run) => run.task === available[0].task);
      selected ??= new Set(comparable.slice(0, INITIALLY_SELECTED).map((run) => run.name));
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
    showControls(names);
    const smoothing = Number(form.elements.smoothing.value), x = form.elements.x.value, log = form.elements.log.checked;
    const runs = names.map((name, i) => {
      const { training, validation } = curves(name);
      return { name, color: seriesColor(i), training, smoothed: smooth(training, smoothing), validation };
    });
    const series = runs.flatMap(({ name, color, training, smoothed, validation }) => [
      { name: "", color, points: training, thin: true, faint: smoothing > 0 },
      ...(smoothing > 0 ? [{ name: "", color, points: smoothed, thin: true }] : []),
      { name, color, points: validation, markers: validation.length < 60 },
    ]);
    chart.show({ series, x: { label: X_LABELS[x], log }, y: { label: "loss", log }, readout: (value) => readout(runs, value, smoothing > 0) });
    $("#runs-chart").dataset.points = runs.reduce((sum, { training, validation }) => sum + training.length + validation.length, 0);
    const tasks = new Set(available.filter((run) => names.includes(run.name)).map((run) => run.task));
    stats.textContent = !available.length ? "" : !names.length ? "Select a run to see its loss."
      : `Thin lines: training loss. Thick lines: validation loss. Point at the chart, or press Tab and the arrow keys, to read values.${
        tasks.size > 1 ? " These runs learn different tasks: do not compare their losses." : ""}`;
    showSamples(names);
    showConfigs(names);
  }

  // Hide what has no effect on the selected runs.
  function showControls(names) {
    const { x } = form.elements, logged = new Set(names.flatMap((name) => loaded.get(name).metrics.flatMap(Object.keys)));
    $("#runs-settings").hidden = $("#runs-chart").hidden = $("#runs-config").hidden = !names.length;
    for (const option of x.options) option.hidden = option.value !== "step" && !logged.has(option.value);
    if (x.selectedOptions[0].hidden) x.value = "step";
  }

  // The losses of each run at an x value; none before a run's first or after its last.
  function readout(runs, value, isSmoothed) {
    const nearest = (points) => {
      if (!points.length || value < points[0][0] || value > points.at(-1)[0]) return null;
      return points.reduce((best, point) => (Math.abs(point[0] - value) < Math.abs(best[0] - value) ? point : best));
    };
    const x = form.elements.x.value;
    return {
      title: x === "seconds" ? duration(value) : `${X_LABELS[x]} ${integer(Math.round(value))}`,
      columns: ["training", ...(isSmoothed ? ["smoothed"] : []), "validation"],
      rows: runs.map(({ name, color, training, smoothed, validation }) => {
        const points = [training, ...(isSmoothed ? [smoothed] : []), validation].map(nearest);
        return { name, color, values: points.map((point) => lossText(point?.[1])), points: points.slice(-2).filter(Boolean) };
      }).filter(({ points }) => points.length),
    };
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
      slider.hidden = lines.length < 2;
      if (atEnd) slider.value = slider.max;
      article.update = () => {
        const line = lines[slider.value];
        $(".hint", article).textContent = `Sample at step ${integer(line.step)}, validation loss ${lossText(line.validation_loss)}`;
        $("pre", article).textContent = line.sample;
      };
      article.update();
    }
  }

  function showConfigs(names) {
    const container = $("#runs-config > div"), key = names.join("\n");
    if (container.dataset.names === key) return; // keep the reader's scroll position
    container.dataset.names = key;
    const config = (name) => loaded.get(name).config, valuesOf = (option) => names.map((name) => JSON.stringify(config(name)[option]) ?? "");
    const differs = (option) => new Set(valuesOf(option)).size > 1;
    // Without options that no run uses, and those first that differ.
    const options = [...new Set(names.flatMap((name) => Object.keys(config(name))))]
      .filter((option) => names.some((name) => ![null, false, undefined].includes(config(name)[option])))
      .sort((a, b) => differs(b) - differs(a));
    $("#runs-config > summary").textContent = names.length > 1 ? "Compare configurations" : "Configuration";
    container.replaceChildren(el("div", { class: "scroll-x", tabindex: 0, role: "group", "aria-label": "Configurations" }, el("table", {},
      el("thead", {}, el("tr", {}, el("td"), names.map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, options.map((option) =>
        el("tr", { class: differs(option) ? "differs" : null }, el("th", { scope: "row" }, option), valuesOf(option).map((value) => el("td", {}, value))))))));
  }

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => {
    if (!event.target.name) return;
    $("#runs-smoothing").textContent = Number(form.elements.smoothing.value).toFixed(2);
    draw();
  });
  return { onShow: poll };
}

// The exponential moving average of y, debiased so that it does not start at 0: what TensorBoard draws.
export function smooth(points, weight) {
  let sum = 0, total = 0;
  return points.map(([x, y]) => {
    if (!Number.isFinite(y)) return [x, y];
    sum = weight * sum + (1 - weight) * y;
    total = weight * total + 1 - weight;
    return [x, sum / total];
  });
}
