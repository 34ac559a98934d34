// The page: five views of one server, chosen by the address's #part.

import { get } from "./api.js";
import { compare } from "./compare.js";
import { docs } from "./docs.js";
import { $, all, isDark, system } from "./dom.js";
import { ladder } from "./ladder.js";
import { play } from "./play.js";
import { runs } from "./runs.js";
import { xray } from "./xray.js";

const VIEWS = { play, compare, xray, ladder, runs, docs };
const begun = {};
let models = [];

function tell(message) {
  const notice = $("#notice");
  notice.textContent = message;
  notice.hidden = !message;
}

async function show() {
  const name = location.hash.slice(1) in VIEWS ? location.hash.slice(1) : "play";
  for (const link of all("header a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  for (const section of all("main > section")) section.hidden = section.id !== name;
  document.title = `tinygpt: ${name}`;
  const needsModels = !["ladder", "runs", "docs"].includes(name);
  if (needsModels && !models.length) return;
  try {
    begun[name] ??= VIEWS[name](models);
    await begun[name].shown?.();
  } catch (error) {
    tell(error.message);
  }
}

// The server answers before its models are loaded.
async function load() {
  try {
    models = (await get("v1/models")).data;
    tell(models.length ? "" : "The server is loading its models.");
  } catch (error) {
    tell(error.message);
  }
  if (models.length) show();
  else setTimeout(load, 1000);
}

function theme() {
  const root = document.documentElement, store = "tinygpt-theme", kept = localStorage.getItem(store);
  const changed = () => dispatchEvent(new Event("themechange"));
  if (kept) root.dataset.theme = kept;
  $("#theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    localStorage.setItem(store, root.dataset.theme);
    changed();
  });
  system.addEventListener("change", changed);
}

theme();
addEventListener("hashchange", show);
show();
load();
