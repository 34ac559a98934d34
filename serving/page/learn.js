// Learn: a lesson for each chapter, with something to move. The address names the lesson (#learn-4).

import { $, el, prose } from "./dom.js";
import { action } from "./learn-controls.js";
import { equation } from "./learn-equation.js";

const SOURCE = "docs/chapters/";

// What can be moved of a lesson, the numbers that follow from it, and their drawing.
class Lab {
  constructor(lesson) {
    this.lesson = lesson;
    this.values = {};
    this.picture = el("div", { class: "picture" });
    this.facts = el("dl", { "aria-live": "polite" });
    const controls = [...lesson.controls, action("Reset", () => this.#reset())];
    this.controls = controls.map((control) => control.build(this.values, (name) => this.#change(name)));
    const buttons = this.controls.filter(({ element }) => element.matches("button")).map(({ element }) => element);
    const fields = this.controls.filter(({ element }) => !element.matches("button")).map(({ element }) => element);
    this.element = el("div", { class: "lab panel" }, this.picture,
      el("form", { class: "controls", "aria-label": "Values to change", onsubmit: (event) => event.preventDefault() },
        fields, el("div", { class: "toolbar" }, buttons)),
      this.facts);
    this.#reset();
    new ResizeObserver(() => this.#show()).observe(this.picture);
  }

  #reset() {
    for (const { name, value } of this.lesson.controls) if (name) this.values[name] = value;
    this.lesson.setUp?.(this.values);
  }

  #change(name) {
    this.lesson.onChange?.(this.values, name);
    this.#show();
  }

  #show() {
    const width = Math.floor(this.picture.clientWidth);
    if (!width) return;
    for (const control of this.controls) control.refresh();
    const { picture, facts } = this.lesson.show(this.values, width);
    this.picture.replaceChildren(...[picture].flat());
    const names = Object.keys(facts);
    if (names.join() !== [...this.facts.children].filter((item) => item.matches("dt")).map((item) => item.textContent).join()) {
      this.facts.replaceChildren(...names.flatMap((name) => [el("dt", {}, name), el("dd")]));
    }
    // Only what differs is written, so that a screen reader reads no more than that.
    [...this.facts.querySelectorAll("dd")].forEach((item, i) => {
      if (item.textContent !== facts[names[i]]) item.textContent = facts[names[i]];
    });
  }
}

function page(lesson, lessons) {
  const index = lessons.indexOf(lesson), heading = `${lesson.chapter}. ${lesson.title}`;
  const link = (neighbor, label) => neighbor && el("a", { href: `#learn-${neighbor.chapter}` }, label(neighbor.title));
  return [
    el("h3", { id: "learn-heading", tabindex: -1 }, heading),
    ...prose(lesson.idea),
    el("div", { class: "equations scroll-x", tabindex: 0, role: "group", "aria-label": "Equation" }, lesson.equations.map(equation)),
    new Lab(lesson).element,
    lesson.extra?.(),
    el("div", { class: "predict" }, el("p", {}, el("strong", {}, "Predict, then try. "), lesson.question),
      el("details", {}, el("summary", {}, "Answer"), prose(lesson.answer))),
    el("p", { class: "hint" }, "The whole chapter: ", el("code", {}, SOURCE + lesson.page), ". Its numbers: ", el("code", {}, `tinygpt chapter ${lesson.chapter}`), "."),
    el("div", { class: "toolbar pager" }, link(lessons[index - 1], (title) => `← ${title}`), el("span", { class: "spacer" }),
      link(lessons[index + 1], (title) => `${title} →`)),
  ].filter(Boolean);
}

export function learn() {
  const list = $("#learn-list"), article = $("#learn-lesson"), pages = {};
  let shown = null;
  return {
    // The lessons are loaded when the view is first shown: the other views do without them.
    async onShow(number) {
      const { LESSONS } = await import("./lessons.js");
      if (!list.childElementCount) {
        list.append(...LESSONS.map(({ chapter, title }) => el("li", {}, el("a", { href: `#learn-${chapter}` }, `${chapter} `, el("span", {}, title)))));
      }
      const lesson = LESSONS.find(({ chapter }) => chapter === Number(number)) ?? shown ?? LESSONS[0];
      document.title = `tinygpt: ${lesson.title}`;
      if (lesson === shown) return;
      for (const link of list.querySelectorAll("a")) {
        if (link.hash === `#learn-${lesson.chapter}`) link.setAttribute("aria-current", "page");
        else link.removeAttribute("aria-current");
      }
      article.replaceChildren(...(pages[lesson.chapter] ??= page(lesson, LESSONS)));
      if (shown) { // not on arrival from another view
        scrollTo(0, 0);
        $("#learn-heading").focus({ preventScroll: true });
      }
      shown = lesson;
    },
  };
}
