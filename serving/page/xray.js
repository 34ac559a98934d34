// X-ray: attention weights, alignments, gates and expert activations of a text, by layer and head.

import { ApiError, post } from "./api.js";
import { addShortcuts, modelSelect } from "./controls.js";
import { $, $$, coalesce, el, isDark } from "./dom.js";
import { visible } from "./format.js";
import { nearest } from "./nearest.js";

const EXAMPLE = "The cat sat on the mat because the cat was tired.";
const MIN_CELL = 15, MAX_CELL = 28, PREFERRED_HEIGHT = 420; // pixels of a row of the heatmap, and of all rows

export function xray(models) {
  const section = $("#xray"), form = $("#xray-form"), text = $("#xray-text"), translation = $("#xray-translation"), result = $("#xray-result");
  const { map: mapSelect, layer: layerSelect, head: headSelect } = form.elements;
  let response = null, request = null, row = 0, updateSelection = null, example = null;
  const model = modelSelect(form, models, () => {
    updateFields();
    run();
  });
  nearest(model);

  function updateFields() {
    $("#xray-translation-field").hidden = !model().translates;
    if (example !== null && text.value !== example) return; // a text of the user's own
    text.value = example = exampleFor(model());
    translation.value = "";
  }

  const run = coalesce(async () => {
    request = { model: model().id, prompt: text.value };
    if (model().translates && translation.value) request.translation = translation.value;
    result.replaceChildren(el("p", { class: "hint", role: "status" }, "Analyzing …"));
    try {
      response = await fetchMaps();
    } catch (error) {
      showError(error);
      return;
    }
    setOptions(mapSelect, response.maps.map(({ name }) => name));
    row = currentMap().rows.length - 1;
    showMap();
  });

  function showError(error) {
    response = updateSelection = null;
    for (const select of [mapSelect, layerSelect, headSelect]) setOptions(select, []);
    result.replaceChildren(el("div", { class: "error-box", role: "alert" }, error.message));
  }

  // Fetch all layers; if those are more numbers than the server sends, one layer.
  async function fetchMaps() {
    try {
      return await post("v1/xray", request);
    } catch (error) {
      if (!(error instanceof ApiError && error.status === 400 && /layer/.test(error.message))) throw error;
      return post("v1/xray", { ...request, layer: Number(layerSelect.value) || 0 });
    }
  }

  const currentMap = () => response.maps[Number(mapSelect.value)];
  const currentWeights = () => currentMap().weights[Number(layerSelect.value) - currentMap().first_layer][Number(headSelect.value)];

  // Replace the options, and keep the selected index if it still exists. Without a choice the list is hidden.
  function setOptions(select, labels) {
    const index = Number(select.value);
    select.replaceChildren(...labels.map((label, i) => el("option", { value: i }, label)));
    select.value = index < labels.length ? index : 0;
    select.parentElement.hidden = labels.length < 2;
  }

  function showMap() {
    const { num_layers: numLayers, num_heads: numHeads } = currentMap();
    setOptions(layerSelect, Array.from({ length: numLayers }, (_, i) => `Layer ${i + 1}`));
    setOptions(headSelect, Array.from({ length: numHeads }, (_, i) => `Head ${i + 1}`));
    draw();
  }

  async function changeLayer() {
    const index = Number(layerSelect.value) - currentMap().first_layer;
    if (index < 0 || index >= currentMap().weights.length) {
      try {
        response = await post("v1/xray", { ...request, layer: Number(layerSelect.value) });
      } catch (error) {
        showError(error);
        return;
      }
    }
    draw();
  }

  function draw() {
    const map = currentMap(), { rows, columns } = map;
    row = Math.min(row, rows.length - 1);
    const isSelfAttention = columns && columns.length === rows.length && columns.every((token, i) => token.id === rows[i].id);
    const source = columns && !isSelfAttention ? tokenLine(columns, "Attended tokens") : null;
    const target = tokenLine(rows, "Tokens: use the arrow keys to select one");
    target.tabIndex = 0;
    const summary = el("p", { class: "stats", role: "status", id: "xray-summary" });
    const heatmap = el("canvas", { role: "img", "aria-label": `${map.name}: rows are tokens, columns are ${columns ? "attended tokens" : map.column_label}` });
    const panel = el("div", { class: "panel scroll-x", tabindex: 0, role: "group", "aria-label": "Heatmap" }, heatmap);
    const overview = overviewGrid(map);
    result.replaceChildren(...[source, target, summary].filter(Boolean), el("div", { class: "overview" }, overview, panel));

    const selectRow = (index) => { row = index; updateSelection(); };
    const onPointer = ({ target: span }) => { if (span.position !== undefined && span.parentElement === target) selectRow(span.position); };
    target.addEventListener("pointerover", onPointer);
    target.addEventListener("click", onPointer);
    target.addEventListener("keydown", (event) => {
      const index = { ArrowRight: row + 1, ArrowLeft: row - 1, Home: 0, End: rows.length - 1 }[event.key];
      if (index === undefined) return;
      event.preventDefault();
      selectRow(Math.max(0, Math.min(rows.length - 1, index)));
    });
    heatmap.addEventListener("pointermove", (event) => {
      const index = Math.floor((event.offsetY - heatmap.top) / heatmap.cellHeight);
      if (index >= 0 && index < rows.length && index !== row) selectRow(index);
    });

    // Show the selected layer, head and row.
    updateSelection = () => {
      const weights = currentWeights();
      for (const button of $$("button", overview)) {
        button.setAttribute("aria-pressed", String(button.dataset.layer === layerSelect.value && button.dataset.head === headSelect.value));
      }
      drawHeatmap(heatmap, map, weights, row);
      const strengths = columns ? weights[row] : weights.map((values) => values.reduce((sum, value) => sum + value, 0) / values.length);
      const largest = Math.max(...strengths.map(Math.abs), 1e-9);
      [...(source ?? target).children].forEach((span, i) => span.style.setProperty("--weight", Math.max(0, (strengths[i] ?? 0) / largest).toFixed(3)));
      [...target.children].forEach((span, i) => span.classList.toggle("selected", i === row));
      summary.textContent = summarizeRow(map, weights[row], rows[row]);
    };
    updateSelection();
  }

  // A thumbnail button for each layer and head; with several heads, a row for each layer.
  function overviewGrid(map) {
    const hasHeads = map.num_heads > 1;
    const grid = el("div", {
      class: "maps", role: "group", "aria-label": "Layers and heads", hidden: map.weights.length * map.weights[0].length <= 1,
      style: { "--columns": hasHeads ? map.num_heads + 1 : map.num_layers },
    });
    if (grid.hidden) return grid;
    const label = (name, index) => el("span", { "aria-hidden": "true" }, `${name} ${index + 1}`);
    if (hasHeads) grid.append(el("span"), ...map.weights[0].map((_, head) => label("head", head)));
    map.weights.forEach((heads, i) => heads.forEach((weights, head) => {
      const layer = map.first_layer + i, canvas = el("canvas", { "aria-hidden": "true" });
      if (hasHeads && head === 0) grid.append(label("layer", layer));
      grid.append(el("button", {
        type: "button", "aria-pressed": "false", "data-layer": layer, "data-head": head,
        "aria-label": `layer ${layer + 1}${hasHeads ? `, head ${head + 1}` : ""}`,
        onclick: () => { layerSelect.value = layer; headSelect.value = head; updateSelection(); },
      }, canvas, hasHeads ? null : label("layer", layer)));
      drawThumbnail(canvas, weights, map);
    }));
    return grid;
  }

  form.addEventListener("submit", (event) => event.preventDefault());
  mapSelect.addEventListener("change", showMap);
  layerSelect.addEventListener("change", changeLayer);
  headSelect.addEventListener("change", () => updateSelection?.());
  $("#xray-run").addEventListener("click", run);
  addShortcuts(section, run);
  addEventListener("themechange", () => response && draw());
  for (const select of [mapSelect, layerSelect, headSelect]) setOptions(select, []);
  updateFields();
  // The example is analyzed at once, so that there is something to look at.
  return { onShow: () => { if (!request) run(); } };
}

