// Play: a text, token by token, and what else it could have been.

import { asCurl, asPython } from "./api.js";
import { $, all } from "./dom.js";
import { Knobs, choice, keys } from "./knobs.js";
import { Next } from "./next.js";
import { TokenView } from "./tokens.js";
import { Writing } from "./writing.js";

export function play(models) {
  const section = $("#play"), prompt = $("#play-prompt"), go = $("#play-go"), stop = $("#play-stop");
  const next = new Next($("#play-next"));
  let asked = { prompt: "" }; // what the text in view was asked with
  const knobs = new Knobs($("[data-knobs]", section), () => look());
  const view = new TokenView($("#play-text"), () => look());
  const writing = new Writing(view, $("#play-figures"), () => {
    stop.disabled = !writing.running;
    look();
  });
  const chosen = choice($("#play-form"), models, () => {
    asked = { prompt: prompt.value };
    if (!writing.running) view.begin(prompt.value);
    look();
  });

  // The candidates where one looks; the prompt is the one in view.
  function look() {
    if (section.hidden || (writing.running && view.here === view.tokens.length)) return;
    next.show({ ...asked, model: chosen().id, ...knobs.sampling, tokens: view.ids.slice(0, view.here) }, view.tokens[view.here]);
  }

  function write() {
    asked = { prompt: prompt.value };
    writing.run({ model: chosen().id, ...asked, ...knobs.request });
  }

  prompt.addEventListener("input", () => {
    if (writing.running) return;
    asked = { prompt: prompt.value };
    view.begin(prompt.value);
    look();
  });
  go.addEventListener("click", write);
  stop.addEventListener("click", () => writing.stop());
  keys(section, write, () => writing.stop());
  for (const button of all("[data-copy]", section)) {
    const told = button.textContent;
    button.addEventListener("click", async () => {
      const body = { model: chosen().id, prompt: prompt.value, ...knobs.request };
      const text = { curl: asCurl, python: asPython }[button.dataset.copy](body);
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "Copied";
      } catch {
        button.textContent = "The browser forbids it";
      }
      setTimeout(() => { button.textContent = told; }, 1500);
    });
  }
  return { shown: look };
}
