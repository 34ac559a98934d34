// Nearest words: the tokens whose vectors are most similar to that of a word, as in `tinygpt nearest`.

import { post } from "./api.js";
import { $, el } from "./dom.js";
import { visible } from "./format.js";

// `model` returns the selected model.
export function nearest(model) {
  const form = $("#nearest-form"), result = $("#nearest-result");

  async function find(event) {
    event.preventDefault();
    try {
      const { neighbors } = await post("v1/nearest", { model: model().id, word: form.elements.word.value.trim() });
      result.replaceChildren(el("ol", { class: "nearest" }, neighbors.map(({ text, cosine }) => el("li", {},
        el("code", {}, visible(text)), el("meter", { min: 0, max: 1, value: Math.max(0, cosine), "aria-hidden": "true" }), el("span", {}, cosine.toFixed(3))))));
    } catch (error) {
      result.replaceChildren(el("div", { class: "error-box", role: "alert" }, error.message));
    }
  }

  form.addEventListener("submit", find);
}
