// Client of the server's public API. The page uses no other endpoints.

import { $ } from "./dom.js";

const STORAGE_KEY = "tinygpt-key";
let apiKey = sessionStorage.getItem(STORAGE_KEY) || "";
let keyRequest = null;

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// Show the API key dialog. Concurrent requests share one dialog.
function requestKey(invalid) {
  keyRequest ??= new Promise((resolve) => {
    const dialog = $("#key"), form = $("form", dialog);
    $(".error", dialog).hidden = !invalid;
    form.reset();
    dialog.showModal();
    dialog.oncancel = (event) => event.preventDefault();
    form.addEventListener("submit", () => {
      apiKey = form.elements.key.value.trim();
      sessionStorage.setItem(STORAGE_KEY, apiKey);
      form.reset();
      keyRequest = null;
      resolve();
    }, { once: true });
  });
  return keyRequest;
}

async function request(path, body, signal) {
  const sentKey = apiKey;
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers: {
        ...(body === undefined ? {} : { "Content-Type": "application/json" }),
        ...(apiKey ? { Authorization: `Bearer ${apiKey}` } : {}),
      },
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "Cannot reach the server. Is it still running?");
  }
  if (response.status === 401) {
    if (sentKey === apiKey) await requestKey(Boolean(sentKey));
    return request(path, body, signal);
  }
  if (response.ok) return response;
  let message = `The server responded with status ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch { /* not the API's JSON, from a proxy: the status is all there is */ }
  if (response.status === 429) message += ` Retry in ${response.headers.get("retry-after") || 1} s.`;
  throw new ApiError(response.status, message);
}

export const get = async (path, signal) => (await request(path, undefined, signal)).json();
export const post = async (path, body, signal) => (await request(path, body, signal)).json();

// Yield the chunks of a streamed completion. An error event, or an end without [DONE], throws.
export async function* stream(body, signal) {
  const response = await request("v1/completions", { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const interrupted = new ApiError(0, "The connection was lost before the completion was finished.");
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ")) continue;
        if (line === "data: [DONE]") return;
        const chunk = JSON.parse(line.slice(6));
        if (chunk.error) throw new ApiError(500, chunk.error.message);
        yield chunk;
      }
    }
  } catch (error) {
    throw error instanceof ApiError || error.name === "AbortError" ? error : interrupted;
  } finally {
    reader.cancel().catch(() => {});
  }
  throw interrupted;
}

// Code for the same request. The API key is not included: the code reads it from the environment.
const shellQuote = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
const endpoint = () => new URL("v1/completions", location.href).href;

export function asCurl(body) {
  const auth = apiKey ? ` -H "Authorization: Bearer $TINYGPT_API_KEY"` : "";
  return `curl -N ${endpoint()} -H 'Content-Type: application/json'${auth} -d ${shellQuote(JSON.stringify({ ...body, stream: true }))}`;
}

export function asPython(body) {
  const { top_k, ...openaiFields } = body; // numbers and strings: valid Python as JSON
  const lines = Object.entries(openaiFields).map(([name, value]) => `    ${name}=${JSON.stringify(value)},`);
  if (top_k) lines.push(`    extra_body={"top_k": ${top_k}},`);
  return [
    ...(apiKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(endpoint().replace("/completions", ""))}, api_key=${apiKey ? `os.environ["TINYGPT_API_KEY"]` : `"none"`})`,
    "for chunk in client.completions.create(",
    ...lines,
    "    stream=True,",
    "):",
    `    print(chunk.choices[0].text if chunk.choices else "", end="", flush=True)`,
    "",
  ].join("\n");
}