// As much of the example as fits the model's context; a translation needs as much again. A token has at least one character.
function exampleFor({ max_model_len: maxLength, translates }) {
  const limit = maxLength === null ? Infinity : (translates ? maxLength / 2 : maxLength) - 1;
  return EXAMPLE.length <= limit ? EXAMPLE : EXAMPLE.slice(0, EXAMPLE.lastIndexOf(" ", limit));
}

function tokenLine(tokens, label) {
  return el("div", { class: "tokens weighted", role: "group", "aria-label": label }, tokens.map(({ text }, i) => {
    const span = el("span", { class: text.startsWith("\n") ? "token newline" : "token" }, text || visible(text));
    span.position = i;
    return span;
  }));
}

function summarizeRow(map, values, token) {
  const largest = values.map((value, i) => [value, i]).sort((a, b) => Math.abs(b[0]) - Math.abs(a[0])).slice(0, 4);
  const sum = values.reduce((total, value) => total + value, 0);
  const name = (i) => (map.columns ? `“${visible(map.columns[i].text)}”` : `${map.column_label === "experts" ? "expert" : "unit"} ${i + 1}`);
  const list = largest.filter(([value]) => value !== 0).map(([value, i]) => `${name(i)} ${value.toFixed(2)}`).join(", ");
  const total = map.columns || map.column_label === "experts" ? `sum ${sum.toFixed(2)}` : `mean ${(sum / values.length).toFixed(2)}`;
  return `${map.name} of “${visible(token.text)}”: ${list || "all zero"} · ${total}`;
}

