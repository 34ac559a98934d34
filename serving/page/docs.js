// API: what can be asked of this server, as it describes itself.

import { asCurl, get } from "./api.js";
import { $, el, prose } from "./dom.js";

const EXAMPLE = { prompt: "Once", max_tokens: 50, temperature: 0.8 };

export function docs() {
  return {
    async shown() {
      const { info, paths, components } = await get("openapi.json");
      const routes = Object.entries(paths).flatMap(([path, methods]) =>
        Object.entries(methods).map(([method, route]) => ({ name: `${method.toUpperCase()} ${path}`, ...route })));
      $("#docs-routes").replaceChildren(
        el("div", { class: "about" }, prose(info.description)),
        el("pre", { tabindex: 0, role: "group", "aria-label": "An example" }, asCurl(EXAMPLE)),
        ...routes.map((route, i) => el("details", { class: "panel", open: i === 0 },
          el("summary", {}, el("code", {}, route.name)), prose(route.description), list(fields(route, components.schemas), components.schemas))));
    },
  };
}

const named = ({ $ref }, schemas) => schemas[$ref.split("/").at(-1)];

// What a route takes, in its address or in its body; what must be there comes first.
function fields({ parameters = [], requestBody }, schemas) {
  const { properties, required = [] } = requestBody ? named(requestBody.content["application/json"].schema, schemas) : { properties: {} };
  return [
    ...parameters,
    ...Object.entries(properties).map(([name, schema]) => ({ name, schema, required: required.includes(name) })),
  ].sort((one, other) => other.required - one.required);
}

function list(taken, schemas) {
  return taken.length ? el("ul", { class: "fields" }, taken.map(({ name, schema, required }) => {
    const value = String(schema.default ?? ""); // of an empty list, too, nothing
    const what = kind(schema, schemas) + (required ? ", required" : value && `, default ${value}`);
    return el("li", {}, el("code", {}, name), el("small", {}, what), el("div", {}, prose(schema.description ?? "")));
  })) : null;
}

// What a field may be, in words.
function kind(schema, schemas) {
  if (schema.anyOf) return [...new Set(schema.anyOf.map((one) => kind(one, schemas)))].filter((one) => one !== "null").join(" or ");
  if (schema.$ref) return `{${Object.entries(named(schema, schemas).properties).map(([name, one]) => `${name}: ${kind(one, schemas)}`).join(", ")}}`;
  if (schema.type === "array") return `list of ${kind(schema.items, schemas)}`;
  return schema.type + (schema.minimum === undefined ? "" : ` from ${schema.minimum}`) + (schema.maximum === undefined ? "" : ` to ${schema.maximum}`);
}
