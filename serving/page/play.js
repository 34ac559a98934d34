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
  const knobs = new Knobs($("[data-knobs]", section), () => look());
  const view = new TokenView($("#play-text"), () => look());
  const writing = new Writing(view, $("#play-figures"), () => {
    stop.disabled = !writing.running;
    look();
  });
  const chosen = choice($("#play-form"), models, () => {
    if (!writing.running) begin();
    look();
  });

  function begin() {
    view.begin(prompt.value, chosen());
  }

  // The candidates where one looks; the prompt is that of the text in view.
  function look() {
    if (section.hidden || (writing.running && view.here === view.tokens.length)) return;
    const { token, tokens } = view.look;
    const { id: model, translates } = chosen();
    const asked = { prompt: view.prompt, model, ...knobs.sampling, tokens };
    next.show(translates && !view.prompt ? null : asked, token);
  }

  function write() {
    writing.run(chosen(), { prompt: prompt.value, ...knobs.request });
  }

  prompt.addEventListener("input", () => {
    if (writing.running) return;
    begin();
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
