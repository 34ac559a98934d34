// Entry point: shows the view that is named in the address (#view, or #view-detail), and switches the theme.

import { get } from "./api.js";
import { compare } from "./compare.js";
import { docs } from "./docs.js";
import { $, $$, isDark, systemDark } from "./dom.js";
import { ladder } from "./ladder.js";
import { learn } from "./learn.js";
import { playground } from "./playground.js";
import { runs } from "./runs.js";
import { xray } from "./xray.js";

// A view's function is called once, with the models; its result's `onShow` whenever the view is shown,
// with the detail.
const VIEWS = { learn, playground, compare, xray, ladder, runs, docs };
const MODEL_VIEWS = ["playground", "compare", "xray"];
const views = {};
let models = [];

function notify(message) {
  const notice = $("#notice");
  notice.textContent = message;
  notice.hidden = !message;
}

async function show() {
  const [view, detail] = location.hash.slice(1).split("-"), name = Object.hasOwn(VIEWS, view) ? view : "playground";
  for (const link of $$("header a")) {
    if (link.hash === `#${name}`) {
      link.setAttribute("aria-current", "page");
      link.scrollIntoView({ block: "nearest", inline: "nearest" }); // on a phone the links scroll
    } else link.removeAttribute("aria-current");
  }
  for (const section of $$("main > section")) section.hidden = section.id !== name;
  document.title = `tinygpt: ${name}`;
  if (MODEL_VIEWS.includes(name) && !models.length) return;
  try {
    views[name] ??= VIEWS[name](models);
    await views[name].onShow?.(detail);
  } catch (error) {
    notify(error.message);
  }
}

// The server accepts requests before its models are loaded.
async function loadModels() {
  try {
    models = (await get("v1/models")).data;
    notify(models.length ? "" : "Loading models …");
  } catch (error) {
    notify(error.message);
  }
  if (models.length) show();
  else setTimeout(loadModels, 1000);
}

function setUpTheme() {
  const root = document.documentElement, storageKey = "tinygpt-theme", stored = localStorage.getItem(storageKey);
  const onChange = () => dispatchEvent(new Event("themechange"));
  if (stored) root.dataset.theme = stored;
  $("#theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    localStorage.setItem(storageKey, root.dataset.theme);
    onChange();
  });
  systemDark.addEventListener("change", onChange);
}

setUpTheme();
addEventListener("hashchange", show);
show();
loadModels();
