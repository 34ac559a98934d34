// Runs: their curves, while they train too; their configuration side by side; what they wrote on the way.

import { get } from "./api.js";
import { Chart, color } from "./chart.js";
import { $, all, clock, el, latest, long } from "./dom.js";

const LABELS = { step: "step", tokens: "tokens", seconds: "seconds of training" };
const EVERY = 2000; // milliseconds between two looks
const FIRST = 3; // runs that are drawn at first

export function runs() {
  const section = $("#runs"), form = $("#runs-form"), list = $("#runs-list"), figures = $("#runs-figures");
  const chart = new Chart($("#runs-chart"), "Training and validation loss");
  const known = new Map(); // name -> {lines, next, config, finished}
  let listed = [], ticked = null, timer = null;

  const look = latest(async () => {
    clearTimeout(timer);
    if (section.hidden) return;
    try {
      listed = (await get("v1/runs")).data;
      ticked ??= new Set(listed.slice(0, FIRST).map((run) => run.name));
      show();
      await Promise.all(listed.filter((run) => ticked.has(run.name)).map(read));
      draw();
    } catch (error) {
      figures.textContent = error.message;
    }
    timer = setTimeout(look, document.hidden ? 10 * EVERY : EVERY);
  });

  async function read(run) {
    const before = known.get(run.name) ?? { lines: [], next: 0, updated: null };
    if (before.updated === run.updated && before.finished) return;
    const path = run.name.split("/").map(encodeURIComponent).join("/");
    const { metrics, next, config, finished, restarted } = await get(`v1/runs/${path}?after=${before.next}`);
    const lines = restarted ? metrics : [...before.lines, ...metrics];
    known.set(run.name, { lines, next, config, finished, updated: run.updated });
  }

  function show() {
    const names = listed.map((run) => run.name).join("\n");
    if (list.dataset.names !== names) {
      list.dataset.names = names;
      list.replaceChildren(el("legend", {}, "Runs"), ...listed.map((run) => el("label", {},
        el("input", { type: "checkbox", value: run.name, checked: ticked.has(run.name), onchange: tick }), el("span"))));
      if (!listed.length) list.append(el("p", { class: "about" }, "None yet: ", el("code", {}, "make train")));
    }
    all("label > span", list).forEach((span, i) => {
      const run = listed[i], score = run.final_bits_per_byte ?? null;
      const state = run.finished ? (score === null ? "done" : `${score.toFixed(3)} bits per byte`) : `step ${long(run.step ?? 0)} of ${long(run.steps ?? 0)}`;
      span.replaceChildren(run.name, " ", el("small", {}, state));
    });
  }

  function tick() {
    ticked = new Set(all("input:checked", list).map((input) => input.value));
    look();
  }

  // What a run's lines say, against steps, tokens or seconds; a validation is where the step is.
  function curves(name) {
    const across = form.elements.x.value, { lines } = known.get(name);
    const at = new Map([[0, 0]]);
    for (const line of lines) if (line[across] !== undefined) at.set(line.step, line[across]);
    const points = (what) => lines.filter((line) => line[what] !== undefined && at.has(line.step)).map((line) => [at.get(line.step), line[what]]);
    return { training: points("loss"), validation: points("validation_loss") };
  }

  function draw() {
    const names = listed.map((run) => run.name).filter((name) => ticked.has(name) && known.has(name));
    const series = names.flatMap((name, number) => {
      const { training, validation } = curves(name), hue = color(number);
      return [{ name: "", color: hue, points: training, thin: true }, { name, color: hue, points: validation, dots: validation.length < 60 }];
    });
    const log = form.elements.log.checked, across = form.elements.x.value;
    const tell = (value) => { figures.textContent = value === null ? "thin: training; thick: validation" : reading(names, value); };
    chart.show({ series, x: { label: LABELS[across], log }, y: { label: "loss", log }, onHover: tell });
    tell(null);
    $("#runs-chart").dataset.points = series.reduce((sum, one) => sum + one.points.length, 0);
    samples(names);
    configurations(names);
  }

  function reading(names, value) {
    const near = (points) => points.reduce((best, point) => (Math.abs(point[0] - value) < Math.abs(best[0] - value) ? point : best), points[0]);
    const told = names.map((name) => {
      const { training, validation } = curves(name), [one, two] = [near(training), near(validation)];
      return `${name}: ${one ? one[1].toFixed(3) : "–"} training${two ? `, ${two[1].toFixed(3)} validation` : ""}`;
    });
    const across = form.elements.x.value;
    return `${across === "seconds" ? clock(value) : `${long(Math.round(value))} ${LABELS[across]}`} · ${told.join(" · ")}`;
  }

  // The samples of each run: the slider goes from its first validation to its last.
  function samples(names) {
    const place = $("#runs-samples");
    for (const element of [...place.children]) if (!names.includes(element.dataset.name)) element.remove();
    for (const name of names) {
      const found = known.get(name).lines.filter((line) => line.sample);
      if (!found.length) continue;
      let box = all("article", place).find((element) => element.dataset.name === name);
      if (!box) {
        const slider = el("input", { type: "range", min: 0, max: 0, value: 0, "aria-label": `Samples of ${name}, in time` });
        box = el("article", { class: "panel", "data-name": name }, el("h3", {}, name), el("p", { class: "about" }), slider, el("pre", { dir: "auto", tabindex: 0, "aria-label": `A sample of ${name}` }));
        slider.addEventListener("input", () => box.tell());
        place.append(box);
      }
      const slider = $("input", box), last = slider.value === slider.max;
      slider.max = found.length - 1;
      if (last) slider.value = slider.max;
      box.tell = () => {
        const line = found[slider.value];
        $(".about", box).textContent = `what it wrote at step ${long(line.step)}, validation loss ${line.validation_loss?.toFixed(3)}`;
        $("pre", box).textContent = line.sample;
      };
      box.tell();
    }
  }

  function configurations(names) {
    const place = $("#runs-config > div"), told = names.join("\n");
    if (place.dataset.names === told) return; // what one reads there stays where it is
    place.dataset.names = told;
    const rows = [...new Set(names.flatMap((name) => Object.keys(known.get(name).config)))];
    const cell = (name, row) => JSON.stringify(known.get(name).config[row]) ?? "";
    place.replaceChildren(el("div", { class: "wide", tabindex: 0, role: "group", "aria-label": "Configuration" }, el("table", {},
      el("thead", {}, el("tr", {}, el("td"), names.map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, rows.map((row) => {
        const cells = names.map((name) => cell(name, row));
        return el("tr", { class: new Set(cells).size > 1 ? "differs" : null }, el("th", { scope: "row" }, row), cells.map((text) => el("td", {}, text)));
      })))));
  }

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", (event) => { if (event.target.name) draw(); });
  return { shown: look };
}
