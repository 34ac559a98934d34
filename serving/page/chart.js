// Curves and points on two axes, as SVG: as wide as there is room, its letters as large as the page's.

import { el, svg } from "./dom.js";

const SIDES = [[1, 0], [-1, 0], [0, -1], [0, 1], [1, -1], [1, 1], [-1, -1], [-1, 1]];
const FAR = [11, 24, 38, 54]; // pixels between a point and its name: the nearest that has room
const LETTER = 6.7, HIGH = 15; // pixels
const MARGIN = { top: 12, right: 16, bottom: 40, left: 52 };

export const COLORS = ["--c0", "--c1", "--c2", "--c3", "--c4", "--c5"];
export const color = (number) => `var(${COLORS[number % COLORS.length]})`;

function scale([low, high], [from, to], log) {
  const f = log ? Math.log : (x) => x;
  const at = f(low), span = f(high) - at || 1;
  return (value) => from + ((f(value) - at) / span) * (to - from);
}

export function ticks([low, high], count, log) {
  if (log) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
      for (const digit of [1, 2, 5]) found.push(digit * 10 ** power);
    }
    let within = found.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
    if (within.length > count) within = within.filter((tick) => /^1/.test(tick.toExponential()));
    while (within.length > count) within = within.filter((_, i) => i % 2 === 0);
    if (within.length > 1) return within;
  }
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((digit) => digit * power >= raw);
  const found = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step / 1e6; tick += step) found.push(Number(tick.toPrecision(12)));
  return found;
}

const label = (value) =>
  Math.abs(value) >= 1e4 ? new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(value) : String(Number(value.toPrecision(4)));

function extent(values, log, pad) {
  const known = values.filter((value) => Number.isFinite(value) && (!log || value > 0));
  if (!known.length) return log ? [1, 10] : [0, 1];
  const low = Math.min(...known), high = Math.max(...known);
  if (log) return [low / (1 + pad * Math.log(high / low + 1.3)), high * (1 + pad * Math.log(high / low + 1.3))];
  const room = (high - low || Math.abs(high) || 1) * pad;
  return [low - room, high + room];
}

// One point for each two pixels: the mean of those that fall there.
function thinned(points, x, width) {
  if (points.length <= width / 2) return points;
  const found = [];
  let bucket = null;
  for (const [across, up] of points) {
    const place = Math.floor(x(across) / 2);
    if (bucket?.place !== place) found.push(bucket = { place, sum: [0, 0], count: 0 });
    bucket.sum[0] += across;
    bucket.sum[1] += up;
    bucket.count++;
  }
  return found.map(({ sum, count }) => [sum[0] / count, sum[1] / count]);
}

// Draws itself anew whenever its place changes its width.
//   series: [{name, color, points: [[x, y]…], thin, dots}], dots: [{x, y, name, color, pressed, on}]
export class Chart {
  constructor(element, title) {
    this.element = element;
    this.title = title;
    this.legend = el("p", { class: "about legend" });
    this.given = null;
    new ResizeObserver(() => this.draw()).observe(element);
  }

  show(given) {
    this.given = given;
    this.draw(true);
  }

