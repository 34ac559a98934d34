// Drawings of the lessons in SVG, at the width of their container so that text has the page's size.

import { scale, tickLabel, ticks } from "./chart.js";
import { el, svg } from "./dom.js";

const MARGIN = { top: 10, right: 14, bottom: 40, left: 50 };
const CHARACTER_WIDTH = 7.5; // pixels, at most, of the 12 pixel font

// A plot of curves and points in fixed ranges; what lies beyond them is cut off.
//   x, y: { label, range: [low, high], log }, without a label also without a scale; title: what a screen reader says of the drawing
export class Plot {
  constructor(width, title, { x, y, height = Math.round(Math.min(320, Math.max(220, width * 0.5))) }) {
    const right = width - MARGIN.right, bottom = height - MARGIN.bottom;
    this.x = scale(x.range, [MARGIN.left, right], x.log);
    this.y = scale(y.range, [bottom, MARGIN.top], y.log);
    this.root = svg("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": title });
    for (const tick of x.label ? ticks(x.range, Math.max(3, Math.floor(width / 90)), x.log) : []) {
      this.root.append(svg("line", { class: "grid", x1: this.x(tick), x2: this.x(tick), y1: MARGIN.top, y2: bottom }),
        svg("text", { x: this.x(tick), y: bottom + 16, "text-anchor": "middle" }, tickLabel(tick)));
    }
    for (const tick of y.label ? ticks(y.range, 5, y.log) : []) {
      this.root.append(svg("line", { class: "grid", x1: MARGIN.left, x2: right, y1: this.y(tick), y2: this.y(tick) }),
        svg("text", { x: MARGIN.left - 7, y: this.y(tick) + 4, "text-anchor": "end" }, tickLabel(tick)));
    }
    this.root.append(svg("text", { class: "axis", x: (MARGIN.left + right) / 2, y: height - 5, "text-anchor": "middle" }, x.label ?? ""),
      svg("text", { class: "axis", transform: `translate(12 ${(MARGIN.top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, y.label ?? ""));
    // The nested viewport cuts marks off; its coordinates are those of the whole drawing.
    const size = { x: MARGIN.left, y: MARGIN.top, width: right - MARGIN.left, height: bottom - MARGIN.top };
    this.area = svg("svg", { ...size, viewBox: `${size.x} ${size.y} ${size.width} ${size.height}` });
    this.root.append(this.area);
    this.names = [];
  }

  #name(name, color) {
    if (name) this.names.push(el("span", {}, el("i", { style: { background: color } }), name));
  }

  line(points, color, { name, dashed = false, thickness = 2 } = {}) {
    const valid = points.filter(([x, y]) => Number.isFinite(this.x(x)) && Number.isFinite(this.y(y)));
    const d = valid.map(([x, y], i) => `${i ? "L" : "M"}${this.x(x).toFixed(1)} ${this.y(y).toFixed(1)}`).join("");
    this.area.append(svg("path", { class: "curve", d, "stroke-dasharray": dashed ? "5 4" : null, style: { stroke: color, "stroke-width": thickness } }));
    this.#name(name, color);
    return this;
  }

  // The curve of a function over a range, in 120 pieces.
  curve(f, [low, high], color, options) {
    return this.line(Array.from({ length: 121 }, (_, i) => low + (i / 120) * (high - low)).map((x) => [x, f(x)]), color, options);
  }

  dots(points, color, { name, radius = 4 } = {}) {
    for (const [x, y] of points) {
      if (Number.isFinite(y)) this.area.append(svg("circle", { cx: this.x(x), cy: this.y(y), r: radius, style: { fill: color } }));
    }
    this.#name(name, color);
    return this;
  }

  text(x, y, text, { anchor = "middle", shift = [0, 0] } = {}) {
    this.area.append(svg("text", { class: "mark", x: this.x(x) + shift[0], y: this.y(y) + shift[1], "text-anchor": anchor }, text));
    return this;
  }

  get element() {
    return el("div", {}, this.root, this.names.length ? el("p", { class: "hint legend" }, this.names) : null);
  }
}

// Horizontal bars with their names and values: rows of { name, value, text, color }.
export function bars(width, title, rows, [low, high] = [0, 1]) {
  const rowHeight = 26, height = rows.length * rowHeight + 4, longest = (texts) => Math.max(...texts.map((text) => text.length));
  const left = 12 + CHARACTER_WIDTH * longest(rows.map(({ name }) => name));
  const right = width - 10 - CHARACTER_WIDTH * longest(rows.map(({ text }) => text)), x = scale([low, high], [left, right]);
  const root = svg("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `${title}: ${rows.map(({ name, text }) => `${name} ${text}`).join(", ")}` });
  rows.forEach(({ name, value, text, color = "var(--series-0)" }, i) => {
    const middle = i * rowHeight + rowHeight / 2, end = x(Math.min(high, Math.max(low, value)));
    root.append(
      svg("text", { class: "mark", x: left - 8, y: middle + 4, "text-anchor": "end" }, name),
      svg("rect", { x: Math.min(x(0), end), y: middle - 8, width: Math.max(1, Math.abs(end - x(0))), height: 16, rx: 2, style: { fill: color } }),
      svg("text", { class: "mark", x: right + 8, y: middle + 4 }, text));
  });
  root.append(svg("line", { class: "zero", x1: x(0), x2: x(0), y1: 0, y2: height }));
  return root;
}

// A table of weights between 0 and 1 as shaded cells.
export function heat(width, title, { rows, columns, values }) {
  const longest = Math.max(...rows.map((name) => name.length)), left = 12 + CHARACTER_WIDTH * longest, top = 22;
  const cell = (width - left) / columns.length, cellHeight = Math.min(40, cell), height = top + rows.length * cellHeight;
  const describe = (row, i) => `${row}: ${columns.map((column, j) => `${column} ${values[i][j].toFixed(2)}`).join(", ")}`;
  const root = svg("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `${title}. ${rows.map(describe).join("; ")}` });
  columns.forEach((name, j) => root.append(svg("text", { class: "mark", x: left + (j + 0.5) * cell, y: 14, "text-anchor": "middle" }, name)));
  rows.forEach((name, i) => {
    const y = top + i * cellHeight;
    root.append(svg("text", { class: "mark", x: left - 8, y: y + cellHeight / 2 + 4, "text-anchor": "end" }, name));
    values[i].forEach((value, j) => root.append(
      svg("rect", { class: "cell", x: left + j * cell + 1, y: y + 1, width: cell - 2, height: cellHeight - 2, rx: 3, style: { "--weight": value.toFixed(3) } }),
      svg("text", { class: "mark", x: left + (j + 0.5) * cell, y: y + cellHeight / 2 + 4, "text-anchor": "middle" }, value === 0 ? "0" : value.toFixed(2))));
  });
  return root;
}
