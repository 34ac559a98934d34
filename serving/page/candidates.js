// The most likely next tokens: their probabilities before and after temperature and filters.

import { post } from "./api.js";
import { coalesce, el } from "./dom.js";
import { integer, percent, visible } from "./format.js";

const NUM_CANDIDATES = 12;

export class CandidateList {
  constructor(element) {
    this.element = element;
    this.title = el("h3");
    this.hint = el("p", { class: "hint" });
    this.rows = Array.from({ length: NUM_CANDIDATES + 1 }, () => {
      const row = {
        name: el("span", { class: "name" }),
        bars: [el("i", { class: "model-color" }), el("i", { class: "sampled-color" })],
        numbers: [el("span", { class: "number" }), el("span", { class: "number" })],
      };
      row.item = el("li", {}, row.name, el("span", { class: "bars" }, row.bars), row.numbers);
      return row;
    });
    this.list = el("ol", { class: "candidates" }, el("li", { class: "head" },
      el("span", {}, "token"), el("span"), el("span", { class: "number" }, "model"), el("span", { class: "number" }, "sampled")),
    this.rows.map((row) => row.item));
    element.classList.add("next-token");
    element.append(this.title, this.hint, el("p", { class: "hint legend" },
      el("span", {}, el("i", { class: "model-color" }), "model probability"),
      el("span", {}, el("i", { class: "sampled-color" }), "sampling probability, after temperature, top-k and top-p")), this.list);
    this.show = coalesce((request, token) => this.#show(request, token));
  }

  // Fetch and show the candidates of a /v1/next request. `token` is the one that was sampled there, if any.
  // Without a request, there is no source sentence to translate yet.
  async #show(request, token) {
    if (!request) return this.#showMessage("Enter a sentence to translate.");
    let response;
    try {
      response = await post("v1/next", { ...request, candidates: NUM_CANDIDATES, include: token ? [token.id] : [] });
    } catch (error) {
      return this.#showMessage(error.message);
    }
    const { candidates, entropy, support_size: supportSize } = response;
    this.list.hidden = false;
    if (token) this.title.replaceChildren("Alternatives to ", el("span", { class: "token-name" }, visible(token.name)));
    else this.title.replaceChildren("Next token");
    this.hint.textContent = `${supportSize === 1 ? "1 token" : `${integer(supportSize)} tokens`} can be sampled · entropy ` +
      `${entropy.probability.toFixed(2)} bits, ${entropy.sampling_probability.toFixed(2)} after temperature and filters`;
    const largest = Math.max(...candidates.flatMap((candidate) => [candidate.probability, candidate.sampling_probability]), 1e-9);
    this.rows.forEach((row, i) => {
      const candidate = candidates[i];
      row.item.hidden = !candidate;
      if (!candidate) return;
      const { id, text, rank, probability, sampling_probability: samplingProbability } = candidate;
      row.item.classList.toggle("selected", id === token?.id);
      row.item.classList.toggle("filtered-out", samplingProbability === 0);
      row.name.textContent = (rank > NUM_CANDIDATES ? `${integer(rank)}. ` : "") + visible(text);
      row.name.title = `token ${id}, rank ${integer(rank)}`;
      [probability, samplingProbability].forEach((share, column) => {
        row.bars[column].style.setProperty("--share", (share / largest).toFixed(4));
        row.numbers[column].textContent = percent(share);
      });
    });
    this.element.dataset.shown = JSON.stringify(request);
  }

  #showMessage(message) {
    this.title.replaceChildren("Next token");
    this.hint.textContent = message;
    this.list.hidden = true;
  }
}