  draw(anew) {
    const width = Math.floor(this.element.clientWidth - 34);
    if (!this.given || width < 100 || (!anew && width === this.width)) return;
    this.width = width;
    const { series = [], dots = [], x, y, onHover } = this.given;
    const height = Math.round(Math.min(420, Math.max(260, width * 0.55)));
    const every = [...series.flatMap((one) => one.points), ...dots.map((dot) => [dot.x, dot.y])];
    const across = extent(every.map(([value]) => value), x.log, dots.length ? 0.12 : 0);
    const up = extent(every.map(([, value]) => value), y.log, 0.05);
    const right = width - MARGIN.right, bottom = height - MARGIN.bottom;
    const atX = scale(across, [MARGIN.left, right], x.log), atY = scale(up, [bottom, MARGIN.top], y.log);
    const root = svg("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, width, height, role: dots.length ? "group" : "img", "aria-label": this.title });
    for (const tick of ticks(across, Math.max(3, Math.floor(width / 90)), x.log)) {
      root.append(svg("line", { class: "grid", x1: atX(tick), x2: atX(tick), y1: MARGIN.top, y2: bottom }),
        svg("text", { x: atX(tick), y: bottom + 16, "text-anchor": "middle" }, label(tick)));
    }
    for (const tick of ticks(up, 6, y.log)) {
      root.append(svg("line", { class: "grid", x1: MARGIN.left, x2: right, y1: atY(tick), y2: atY(tick) }),
        svg("text", { x: MARGIN.left - 8, y: atY(tick) + 4, "text-anchor": "end" }, label(tick)));
    }
    root.append(svg("text", { class: "axis", x: (MARGIN.left + right) / 2, y: height - 4, "text-anchor": "middle" }, x.label),
      svg("text", { class: "axis", transform: `translate(12 ${(MARGIN.top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, y.label));
    for (const one of series) {
      const usable = one.points.filter(([a, b]) => Number.isFinite(b) && (!x.log || a > 0) && (!y.log || b > 0));
      const drawn = thinned(usable, atX, width);
      const path = drawn.map(([a, b], i) => `${i ? "L" : "M"}${atX(a).toFixed(1)} ${atY(b).toFixed(1)}`).join("");
      root.append(svg("path", { class: one.thin ? "curve thin" : "curve", d: path, style: { stroke: one.color } }));
      if (one.dots) for (const [a, b] of drawn) root.append(svg("circle", { cx: atX(a), cy: atY(b), r: 3, style: { fill: one.color } }));
    }
    this.#name(root, dots, atX, atY, { left: MARGIN.left, right: width, top: 0, bottom });
    if (onHover) this.#follow(root, across, atX, bottom, onHover);
    // Where the keyboard was, it stays.
    const focused = dots.findIndex((dot) => dot.name === document.activeElement?.dataset?.name);
    this.legend.replaceChildren(...series.filter((one) => one.name).map((one) => {
      const swatch = el("i", { style: { background: one.color } });
      return el("span", {}, swatch, one.name);
    }));
    this.element.replaceChildren(root, this.legend);
    if (focused >= 0) root.querySelectorAll(".dot")[focused].focus();
  }

  // Each point with its name where there is room for it; where there is none, it has its name when it is chosen.
  #name(root, dots, atX, atY, within) {
    const around = (x, y, width, height) => ({ left: x - width / 2, right: x + width / 2, top: y - height / 2, bottom: y + height / 2 });
    const taken = dots.map((dot) => around(atX(dot.x), atY(dot.y), 16, 16));
    const free = (box) => box.left >= within.left && box.right <= within.right && box.top >= within.top && box.bottom <= within.bottom &&
      !taken.some((other) => box.left < other.right && other.left < box.right && box.top < other.bottom && other.top < box.bottom);
    for (const dot of [...dots].sort((a, b) => Boolean(b.pressed) - Boolean(a.pressed))) {
      const cx = atX(dot.x), cy = atY(dot.y), wide = LETTER * dot.name.length + 4;
      const places = FAR.flatMap((far) => SIDES.map(([right, down]) => {
        const x = cx + right * far * (down ? 0.7 : 1), y = cy + down * far;
        return { x, y, far, right, box: around(x + right * wide / 2, y, wide, HIGH) };
      }));
      const place = places.find(({ box }) => free(box));
      if (place) taken.push(place.box);
      const group = svg("g", {
        class: "dot", tabindex: 0, role: "button", "aria-pressed": String(Boolean(dot.pressed)), "aria-label": dot.told, "data-name": dot.name,
        onclick: dot.on,
        onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); dot.on(); } },
      },
      svg("circle", { cx, cy, r: dot.pressed ? 8 : 6.5, style: { fill: dot.color } }),
      svg("title", {}, dot.told),
      place && place.far > FAR[0] ? svg("line", { x1: cx, y1: cy, x2: place.x, y2: place.y }) : null,
      place ? svg("text", { x: place.x, y: place.y + 4, "text-anchor": ["end", "middle", "start"][place.right + 1] }, dot.name) : null);
      root.append(group);
    }
  }

  #follow(root, [low, high], atX, bottom, onHover) {
    const rule = svg("line", { class: "rule", y1: MARGIN.top, y2: bottom, visibility: "hidden" });
    root.append(rule);
    root.addEventListener("pointermove", (event) => {
      const box = root.getBoundingClientRect();
      const share = ((event.clientX - box.left) * (this.width / box.width) - atX(low)) / (atX(high) - atX(low));
      if (share < 0 || share > 1) return;
      const value = this.given.x.log ? low * (high / low) ** share : low + share * (high - low);
      rule.setAttribute("x1", atX(value));
      rule.setAttribute("x2", atX(value));
      rule.setAttribute("visibility", "visible");
      onHover(value);
    });
    root.addEventListener("pointerleave", () => {
      rule.setAttribute("visibility", "hidden");
      onHover(null);
    });
  }
}
