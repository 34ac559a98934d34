// One text being written into a view: begun, stopped, told about, and begun again where the server went away.

import { stream } from "./api.js";
import { el, long } from "./dom.js";

const ECHOED = 2000; // letters of a prompt up to which its tokens are shown too

export class Writing {
  constructor(view, figures, onChange = () => {}) {
    Object.assign(this, { view, figures, onChange, abort: null });
    this.fault = el("div", { class: "fault", role: "alert", hidden: true });
    figures.after(this.fault);
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
    const { view } = this, asked = { model: model.id, ...body, logprobs: 0, return_token_ids: true, echo: !model.translates && body.prompt.length <= ECHOED };
    const sent = performance.now();
    let last = 0, finish = "";
    this.fault.hidden = true;
    view.begin(body.prompt, model);
    view.writing = true;
    this.onChange();
    const tell = () => {
      if (this.abort !== abort) return;
      const seconds = (last - sent) / 1000, count = view.made;
      const facts = [`${long(count)} ${count === 1 ? "token" : "tokens"}`];
      if (count > 1) facts.push(`${long(Math.round(count / seconds))} tokens/s`);
      if (count) facts.push(`${(view.bits / count).toFixed(2)} bits per token`);
      facts.push(`seed ${body.seed}`);
      if (finish) facts.push(finish);
      this.figures.textContent = facts.join(" · ");
    };
    this.figures.textContent = "waiting for the first token";
    const telling = setInterval(tell, 250);
    try {
      for await (const chunk of stream(asked, abort.signal)) {
        const [choice] = chunk.choices;
        if (!choice || this.abort !== abort) continue;
        if (choice.logprobs?.tokens.length) last = performance.now();
        view.add(choice, asked.echo);
        if (choice.finish_reason) finish = { length: "the length asked for, or the context's end", stop: "the model ended it" }[choice.finish_reason];
      }
    } catch (error) {
      if (error.name === "AbortError") finish = "stopped";
      else if (this.abort === abort) this.#fail(error, () => this.run(model, body));
    } finally {
      clearInterval(telling);
      tell();
      if (this.abort === abort) {
        view.writing = false;
        this.abort = null;
        this.onChange();
      }
    }
  }

  #fail(error, retry) {
    const again = el("button", { type: "button", onclick: retry }, "Try again");
    this.fault.replaceChildren(el("span", {}, error.message), again);
    this.fault.hidden = false;
  }
}
