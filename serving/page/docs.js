// API reference, rendered from the server's OpenAPI schema.

import { asCurl, get } from "./api.js";
import { $, el, prose } from "./dom.js";

const EXAMPLE = { prompt: "Once", max_tokens: 50, temperature: 0.8 };

export function docs() {
  return {
    async onShow() {
      const { info, paths, components } = await get("openapi.json");
      const routes = Object.entries(paths).flatMap(([path, methods]) =>
        Object.entries(methods).map(([method, route]) => ({ title: `${method.toUpperCase()} ${path}`, ...route })));
      $("#docs-routes").replaceChildren(
        el("div", { class: "hint" }, prose(info.description)),
        el("pre", { tabindex: 0, role: "group", "aria-label": "Example request" }, asCurl(EXAMPLE)),
        ...routes.map((route, i) => el("details", { class: "panel", open: i === 0 },
          el("summary", {}, el("code", {}, route.title)), prose(route.description), fieldList(fieldsOf(route, components.schemas), components.schemas))));
    },
  };
}

const resolve = ({ $ref }, schemas) => schemas[$ref.split("/").at(-1)];

// The parameters and body fields of a route, required ones first.
function fieldsOf({ parameters = [], requestBody }, schemas) {
  const { properties, required = [] } = requestBody ? resolve(requestBody.content["application/json"].schema, schemas) : { properties: {} };
  return [
    ...parameters,
    ...Object.entries(properties).map(([name, schema]) => ({ name, schema, required: required.includes(name) })),
  ].sort((a, b) => b.required - a.required);
}

function fieldList(fields, schemas) {
  return fields.length ? el("ul", { class: "fields" }, fields.map(({ name, schema, required }) => {
    const defaultValue = String(schema.default ?? ""); // an empty list becomes an empty string too
    const type = typeName(schema, schemas) + (required ? ", required" : defaultValue && `, default ${defaultValue}`);
    return el("li", {}, el("code", {}, name), el("small", {}, type), el("div", {}, prose(schema.description ?? "")));
  })) : null;
}

function typeName(schema, schemas) {
  if (schema.anyOf) return [...new Set(schema.anyOf.map((option) => typeName(option, schemas)))].filter((name) => name !== "null").join(" or ");
  if (schema.$ref) return `{${Object.entries(resolve(schema, schemas).properties).map(([name, field]) => `${name}: ${typeName(field, schemas)}`).join(", ")}}`;
  if (schema.type === "array") return `list of ${typeName(schema.items, schemas)}`;
  return schema.type + (schema.minimum === undefined ? "" : ` from ${schema.minimum}`) + (schema.maximum === undefined ? "" : ` to ${schema.maximum}`);
}
