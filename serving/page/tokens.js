// Tokens of a streamed completion: one span each, colored by surprisal, with a selected position.

import { el } from "./dom.js";
import { percent } from "./format.js";

const MIN_BITS = 1, MAX_BITS = 9; // surprisal at which the color starts, and is full
const BYTES = /^bytes:((?:\\x[0-9a-f]{2})+)$/; // the API's notation for a token that is not whole characters

export class TokenView {
  constructor(element, onSelect = () => {}) {
    this.element = element;
    this.onSelect = onSelect;
    element.tabIndex = 0;
    element.setAttribute("role", "group");
    element.setAttribute("aria-label", "Tokens: use the arrow keys to select one");
    this.cursor = el("span", { class: "cursor", title: "next token" });
    this.reset("");
    element.addEventListener("pointerover", (event) => this.#selectTarget(event.target, false));
    element.addEventListener("pointerleave", () => this.#select(this.pinned, false));
    element.addEventListener("click", (event) => this.#selectTarget(event.target, true));
    element.addEventListener("keydown", (event) => {
      const end = this.tokens.length;
      const position = { ArrowRight: this.selected + 1, ArrowLeft: this.selected - 1, Home: 0, End: end }[event.key];
      if (position === undefined) return;
      event.preventDefault();
      this.#select(Math.min(end, Math.max(0, position)), true);
      this.#spanAt(this.selected).scrollIntoView({ block: "nearest" });
    });
  }

  // A source sentence has a line of its own above its translation; any other prompt precedes its completion.
  reset(prompt, model) {
    this.tokens = [];
    this.pending = []; // tokens that are not drawn yet
    this.model = model;
    this.prompt = prompt; // of the completion whose first token is tokens[0]: a string, or ids
    this.numGenerated = this.bits = 0; // generated tokens and the sum of their surprisal
    this.decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    this.selected = this.pinned = 0; // the position under the pointer, and the one that was clicked
    this.line = el("div", { class: "line" }, el("span", { class: "prompt" }, prompt), this.cursor);
    this.element.replaceChildren(this.line);
    if (model?.translates) this.element.append(this.line = el("div", { class: "line" }, this.cursor));
    this.cursor.classList.add("selected");
  }

  set generating(on) {
    this.element.classList.toggle("generating", on);
    if (!on) this.#draw();
  }

  // Add the tokens of a chunk; all chunks of one animation frame are drawn together. The first one has the echoed prompt.
  add({ text, logprobs, token_ids: ids, prompt_token_ids: promptIds }, echo) {
    if (!logprobs) return;
    // A first token that contains the prompt's trailing space shows it.
    if (this.prompt.at(-1) === " " && !this.tokens.length && !this.pending.length && !this.model.translates &&
      logprobs.tokens[0]?.startsWith(" ") && !text.startsWith(" ")) this.element.querySelector(".prompt").textContent = this.prompt.slice(0, -1);
    const numEchoed = promptIds && echo ? promptIds.length - 1 : 0; // the start token is not echoed
    if (numEchoed) {
      this.prompt = promptIds.slice(0, 1);
      this.line.replaceChildren(this.cursor);
    }
    logprobs.tokens.forEach((name, i) => {
      const logprob = logprobs.token_logprobs[i], fromPrompt = i < numEchoed;
      if (!fromPrompt) {
        this.bits -= logprob / Math.LN2;
        this.numGenerated++;
      }
      // token_ids does not include the end-of-text token, logprobs does.
      const isEnd = i >= ids.length;
      this.pending.push({ id: isEnd ? this.model.eos_token_id : ids[i], isEnd, name, text: this.#decode(name), logprob, fromPrompt });
    });
    this.frame ??= requestAnimationFrame(() => this.#draw());
  }

  // The selected token and the ids before it. Nothing follows the end-of-text token: the position after it selects it.
  get selection() {
    const position = Math.min(this.selected, this.tokens.length - (this.tokens.at(-1)?.isEnd ? 1 : 0));
    return { token: this.tokens[position], tokens: this.tokens.slice(0, position).map((token) => token.id) };
  }

  #decode(name) {
    const match = BYTES.exec(name);
    const bytes = match ? Uint8Array.from(match[1].slice(2).split("\\x"), (hex) => parseInt(hex, 16)) : new TextEncoder().encode(name);
    return this.decoder.decode(bytes, { stream: true });
  }

  #draw() {
    cancelAnimationFrame(this.frame);
    this.frame = null;
    const { element } = this, end = this.tokens.length;
    const atBottom = element.scrollHeight - element.scrollTop - element.clientHeight < 40;
    for (const token of this.pending) {
      // Each line is a block of its own, so that the browser lays out only the last one again.
      const isNewline = token.text.startsWith("\n");
      const span = el("span", { class: "token", title: percent(Math.exp(token.logprob)) }, isNewline ? token.text.slice(1) : token.text);
      if (isNewline) element.append(this.line = el("div", { class: "line" }));
      span.classList.toggle("newline", isNewline);
      span.classList.toggle("partial", !token.text);
      span.classList.toggle("from-prompt", token.fromPrompt);
      const surprisal = (-token.logprob / Math.LN2 - MIN_BITS) / (MAX_BITS - MIN_BITS);
      span.style.setProperty("--surprisal", Math.min(1, Math.max(0, surprisal)).toFixed(2));
      span.position = this.tokens.push({ ...token, span }) - 1;
      this.line.append(span);
    }
    this.pending = [];
    this.line.append(this.cursor);
    // A selection of the cursor moves with it.
    if (this.pinned === end) this.pinned = this.tokens.length;
    if (this.selected === end) this.selected = this.tokens.length;
    if (atBottom) element.scrollTop = element.scrollHeight;
  }

  #spanAt(position) {
    return this.tokens[position]?.span ?? this.cursor;
  }

  #selectTarget(target, pin) {
    if (target === this.cursor) this.#select(this.tokens.length, pin);
    else if (target.classList.contains("token")) this.#select(target.position, pin);
  }

  #select(position, pin) {
    if (pin) this.pinned = position;
    if (position === this.selected && !pin) return;
    this.#spanAt(this.selected).classList.remove("selected");
    this.selected = position;
    this.#spanAt(position).classList.add("selected");
    this.onSelect(position);
  }
}
