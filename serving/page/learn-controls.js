// What a lesson has to move. Each control has `build(values, onChange)`, which returns its element and
// `refresh`, which shows the value that a button or another control has set.

import { el } from "./dom.js";
import { number } from "./format.js";

export const range = (name, label, [min, max, step], value, format = number) => ({
  name, value,
  build(values, onChange) {
    const output = el("output"), input = el("input", { type: "range", name, min, max, step });
    input.addEventListener("input", () => {
      values[name] = Number(input.value);
      onChange(name);
    });
    return {
      element: el("label", { class: "slider" }, label, output, input),
      refresh() {
        input.value = values[name];
        output.textContent = format(values[name]);
      },
    };
  },
});

let groups = 0; // radio buttons of one group share a name, which no other group of the page may have

// Radio buttons: options by value.
export const choice = (name, label, options, value) => ({
  name, value,
  build(values, onChange) {
    const group = `${name}-${++groups}`;
    const inputs = Object.keys(options).map((option) => el("input", {
      type: "radio", name: group, value: option,
      onchange: () => {
        values[name] = option;
        onChange(name);
      },
    }));
    const labels = inputs.map((input) => el("label", {}, input, options[input.value]));
    return {
      element: el("fieldset", { class: "choice" }, el("legend", {}, label), el("div", {}, labels)),
      refresh() { for (const input of inputs) input.checked = input.value === values[name]; },
    };
  },
});

export const toggle = (name, label, value) => ({
  name, value,
  build(values, onChange) {
    const input = el("input", { type: "checkbox", name });
    input.addEventListener("change", () => {
      values[name] = input.checked;
      onChange(name);
    });
    return { element: el("label", { class: "checkbox" }, input, label), refresh() { input.checked = values[name]; } };
  },
});

// A button that changes the values.
export const action = (label, run) => ({
  build(values, onChange) {
    return { element: el("button", { type: "button", onclick: () => { run(values); onChange(); } }, label), refresh() {} };
  },
});