// RGB: 0 is the background; positive values are blue, negative ones red.
const COLORS = {
  light: { zero: [255, 255, 255], positive: [20, 74, 140], negative: [178, 40, 32] },
  dark: { zero: [28, 30, 35], positive: [150, 200, 255], negative: [255, 130, 110] },
};

function cellColor(value, map) {
  const { zero, positive, negative } = COLORS[isDark() ? "dark" : "light"];
  const share = Math.min(1, Math.abs(value) / Math.max(map.max, -map.min, 1e-9));
  return (value < 0 ? negative : positive).map((channel, i) => Math.round(zero[i] + share * (channel - zero[i])));
}

// One pixel for each value; CSS scales it.
function drawThumbnail(canvas, rows, map) {
  canvas.width = rows[0].length;
  canvas.height = rows.length;
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
  rows.forEach((values, i) => values.forEach((value, j) => image.data.set([...cellColor(value, map), 255], 4 * (i * canvas.width + j))));
  context.putImageData(image, 0, 0);
}

// The weights with token labels at two sides, at the screen's resolution.
function drawHeatmap(canvas, map, rows, selectedRow) {
  const style = getComputedStyle(canvas), ink = style.color, ratio = devicePixelRatio || 1;
  const shorten = (token) => { const name = visible(token.text); return [...name].length > 12 ? `${[...name].slice(0, 11).join("")}…` : name; };
  const rowLabels = map.rows.map(shorten), columnLabels = map.columns?.map(shorten) ?? [];
  const labelWidth = (labels) => 7.3 * Math.max(0, ...labels.map((label) => [...label].length));
  const numColumns = rows[0].length, left = 10 + labelWidth(rowLabels);
  const columnWidth = (canvas.parentElement.clientWidth - 34 - left) / numColumns; // at which nothing needs scrolling
  // Cells are square where columns are tokens; else they are as narrow as needed.
  const preferred = Math.floor(Math.min(MAX_CELL, PREFERRED_HEIGHT / rows.length, map.columns ? columnWidth : Infinity));
  const cellHeight = canvas.cellHeight = Math.max(MIN_CELL, preferred);
  const cellWidth = map.columns ? cellHeight : Math.max(2, Math.min(cellHeight, Math.floor(columnWidth)));
  const top = canvas.top = map.columns ? 8 + labelWidth(columnLabels) : 22;
  const width = left + cellWidth * numColumns + 2, height = top + cellHeight * rows.length + 2;
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
      context.fillStyle = `rgb(${cellColor(value, map).join(" ")})`;
      context.fillRect(left + j * cellWidth, top + i * cellHeight, cellWidth - (cellWidth > 6 ? 1 : 0), cellHeight - 1);
    });
    context.fillStyle = ink;
    context.globalAlpha = i === selectedRow ? 1 : 0.62;
    context.textAlign = "right";
    context.fillText(rowLabels[i], left - 6, top + i * cellHeight + cellHeight / 2);
  });
  context.globalAlpha = 0.8;
  context.textAlign = "left";
  if (!map.columns) context.fillText(`${map.column_label} 1 to ${numColumns}`, left, top - 12);
  columnLabels.forEach((label, j) => {
    context.save();
    context.translate(left + j * cellWidth + cellWidth / 2, top - 4);
    context.rotate(-Math.PI / 2);
    context.fillText(label, 0, 0);
    context.restore();
  });
  context.globalAlpha = 1;
  context.strokeStyle = style.outlineColor;
  context.lineWidth = 2;
  context.strokeRect(left - 1, top + selectedRow * cellHeight - 1, cellWidth * numColumns + 1, cellHeight + 1);
}
