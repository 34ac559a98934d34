// One streamed completion: run, stop, statistics, error and retry.

import { stream } from "./api.js";
import { el } from "./dom.js";
import { integer } from "./format.js";

const MAX_ECHO = 2000; // characters; the tokens of longer prompts are not shown
const FINISH_REASONS = { length: "stopped at max tokens or the context limit", stop: "stopped at the end-of-text token" };

export class Generation {
  constructor(view, stats, onChange = () => {}) {
    Object.assign(this, { view, stats, onChange, abort: null });
    this.error = el("div", { class: "error-box", role: "alert", hidden: true });
    stats.after(this.error);
  }

  get running() {
    return this.abort !== null;
  }

  stop() {
    this.abort?.abort();
  }

  async run(model, body) {
    this.stop();
    const abort = this.abort = new AbortController();
    // An echoed prompt is tokenized whole; the trailing space of others is left to the first token, which is better.
    const { view } = this, echo = !model.translates && body.prompt.length <= MAX_ECHO && !body.prompt.endsWith(" ");
    const request = { model: model.id, ...body, logprobs: 0, return_token_ids: true, echo };
    const start = performance.now();
    let lastToken = 0, finish = "";
    this.error.hidden = true;
    view.reset(body.prompt, model);
    view.generating = true;
    this.onChange();
    const updateStats = () => {
      if (this.abort !== abort) return;
      const seconds = (lastToken - start) / 1000, count = view.numGenerated;
      const facts = [`${integer(count)} ${count === 1 ? "token" : "tokens"}`];
      if (count > 1) facts.push(`${integer(Math.round(count / seconds))} tokens/s`);
      if (count) facts.push(`${(view.bits / count).toFixed(2)} bits per token`);
      facts.push(`seed ${body.seed}`);
      if (finish) facts.push(finish);
      this.stats.textContent = facts.join(" · ");
    };
    this.stats.textContent = "Waiting for the first token …";
    const timer = setInterval(updateStats, 250);
    try {
      for await (const chunk of stream(request, abort.signal)) {
        const [choice] = chunk.choices;
        if (!choice || this.abort !== abort) continue;
        if (choice.logprobs?.tokens.length) lastToken = performance.now();
        view.add(choice, echo);
        if (choice.finish_reason) finish = FINISH_REASONS[choice.finish_reason];
      }
    } catch (error) {
      if (error.name === "AbortError") finish = "stopped";
      else if (this.abort === abort) this.#showError(error, () => this.run(model, body));
    } finally {
      clearInterval(timer);
      updateStats();
      if (this.abort === abort) {
        view.generating = false;
        this.abort = null;
        this.onChange();
      }
    }
  }

  #showError(error, retry) {
    const button = el("button", { type: "button", onclick: retry }, "Retry");
    this.error.replaceChildren(el("span", {}, error.message), button);
    this.error.hidden = false;
  }
}
