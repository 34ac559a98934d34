// Line and scatter charts in SVG, drawn at the width of their container so that text has the page's size.

import { el, svg } from "./dom.js";

const LABEL_DIRECTIONS = [[1, 0], [-1, 0], [0, -1], [0, 1], [1, -1], [1, 1], [-1, -1], [-1, 1]];
const LABEL_DISTANCES = [11, 24, 38, 54]; // pixels between a point and its label; the first that is free is used
const CHARACTER_WIDTH = 6.7, LABEL_HEIGHT = 15; // pixels
const MARGIN = { top: 12, right: 16, bottom: 40, left: 52 };
const NUM_COLORS = 6; // --series-0 to --series-5

export const seriesColor = (index) => `var(--series-${index % NUM_COLORS})`;

export function scale([low, high], [from, to], log) {
  const f = log ? Math.log : (x) => x;
  const start = f(low), span = f(high) - start || 1;
  return (value) => from + ((f(value) - start) / span) * (to - from);
}

export function ticks([low, high], count, log) {
  if (log) {
    const candidates = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
      for (const digit of [1, 2, 5]) candidates.push(digit * 10 ** power);
    }
    let visible = candidates.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
    if (visible.length > count) visible = visible.filter((tick) => /^1/.test(tick.toExponential()));
    while (visible.length > count) visible = visible.filter((_, i) => i % 2 === 0);
    if (visible.length > 1) return visible;
  }
  const minStep = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(minStep));
  const step = power * [1, 2, 5, 10].find((digit) => digit * power >= minStep);
  const values = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step / 1e6; tick += step) values.push(Number(tick.toPrecision(12)));
  return values;
}

export const tickLabel = (value) =>
  Math.abs(value) >= 1e4 ? new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(value) : String(Number(value.toPrecision(4)));

// The range of an axis: that of its values, padded by a share of it.
function extent(values, log, padding) {
  const valid = values.filter((value) => Number.isFinite(value) && (!log || value > 0));
  if (!valid.length) return log ? [1, 10] : [0, 1];
  const low = Math.min(...valid), high = Math.max(...valid);
  if (log) return [low / (1 + padding * Math.log(high / low + 1.3)), high * (1 + padding * Math.log(high / low + 1.3))];
  const margin = (high - low || Math.abs(high) || 1) * padding;
  return [low - margin, high + margin];
}

function nearestIndex(values, target) {
  const distances = values.map((value) => Math.abs(value - target));
  return distances.indexOf(Math.min(...distances));
}

// Average the points that fall on the same two pixels.
function downsample(points, scaleX, width) {
  if (points.length <= width / 2) return points;
  const buckets = [];
  let bucket = null;
  for (const [x, y] of points) {
    const position = Math.floor(scaleX(x) / 2);
    if (bucket?.position !== position) buckets.push(bucket = { position, sum: [0, 0], count: 0 });
    bucket.sum[0] += x;
    bucket.sum[1] += y;
    bucket.count++;
  }
  return buckets.map(({ sum, count }) => [sum[0] / count, sum[1] / count]);
}

