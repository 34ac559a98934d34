// Playground: generate a completion and inspect the alternatives to each token.

import { asCurl, asPython } from "./api.js";
import { CandidateList } from "./candidates.js";
import { SamplingControls, addShortcuts, modelSelect } from "./controls.js";
import { $, $$ } from "./dom.js";
import { Generation } from "./generation.js";
import { TokenView } from "./tokens.js";

export function playground(models) {
  const section = $("#playground"), prompt = $("#playground-prompt"), stop = $("#playground-stop");
  const candidates = new CandidateList($("#playground-candidates"));
  const controls = new SamplingControls($("[data-sampling]", section), () => update());
  const view = new TokenView($("#playground-output"), () => update());
  const generation = new Generation(view, $("#playground-stats"), () => {
    stop.disabled = !generation.running;
    update();
  });
  const model = modelSelect($("#playground-form"), models, () => {
    if (!generation.running) reset();
    update();
  });

  function reset() {
    view.reset(prompt.value, model());
  }

  // Show the candidates at the selected position, but not after the last token of a running generation.
  function update() {
    if (section.hidden || (generation.running && view.selected === view.tokens.length)) return;
    const { token, tokens } = view.selection;
    const { id, translates } = model();
    const request = { prompt: view.prompt, model: id, ...controls.sampling, tokens };
    candidates.show(translates && !view.prompt ? null : request, token);
  }

  function run() {
    generation.run(model(), { prompt: prompt.value, ...controls.request });
  }

  prompt.addEventListener("input", () => {
    if (generation.running) return;
    reset();
    update();
  });
  $("#playground-run").addEventListener("click", run);
  stop.addEventListener("click", () => generation.stop());
  addShortcuts(section, run, () => generation.stop());
  for (const button of $$("[data-copy]", section)) {
    const label = button.textContent;
    button.addEventListener("click", async () => {
      const body = { model: model().id, prompt: prompt.value, ...controls.request };
      const code = { curl: asCurl, python: asPython }[button.dataset.copy](body);
      try {
        await navigator.clipboard.writeText(code);
        button.textContent = "Copied";
      } catch {
        button.textContent = "Clipboard access denied";
      }
      setTimeout(() => { button.textContent = label; }, 1500);
    });
  }
  return { onShow: update };
}
