// The server's public API, and nothing else: whatever this page shows, any program can ask for.

import { $ } from "./dom.js";

const STORE = "tinygpt-key";
let key = sessionStorage.getItem(STORE) || "";
let asking = null;

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const headers = (body) => ({
  ...(body === undefined ? {} : { "Content-Type": "application/json" }),
  ...(key ? { Authorization: `Bearer ${key}` } : {}),
});

// Ask the person for the key; all that wait for it wait for the same answer.
function askKey(wrong) {
  asking ??= new Promise((resolve) => {
    const dialog = $("#key"), form = $("form", dialog);
    $(".wrong", dialog).hidden = !wrong;
    form.reset();
    dialog.showModal();
    dialog.oncancel = (event) => event.preventDefault();
    form.addEventListener("submit", () => {
      key = form.elements.key.value.trim();
      sessionStorage.setItem(STORE, key);
      form.reset();
      asking = null;
      resolve();
    }, { once: true });
  });
  return asking;
}

async function request(path, body, signal) {
  const used = key;
  let answer;
  try {
    answer = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers: headers(body),
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server does not answer. Is it still running?");
  }
  if (answer.status === 401) {
    if (used === key) await askKey(Boolean(used));
    return request(path, body, signal);
  }
  if (answer.ok) return answer;
  let message = `The server answered ${answer.status}.`;
  try {
    message = (await answer.json()).error.message;
  } catch { /* not ours: the status says it */ }
  if (answer.status === 429) message += ` Try again in ${answer.headers.get("retry-after") || 1} s.`;
  throw new ApiError(answer.status, message);
}

export const get = async (path, signal) => (await request(path, undefined, signal)).json();
export const post = async (path, body, signal) => (await request(path, body, signal)).json();

// The chunks of a streamed completion, as they come. An error event and a stream without its end are errors.
export async function* stream(body, signal) {
  const answer = await request("v1/completions", { ...body, stream: true }, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
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
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError(0, "The server went away in the middle of the text.");
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new ApiError(0, "The server went away in the middle of the text.");
}

// The same request for others to make. The key is never shown: it is taken from the environment.
const shell = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
const address = () => new URL("v1/completions", location.href).href;

export function asCurl(body) {
  const auth = key ? ` -H "Authorization: Bearer $TINYGPT_API_KEY"` : "";
  return `curl -N ${address()} -H 'Content-Type: application/json'${auth} -d ${shell(JSON.stringify({ ...body, stream: true }))}`;
}

export function asPython(body) {
  const { top_k, ...own } = body; // numbers and texts: JSON writes them as Python does
  const lines = Object.entries(own).map(([name, value]) => `    ${name}=${JSON.stringify(value)},`);
  if (top_k) lines.push(`    extra_body={"top_k": ${top_k}},`);
  const secret = key ? `os.environ["TINYGPT_API_KEY"]` : `"none"`;
  return [
    ...(key ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(address().replace("/completions", ""))}, api_key=${secret})`,
    "for chunk in client.completions.create(",
    ...lines,
    "    stream=True,",
    "):",
    `    print(chunk.choices[0].text if chunk.choices else "", end="", flush=True)`,
    "",
  ].join("\n");
}
