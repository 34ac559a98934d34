// What may follow, before and after temperature and filters: two bars and two numbers for each token.

import { post } from "./api.js";
import { el, latest, long, percent, visible } from "./dom.js";

const SHOWN = 12;

export class Next {
  constructor(element) {
    this.title = el("h3");
    this.about = el("p", { class: "about" });
    this.list = el("ol", { class: "candidates" }, el("li", { class: "head" },
      el("span", {}, "token"), el("span"), el("span", { class: "number" }, "model"), el("span", { class: "number" }, "drawn")));
    this.rows = Array.from({ length: SHOWN + 1 }, () => {
      const before = el("i", { class: "swatch-before" }), after = el("i", { class: "swatch-after" });
      const row = {
        name: el("span", { class: "name" }), bars: [before, after],
        numbers: [el("span", { class: "number" }), el("span", { class: "number" })],
      };
      row.item = el("li", {}, row.name, el("span", { class: "bars" }, before, after), ...row.numbers);
      return row;
    });
    this.list.append(...this.rows.map((row) => row.item));
    this.element = element;
    element.classList.add("next");
    element.append(this.title, this.about, el("p", { class: "about legend" },
      el("span", {}, el("i", { class: "swatch-before" }), "the model's own probability"),
      el("span", {}, el("i", { class: "swatch-after" }), "what is drawn from: after temperature, top-k, top-p")), this.list);
    this.show = latest((asked, chosen) => this.#show(asked, chosen));
  }

  // `chosen` is the token that was drawn there, if one was; without a question, it waits for one.
  async #show(asked, chosen) {
    if (!asked) return this.#wait("once there is something to translate");
    let found;
    try {
      found = await post("v1/next", { ...asked, candidates: SHOWN, include: chosen ? [chosen.id] : [] });
    } catch (error) {
      return this.#wait(error.message);
    }
    this.list.hidden = false;
    if (chosen) this.title.replaceChildren("Instead of ", el("span", { class: "token-name" }, visible(chosen.name)), " there could be");
    else this.title.replaceChildren("What may come next");
    this.about.textContent = `${found.support_size === 1 ? "1 token" : `${long(found.support_size)} tokens`} can be drawn; uncertainty ` +
      `${found.entropy.probability.toFixed(2)} bits, after temperature ${found.entropy.sampling_probability.toFixed(2)}`;
    const most = Math.max(...found.candidates.flatMap((one) => [one.probability, one.sampling_probability]), 1e-9);
    this.rows.forEach((row, i) => {
      const one = found.candidates[i];
      row.item.hidden = !one;
      if (!one) return;
      row.item.classList.toggle("chosen", one.id === chosen?.id);
      row.item.classList.toggle("gone", one.sampling_probability === 0);
      row.name.textContent = (one.rank > SHOWN ? `${long(one.rank)}. ` : "") + visible(one.text);
      row.name.title = `token ${one.id}, rank ${long(one.rank)}`;
      [one.probability, one.sampling_probability].forEach((share, side) => {
        row.bars[side].style.setProperty("--share", (share / most).toFixed(4));
        row.numbers[side].textContent = percent(share);
      });
    });
    this.element.dataset.shown = JSON.stringify(asked);
  }

  #wait(why) {
    this.title.replaceChildren("What may come next");
    this.about.textContent = why;
    this.list.hidden = true;
  }
}