// show({ series, dots, x, y, readout }) draws the chart; it is drawn again when its container is resized.
//   series: [{ name, color, points: [[x, y] …], thin, faint, markers }]
//   dots: [{ x, y, name, color, pressed, description, onClick }], each a button
//   x, y: { label, log }
//   readout(x), if given, makes the values at a point of the curves readable, by pointer and by keyboard: it returns
//     { title, columns: [name …], rows: [{ name, color, values: [text …], points: [[x, y] …] }] }.
export class Chart {
  constructor(element, title) {
    this.element = element;
    this.title = title;
    this.legend = el("p", { class: "hint legend" });
    this.tooltip = el("div", { class: "tooltip", hidden: true, "aria-hidden": "true" });
    this.root = svg("svg", { class: "chart", "aria-label": title });
    this.data = null;
    this.cursor = null; // the x value whose values are shown
    this.positions = []; // the x values of all points, which the cursor can be at
    this.#followPointerAndKeys();
    new ResizeObserver(() => this.#draw(false)).observe(element);
  }

  show(data) {
    this.data = data;
    this.#draw(true);
  }

  #draw(dataChanged) {
    const width = Math.floor(this.element.clientWidth - 34);
    if (!this.data || width < 100 || (!dataChanged && width === this.width)) return;
    this.width = width;
    const { root } = this, { series = [], dots = [], x, y, readout } = this.data;
    const height = Math.round(Math.min(420, Math.max(260, width * 0.55)));
    const points = [...series.flatMap((line) => line.points), ...dots.map((dot) => [dot.x, dot.y])];
    const rangeX = extent(points.map(([value]) => value), x.log, dots.length ? 0.12 : 0);
    const rangeY = extent(points.map(([, value]) => value), y.log, 0.05);
    const right = width - MARGIN.right, bottom = height - MARGIN.bottom;
    const scaleX = scale(rangeX, [MARGIN.left, right], x.log), scaleY = scale(rangeY, [bottom, MARGIN.top], y.log);
    const focused = dots.findIndex((dot) => dot.name === document.activeElement?.dataset?.name);
    const isVisible = ([px, py]) => Number.isFinite(py) && (!x.log || px > 0) && (!y.log || py > 0);
    Object.assign(this, { scaleX, scaleY, bottom, isVisible });
    this.positions = readout ? [...new Set(points.filter(isVisible).map(([value]) => value))].sort((a, b) => a - b) : [];
    const role = dots.length ? "group" : this.positions.length ? "slider" : "img";
    for (const [name, value] of Object.entries({ viewBox: `0 0 ${width} ${height}`, width, height, role })) root.setAttribute(name, value);
    if (role === "slider") root.setAttribute("tabindex", 0);
    else root.removeAttribute("tabindex");
    root.replaceChildren();
    for (const tick of ticks(rangeX, Math.max(3, Math.floor(width / 90)), x.log)) {
      root.append(svg("line", { class: "grid", x1: scaleX(tick), x2: scaleX(tick), y1: MARGIN.top, y2: bottom }),
        svg("text", { x: scaleX(tick), y: bottom + 16, "text-anchor": "middle" }, tickLabel(tick)));
    }
    for (const tick of ticks(rangeY, 6, y.log)) {
      root.append(svg("line", { class: "grid", x1: MARGIN.left, x2: right, y1: scaleY(tick), y2: scaleY(tick) }),
        svg("text", { x: MARGIN.left - 8, y: scaleY(tick) + 4, "text-anchor": "end" }, tickLabel(tick)));
    }
    root.append(svg("text", { class: "axis", x: (MARGIN.left + right) / 2, y: height - 4, "text-anchor": "middle" }, x.label),
      svg("text", { class: "axis", transform: `translate(12 ${(MARGIN.top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, y.label));
    for (const { points, color, thin, faint, markers } of series) {
      const drawn = downsample(points.filter(isVisible), scaleX, width).map(([px, py]) => [scaleX(px), scaleY(py)]);
      const path = drawn.map(([cx, cy], i) => `${i ? "L" : "M"}${cx.toFixed(1)} ${cy.toFixed(1)}`).join("");
      root.append(svg("path", { class: `curve${thin ? " thin" : ""}${faint ? " faint" : ""}`, d: path, style: { stroke: color } }));
      if (markers) for (const [cx, cy] of drawn) root.append(svg("circle", { cx, cy, r: 3, style: { fill: color } }));
    }
    this.#drawDots(root, dots, scaleX, scaleY, { left: MARGIN.left, right: width, top: 0, bottom });
    this.marks = svg("g", {});
    root.append(this.marks);
    this.legend.replaceChildren(...series.filter(({ name }) => name).map(({ name, color }) =>
      el("span", {}, el("i", { style: { background: color } }), name)));
    // The chart keeps its element, and so the focus, when it is drawn again.
    if (root.parentElement !== this.element) this.element.replaceChildren(root, this.legend, this.tooltip);
    if (focused >= 0) root.querySelectorAll(".dot")[focused].focus();
    this.#moveCursor(this.cursor);
  }

  // Draw each dot with a label that overlaps nothing; where there is no room, the label appears when the dot is pressed.
  #drawDots(root, dots, scaleX, scaleY, bounds) {
    const boxAround = (x, y, width, height) => ({ left: x - width / 2, right: x + width / 2, top: y - height / 2, bottom: y + height / 2 });
    const occupied = dots.map((dot) => boxAround(scaleX(dot.x), scaleY(dot.y), 16, 16));
    const isFree = (box) => box.left >= bounds.left && box.right <= bounds.right && box.top >= bounds.top && box.bottom <= bounds.bottom &&
      !occupied.some((other) => box.left < other.right && other.left < box.right && box.top < other.bottom && other.top < box.bottom);
    for (const dot of [...dots].sort((a, b) => Boolean(b.pressed) - Boolean(a.pressed))) {
      const cx = scaleX(dot.x), cy = scaleY(dot.y), width = CHARACTER_WIDTH * dot.name.length + 4;
      const positions = LABEL_DISTANCES.flatMap((distance) => LABEL_DIRECTIONS.map(([right, down]) => {
        const x = cx + right * distance * (down ? 0.7 : 1), y = cy + down * distance;
        return { x, y, distance, anchor: ["end", "middle", "start"][right + 1], box: boxAround(x + right * width / 2, y, width, LABEL_HEIGHT) };
      }));
      const label = positions.find(({ box }) => isFree(box));
      if (label) occupied.push(label.box);
      root.append(svg("g", {
        class: "dot", tabindex: 0, role: "button", "aria-pressed": String(Boolean(dot.pressed)), "aria-label": dot.description, "data-name": dot.name,
        onclick: dot.onClick,
        onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); dot.onClick(); } },
      },
      svg("circle", { cx, cy, r: dot.pressed ? 8 : 6.5, style: { fill: dot.color } }),
      svg("title", {}, dot.description),
      label && label.distance > LABEL_DISTANCES[0] ? svg("line", { x1: cx, y1: cy, x2: label.x, y2: label.y }) : null,
      label ? svg("text", { x: label.x, y: label.y + 4, "text-anchor": label.anchor }, dot.name) : null));
    }
  }

  // Show the values at the position nearest to an x value; none for null.
  #moveCursor(value) {
    const { root, tooltip, positions, data, scaleX, scaleY } = this;
    const index = value === null || !positions.length ? -1 : nearestIndex(positions, value);
    this.cursor = index < 0 ? null : positions[index];
    this.marks.replaceChildren();
    tooltip.hidden = index < 0;
    if (!positions.length) return;
    const { title, columns, rows } = data.readout(this.cursor ?? positions.at(-1));
    const texts = rows.map(({ name, values }) => `${name}: ${values.map((text, i) => `${columns[i]} ${text}`).join(", ")}`);
    const aria = { valuemin: positions[0], valuemax: positions.at(-1), valuenow: this.cursor ?? positions.at(-1), valuetext: [title, ...texts].join("; ") };
    for (const [name, text] of Object.entries(aria)) root.setAttribute(`aria-${name}`, text);
    if (index < 0) return;
    const cx = scaleX(this.cursor);
    this.marks.append(svg("line", { class: "ruler", x1: cx, x2: cx, y1: MARGIN.top, y2: this.bottom }));
    for (const { color, points } of rows) {
      for (const [px, py] of points.filter(this.isVisible)) this.marks.append(svg("circle", { class: "mark", cx: scaleX(px), cy: scaleY(py), r: 4, style: { fill: color } }));
    }
    const cells = ({ name, color, values }) => [el("th", { scope: "row" }, el("i", { style: { background: color } }), name), values.map((text) => el("td", {}, text))];
    tooltip.replaceChildren(el("table", {},
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, title), columns.map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, rows.map((row) => el("tr", {}, ...cells(row))))));
    // Beside the ruler, on the side that has more room, and within the panel.
    const room = this.element.clientWidth - tooltip.offsetWidth - 4;
    const offset = root.getBoundingClientRect().left - this.element.getBoundingClientRect().left;
    const left = cx > this.width / 2 ? offset + cx - tooltip.offsetWidth - 10 : offset + cx + 10;
    tooltip.style.setProperty("left", `${Math.max(4, Math.min(room, left))}px`);
  }

  #followPointerAndKeys() {
    const { root } = this;
    const follow = (event) => {
      if (!this.positions.length) return;
      const box = root.getBoundingClientRect(), px = (event.clientX - box.left) * (this.width / box.width);
      const distances = this.positions.map((value) => Math.abs(this.scaleX(value) - px));
      this.#moveCursor(this.positions[distances.indexOf(Math.min(...distances))]);
    };
    root.addEventListener("pointermove", follow);
    root.addEventListener("pointerdown", follow);
    root.addEventListener("pointerleave", () => { if (this.data && document.activeElement !== root) this.#moveCursor(null); });
    root.addEventListener("focus", () => { if (this.cursor === null) this.#moveCursor(this.positions.at(-1) ?? null); });
    root.addEventListener("blur", () => this.#moveCursor(null));
    root.addEventListener("keydown", (event) => {
      const last = this.positions.length - 1, page = Math.max(1, Math.round(last / 10));
      if (last < 0) return;
      const index = this.cursor === null ? last : nearestIndex(this.positions, this.cursor);
      const next = {
        ArrowRight: index + 1, ArrowUp: index + 1, ArrowLeft: index - 1, ArrowDown: index - 1,
        PageUp: index + page, PageDown: index - page, Home: 0, End: last,
      }[event.key];
      if (event.key === "Escape") this.#moveCursor(null);
      if (next === undefined) return;
      event.preventDefault();
      this.#moveCursor(this.positions[Math.max(0, Math.min(last, next))]);
    });
  }
}
