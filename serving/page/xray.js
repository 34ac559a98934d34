// X-ray: what each token of a text listens to, layer by layer and head by head.

import { ApiError, post } from "./api.js";
import { $, all, el, isDark, visible } from "./dom.js";
import { choice, keys } from "./knobs.js";

const EXAMPLE = "The cat sat on the mat because the cat was tired.";
const CELLS = [15, 28], HEIGHT = 420; // pixels of a token's row or column in the large map, and of all rows if these allow

export function xray(models) {
  const section = $("#xray"), form = $("#xray-form"), text = $("#xray-text"), translation = $("#xray-translation"), found = $("#xray-found");
  const { map: which, layer, head } = form.elements;
  let answer = null, asked = null, row = 0;
  text.value = EXAMPLE;
  const pair = () => { $("#xray-pair").hidden = !chosen().translates; };
  const chosen = choice(form, models, pair);
  pair();

  async function look() {
    asked = { model: chosen().id, prompt: text.value };
    if (chosen().translates && translation.value) asked.translation = translation.value;
    found.replaceChildren(el("p", { class: "about", role: "status" }, "looking …"));
    try {
      answer = await whole();
    } catch (error) {
      answer = null;
      found.replaceChildren(el("div", { class: "fault", role: "alert" }, error.message));
      return;
    }
    const before = which.value;
    which.replaceChildren(...answer.maps.map((map, i) => el("option", { value: i }, map.name)));
    if ([...which.options].some((option) => option.value === before)) which.value = before;
    row = answer.maps[which.value]?.rows.length - 1;
    choose();
  }

  // All layers at once, where that is not too much; else the first, and others when they are asked for.
  async function whole() {
    try {
      return await post("v1/xray", asked);
    } catch (error) {
      if (!(error instanceof ApiError && error.status === 400 && /layer/.test(error.message))) throw error;
      return post("v1/xray", { ...asked, layer: Number(layer.value) || 0 });
    }
  }

  const map = () => answer.maps[Number(which.value) || 0];

  function fill(select, count, one) {
    const before = select.value;
    select.replaceChildren(...Array.from({ length: count }, (_, i) => el("option", { value: i }, `${one} ${i + 1}`)));
    select.value = Number(before) < count ? before || 0 : 0;
    select.disabled = count < 2;
  }

  function choose() {
    fill(layer, map().num_layers, "layer");
    fill(head, map().num_heads, "head");
    draw();
  }

  async function changeLayer() {
    const at = Number(layer.value) - map().first_layer;
    if (at < 0 || at >= map().weights.length) {
      const name = which.value;
      answer = await post("v1/xray", { ...asked, layer: Number(layer.value) });
      which.value = name;
    }
    draw();
  }

  const weights = () => map().weights[Number(layer.value) - map().first_layer][Number(head.value)];

  function draw() {
    const one = map(), { rows, columns } = one;
    row = Math.min(row, rows.length - 1);
    const same = columns && columns.length === rows.length && columns.every((token, i) => token.id === rows[i].id);
    const line = (tokens, name) => el("div", { class: "sheet looks", role: "group", "aria-label": name }, tokens.map((token, i) => {
      const span = el("span", { class: token.text.startsWith("\n") ? "token line" : "token" }, token.text || visible(token.text));
      span.place = i;
      return span;
    }));
    const listened = columns && !same ? line(columns, "What is listened to") : null;
    const told = line(rows, "The text: the arrow keys go from token to token");
    told.tabIndex = 0;
    const says = el("p", { class: "figures", role: "status", id: "xray-says" });
    const many = one.weights.length * one.weights[0].length > 1, table = one.num_heads > 1; // a row for each layer, where they have heads
    const grid = el("div", { class: "maps", role: "group", "aria-label": "Layers and heads", hidden: !many, style: { "--columns": table ? one.num_heads + 1 : one.num_layers } });
    const name = (what, number) => el("span", { "aria-hidden": "true" }, `${what} ${number + 1}`);
    if (table) grid.append(el("span"), ...one.weights[0].map((_, h) => name("head", h)));
    const large = el("canvas", { role: "img", "aria-label": `${one.name}: rows are tokens, columns ${columns ? "the tokens they listen to" : one.column_label}` });
    const panel = el("div", { class: "panel wide", tabindex: 0, role: "group", "aria-label": "The map, token by token" }, large);
    found.replaceChildren(...[listened, told, says].filter(Boolean), el("div", { class: "overview" }, grid, panel));

    if (many) one.weights.forEach((heads, l) => heads.forEach((map, h) => {
      const canvas = el("canvas", { "aria-hidden": "true" }), label = name("layer", one.first_layer + l);
      if (table && h === 0) grid.append(label);
      grid.append(el("button", {
        type: "button", "aria-pressed": "false", "data-layer": one.first_layer + l, "data-head": h,
        "aria-label": `layer ${one.first_layer + l + 1}${table ? `, head ${h + 1}` : ""}`,
        onclick: () => { layer.value = one.first_layer + l; head.value = h; pick(); },
      }, canvas, table ? null : label));
      paint(canvas, map, one, 1);
    }));

    const point = (place) => { row = place; pick(false); };
    const at = (event) => { if (event.target.place !== undefined && event.target.parentElement === told) point(event.target.place); };
    told.addEventListener("pointerover", at);
    told.addEventListener("click", at);
    told.addEventListener("keydown", (event) => {
      const to = { ArrowRight: row + 1, ArrowLeft: row - 1, Home: 0, End: rows.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      point(Math.max(0, Math.min(rows.length - 1, to)));
    });
    large.addEventListener("pointermove", (event) => {
      const place = Math.floor((event.offsetY - large.top) / large.cell);
      if (place >= 0 && place < rows.length && place !== row) point(place);
    });

    // The map of a layer and head, and in it a token.
    function pick(anew = true) {
      const values = weights()[row];
      if (anew) {
        for (const button of all("button", grid)) {
          button.setAttribute("aria-pressed", String(button.dataset.layer === layer.value && button.dataset.head === head.value));
        }
      }
      label(large, one, weights(), row);
      const lit = columns ? listened ?? told : told;
      const strength = columns ? values : weights().map((of) => of.reduce((sum, value) => sum + value, 0) / of.length);
      const most = Math.max(...strength.map(Math.abs), 1e-9);
      [...lit.children].forEach((span, i) => span.style.setProperty("--weight", Math.max(0, (strength[i] ?? 0) / most).toFixed(3)));
      [...told.children].forEach((span, i) => span.classList.toggle("here", i === row));
      says.textContent = say(one, values, rows[row]);
    }
    pick();
    found.pick = pick;
  }

  form.addEventListener("submit", (event) => event.preventDefault());
  which.addEventListener("change", choose);
  layer.addEventListener("change", changeLayer);
  head.addEventListener("change", () => found.pick?.());
  $("#xray-go").addEventListener("click", look);
  keys(section, look);
  addEventListener("themechange", () => answer && draw());
  return {};
}

function say(map, values, token) {
  const order = values.map((value, i) => [value, i]).sort((a, b) => Math.abs(b[0]) - Math.abs(a[0])).slice(0, 4);
  const sum = values.reduce((total, value) => total + value, 0);
  const name = (i) => (map.columns ? `“${visible(map.columns[i].text)}”` : `${map.column_label === "experts" ? "expert" : "unit"} ${i + 1}`);
  const list = order.filter(([value]) => value !== 0).map(([value, i]) => `${name(i)} ${value.toFixed(2)}`).join(", ");
  const end = map.columns || map.column_label === "experts" ? `sum ${sum.toFixed(2)}` : `mean ${(sum / values.length).toFixed(2)}`;
  return `${map.name} of “${visible(token.text)}”: ${list || "nothing"} · ${end}`;
}

// 0 is the paper; blue above it, red below.
const SHADES = {
  light: { none: [255, 255, 255], most: [20, 74, 140], least: [178, 40, 32] },
  dark: { none: [28, 30, 35], most: [150, 200, 255], least: [255, 130, 110] },
};

function shade(value, map) {
  const { none, most, least } = SHADES[isDark() ? "dark" : "light"];
  const share = Math.min(1, Math.abs(value) / Math.max(map.max, -map.min, 1e-9));
  return (value < 0 ? least : most).map((channel, i) => Math.round(none[i] + share * (channel - none[i])));
}

function paint(canvas, rows, map, cell) {
  const columns = rows[0].length;
  canvas.width = columns * cell;
  canvas.height = rows.length * cell;
  const context = canvas.getContext("2d"), image = context.createImageData(columns, rows.length);
  rows.forEach((values, i) => values.forEach((value, j) => image.data.set([...shade(value, map), 255], 4 * (i * columns + j))));
  context.putImageData(image, 0, 0);
}

// The large map with its tokens at two sides, as sharp as the screen.
function label(canvas, map, rows, here) {
  const style = getComputedStyle(canvas), ink = style.color, ratio = devicePixelRatio || 1;
  const short = (token) => { const name = visible(token.text); return [...name].length > 12 ? `${[...name].slice(0, 11).join("")}…` : name; };
  const side = map.rows.map(short), top = map.columns?.map(short) ?? [];
  const letter = 7.3, count = rows[0].length, left = 10 + letter * Math.max(...side.map((name) => [...name].length));
  const room = (canvas.parentElement.clientWidth - 34 - left) / count; // of a column, where nothing is to be scrolled
  const fit = (...most) => Math.floor(Math.min(CELLS[1], HEIGHT / rows.length, ...most));
  const size = canvas.cell = Math.max(CELLS[0], map.columns ? fit(room) : fit());
  const cell = map.columns ? size : Math.max(2, Math.min(size, Math.floor(room)));
  canvas.top = map.columns ? 8 + letter * Math.max(0, ...top.map((name) => [...name].length)) : 22;
  const width = left + cell * count + 2, height = canvas.top + size * rows.length + 2;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  canvas.style.setProperty("width", `${width}px`);
  canvas.style.setProperty("height", `${height}px`);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  context.font = `12px ${style.getPropertyValue("--mono") || "monospace"}`;
  context.textBaseline = "middle";
  rows.forEach((values, i) => {
    context.globalAlpha = 1;
    values.forEach((value, j) => {
      context.fillStyle = `rgb(${shade(value, map).join(" ")})`;
      context.fillRect(left + j * cell, canvas.top + i * size, cell - (cell > 6 ? 1 : 0), size - 1);
    });
    context.fillStyle = ink;
    context.globalAlpha = i === here ? 1 : 0.62;
    context.textAlign = "right";
    context.fillText(side[i], left - 6, canvas.top + i * size + size / 2);
  });
  context.globalAlpha = 0.8;
  context.textAlign = "left";
  if (!map.columns) context.fillText(`${map.column_label} 1 to ${count}`, left, canvas.top - 12);
  top.forEach((name, j) => {
    context.save();
    context.translate(left + j * cell + cell / 2, canvas.top - 4);
    context.rotate(-Math.PI / 2);
    context.textAlign = "left";
    context.fillText(name, 0, 0);
    context.restore();
  });
  context.globalAlpha = 1;
  context.strokeStyle = style.outlineColor;
  context.lineWidth = 2;
  context.strokeRect(left - 1, canvas.top + here * size - 1, cell * count + 1, size + 1);
}
