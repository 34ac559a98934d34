// Elements, in one line each. Text is always text: nothing here parses HTML.

const SVG = "http://www.w3.org/2000/svg";

export const $ = (selector, within = document) => within.querySelector(selector);
export const all = (selector, within = document) => [...within.querySelectorAll(selector)];

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, to] of Object.entries(value)) element.style.setProperty(key, to);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child != null));
  return element;
}

export const el = (tag, attributes = {}, ...children) => filled(document.createElement(tag), attributes, children);
export const svg = (tag, attributes = {}, ...children) => filled(document.createElementNS(SVG, tag), attributes, children);

// Which of the two looks is in view: the one chosen here, or else the system's.
export const system = matchMedia("(prefers-color-scheme: dark)");
export const isDark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";

// Numbers as people read them.
export const long = (number) => number.toLocaleString("en");
export const percent = (share) =>
  share >= 0.9995 ? "100%" : share >= 0.1 ? `${(100 * share).toFixed(1)}%` : share >= 1e-4 ? `${(100 * share).toPrecision(2)}%` : share > 0 ? "<0.01%" : "0";
export const clock = (seconds) =>
  seconds < 60 ? `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`
    : seconds < 3600 ? `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`
      : `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;

// Paragraphs, lists, and equations that stand indented: as docstrings have them.
export const prose = (text) => text.split(/\n\s*\n/).map((block) => {
  const inline = (line) => line.split("`").map((part, i) => (i % 2 ? el("code", {}, part) : part));
  if (/^ {4}/.test(block)) {
    const lines = block.replace(/^ {4}/gm, "").replace(/ {8,}/g, "   ");
    return el("pre", { class: "equation", tabindex: 0, role: "group", "aria-label": "What it computes" }, lines);
  }
  if (/^- /.test(block)) return el("ul", {}, block.split(/^- /m).slice(1).map((item) => el("li", {}, inline(item.trim()))));
  return el("p", {}, inline(block.replaceAll("\n", " ")));
});

// What a token is, for the eye: spaces and line ends as signs.
const SIGNS = { " ": "·", "\n": "↵", "\t": "⇥", "\r": "␍" };
export const visible = (text) => text.replace(/[ \n\t\r]/g, (letter) => SIGNS[letter]) || "∅";

// A function that runs once at a time; of the calls meanwhile only the last counts.
export function latest(work) {
  let running = false, next = null;
  return async function call(...given) {
    if (running) { next = given; return; }
    running = true;
    try { await work(...given); } finally {
      running = false;
      if (next) { const again = next; next = null; call(...again); }
    }
  };
}
