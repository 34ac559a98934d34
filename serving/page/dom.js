// Query and create elements. Strings become text nodes; nothing here parses HTML.

const SVG = "http://www.w3.org/2000/svg";

export const $ = (selector, root = document) => root.querySelector(selector);
export const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

function initialize(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [property, setting] of Object.entries(value)) element.style.setProperty(property, setting);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child != null));
  return element;
}

export const el = (tag, attributes = {}, ...children) => initialize(document.createElement(tag), attributes, children);
export const svg = (tag, attributes = {}, ...children) => initialize(document.createElementNS(SVG, tag), attributes, children);

// The theme chosen on this page, or else the system's.
export const systemDark = matchMedia("(prefers-color-scheme: dark)");
export const isDark = () => (document.documentElement.dataset.theme ?? (systemDark.matches ? "dark" : "light")) === "dark";

// Render a docstring: paragraphs, lists, indented equations and `code`.
export const prose = (text) => text.split(/\n\s*\n/).map((block) => {
  const inline = (line) => line.split("`").map((span, i) => (i % 2 ? el("code", {}, span) : span));
  if (/^ {4}/.test(block)) {
    const lines = block.replace(/^ {4}/gm, "").replace(/ {8,}/g, "   ");
    return el("pre", { class: "equation", tabindex: 0, role: "group", "aria-label": "Equation" }, lines);
  }
  if (/^- /.test(block)) return el("ul", {}, block.split(/^- /m).slice(1).map((item) => el("li", {}, inline(item.trim()))));
  return el("p", {}, inline(block.replaceAll("\n", " ")));
});

// Wrap an async function so that calls never overlap; of the calls made while one runs, only the last is executed.
export function coalesce(task) {
  let running = false, pending = null;
  return async function call(...args) {
    if (running) { pending = args; return; }
    running = true;
    try { await task(...args); } finally {
      running = false;
      if (pending) { const next = pending; pending = null; call(...next); }
    }
  };
}
