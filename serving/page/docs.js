// API: what can be asked of this server, as it describes itself.

import { asCurl, get } from "./api.js";
import { $, el, prose } from "./dom.js";

const EXAMPLE = { prompt: "Once", max_tokens: 50, temperature: 0.8 };

export function api() {
  const place = $("#api-routes");

  async function show() {
    const told = await get("openapi.json");
    const named = (schema) => (schema.$ref ? told.components.schemas[schema.$ref.split("/").at(-1)] : schema);

    // What a field may be, in words.
    function kind(schema) {
      if (schema.anyOf) return [...new Set(schema.anyOf.map(kind))].filter((one) => one !== "null").join(" or ");
      if (schema.$ref) return `{${Object.entries(named(schema).properties).map(([name, one]) => `${name}: ${kind(one)}`).join(", ")}}`;
      if (schema.type === "array") return `list of ${kind(schema.items)}`;
      const least = schema.minimum === undefined ? "" : ` from ${schema.minimum}`;
      return schema.type + (schema.maximum === undefined ? least : `${least} to ${schema.maximum}`);
    }

    function fields({ parameters = [], requestBody }) {
      const body = requestBody ? named(requestBody.content["application/json"].schema) : { properties: {} };
      const rows = [
        ...parameters.map(({ name, schema, required }) => [name, schema, required]),
        ...Object.entries(body.properties).map(([name, schema]) => [name, schema, body.required?.includes(name)]),
      ];
      // What must be there comes first.
      rows.sort((a, b) => Boolean(b[2]) - Boolean(a[2]));
      if (!rows.length) return [];
      const fact = (schema, required) => {
        const value = String(schema.default ?? ""); // of a list without anything in it, too, nothing
        return kind(schema) + (required ? ", required" : value && `, default ${value}`);
      };
      return [el("ul", { class: "fields" }, rows.map(([name, schema, required]) => el("li", {},
        el("code", {}, name), el("small", {}, fact(schema, required)), el("div", {}, prose(schema.description ?? "")))))];
    }

    const routes = Object.entries(told.paths).flatMap(([path, methods]) =>
      Object.entries(methods).map(([method, route]) => ({ path, method: method.toUpperCase(), ...route })));
    place.replaceChildren(
      el("div", { class: "about" }, prose(told.info.description)),
      el("pre", { tabindex: 0, role: "group", "aria-label": "An example" }, asCurl(EXAMPLE)),
      ...routes.map((route, i) => el("details", { class: "panel", open: i === 0 },
        el("summary", {}, el("code", {}, `${route.method} ${route.path}`)),
        ...prose(route.description ?? ""),
        ...fields(route))));
  }
  return { shown: show };
}
