// A text as its tokens come: each a span, the more coloured the less it was expected.

import { el, percent } from "./dom.js";

const CERTAIN = 1, SURPRISING = 9; // bits at which the colour begins, and is full
const BYTES = /^bytes:((?:\\x[0-9a-f]{2})+)$/; // what is no whole character, as the API writes it

export class TokenView {
  constructor(element, onPoint = () => {}) {
    this.element = element;
    this.onPoint = onPoint;
    element.tabIndex = 0;
    element.setAttribute("role", "group");
    element.setAttribute("aria-label", "The text, token by token: the arrow keys go from one to the next");
    this.cursor = el("span", { class: "cursor", title: "what comes next" });
    this.begin("");
    element.addEventListener("pointerover", (event) => this.#at(event.target, (place) => this.#point(place, false)));
    element.addEventListener("pointerleave", () => this.#point(this.pinned, false));
    element.addEventListener("click", (event) => this.#at(event.target, (place) => this.#point(place, true)));
    element.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const to = { Home: 0, End: this.tokens.length }[event.key] ?? (by === undefined ? undefined : this.here + by);
      if (to === undefined) return;
      event.preventDefault();
      this.#point(Math.min(this.tokens.length, Math.max(0, to)), true);
      (this.tokens[this.here]?.span ?? this.cursor).scrollIntoView({ block: "nearest" });
    });
  }

  // What is translated stands above its translation, any other prompt before what continues it.
  begin(prompt, model) {
    this.tokens = [];
    this.fresh = [];
    this.model = model;
    this.prompt = prompt; // what stands before the tokens: a text, or ids
    this.made = this.bits = 0; // tokens that the model has made, and how unexpected they were
    this.decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    this.here = this.pinned = 0;
    this.line = el("div", { class: "row" }, el("span", { class: "prompt" }, prompt), this.cursor);
    this.element.replaceChildren(this.line);
    if (model?.translates) this.element.append(this.line = el("div", { class: "row" }, this.cursor));
    this.cursor.classList.add("here");
  }

  set writing(on) {
    this.element.classList.toggle("writing", on);
    if (!on) this.#draw();
  }

  // The tokens of a chunk; they are drawn together with all of one frame. An echoed prompt comes with the first one.
  add({ logprobs, token_ids: ids, prompt_token_ids: prompt }, echoed) {
    if (!logprobs) return;
    const given = prompt && echoed ? prompt.length - 1 : 0;
    if (given) {
      this.prompt = prompt.slice(0, 1);
      this.line.replaceChildren(this.cursor);
    }
    logprobs.tokens.forEach((name, i) => {
      const logprob = logprobs.token_logprobs[i];
      if (i >= given) {
        this.bits -= logprob / Math.LN2;
        this.made++;
      }
      // The token that ends a text is none of its text's, and has no id among these.
      this.fresh.push({ id: ids[i] ?? this.model.eos_token_id, ends: i >= ids.length, name, text: this.#read(name), logprob, given: i < given });
    });
    this.drawing ??= requestAnimationFrame(() => this.#draw());
  }

  // Where one looks, and the ids before it. After the end of a text nothing comes: who looks there looks at the end.
  get look() {
    const place = Math.min(this.here, this.tokens.length - (this.tokens.at(-1)?.ends ? 1 : 0));
    return { token: this.tokens[place], tokens: this.tokens.slice(0, place).map((token) => token.id) };
  }

  #read(name) {
    const part = BYTES.exec(name);
    const bytes = part ? Uint8Array.from(part[1].slice(2).split("\\x"), (hex) => parseInt(hex, 16)) : new TextEncoder().encode(name);
    return this.decoder.decode(bytes, { stream: true });
  }

  #draw() {
    cancelAnimationFrame(this.drawing);
    this.drawing = null;
    const { element } = this, end = this.tokens.length;
    const atBottom = element.scrollHeight - element.scrollTop - element.clientHeight < 40;
    for (const token of this.fresh) {
      // Each line is a block of its own: what has been laid out stays so.
      const breaks = token.text.startsWith("\n");
      const span = el("span", { class: "token", title: percent(Math.exp(token.logprob)) }, breaks ? token.text.slice(1) : token.text);
      if (breaks) this.element.append(this.line = el("div", { class: "row" }));
      span.classList.toggle("line", breaks);
      if (!token.text) span.classList.add("part");
      if (token.given) span.classList.add("given");
      const surprise = (-token.logprob / Math.LN2 - CERTAIN) / (SURPRISING - CERTAIN);
      span.style.setProperty("--surprise", Math.min(1, Math.max(0, surprise)).toFixed(2));
      span.place = this.tokens.push({ ...token, span }) - 1;
      this.line.append(span);
    }
    this.fresh = [];
    this.line.append(this.cursor);
    // Who looks at what comes next goes on doing so.
    if (this.pinned === end) this.pinned = this.tokens.length;
    if (this.here === end) this.here = this.tokens.length;
    if (atBottom) element.scrollTop = element.scrollHeight;
  }

  #at(target, then) {
    if (target === this.cursor) then(this.tokens.length);
    else if (target.classList.contains("token")) then(target.place);
  }

  // Where one looks: at a token, or behind the last one.
  #point(place, pin) {
    if (pin) this.pinned = place;
    if (place === this.here && !pin) return;
    (this.tokens[this.here]?.span ?? this.cursor).classList.remove("here");
    this.here = place;
    (this.tokens[place]?.span ?? this.cursor).classList.add("here");
    this.onPoint(place);
  }
}
