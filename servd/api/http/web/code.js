// The request of the next message, as commands to copy. The key itself is never shown.

import { button, copyText, element } from "/web/dom.js";
import { hasKey } from "/web/api.js";

/** Shows `body` in the panel; `problem` instead, if the settings make none. */
export function showCode(panel, body, problem) {
  if (problem) {
    panel.replaceChildren(element("p", { className: "problem" }, problem));
    return;
  }
  panel.replaceChildren(
    element("p", { className: "note" }, "What the next message sends, with the settings as they are."),
    snippet("curl", curl(body)), snippet("Python", python(body)), snippet("JSON", JSON.stringify(body, null, 2)));
}

function snippet(name, text) {
  return element("div", { className: "code" },
    element("div", { className: "code-head" }, element("span", {}, name),
      button("Copy", (event) => copyText(text, event.target), { "aria-label": `Copy ${name}` })),
    element("pre", { tabIndex: 0, "aria-label": name }, element("code", {}, text)));
}

function curl(body) {
  const json = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  const key = hasKey() ? ' \\\n  -H "Authorization: Bearer $SERVD_API_KEY"' : "";
  return `curl -N ${location.origin}/v1/chat/completions \\\n  -H "Content-Type: application/json"${key} \\\n  -d '${json}'\n`;
}

const OPENAI = new Set(["model", "messages", "stream", "stream_options", "temperature", "top_p", "max_tokens", "seed",
  "stop", "frequency_penalty", "presence_penalty", "logprobs", "top_logprobs", "response_format", "n", "logit_bias"]);

function python(body) {
  const own = Object.entries(body).filter(([name]) => OPENAI.has(name) && name !== "stream_options");
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => !OPENAI.has(name)));
  const lines = own.map(([name, value]) => `    ${name}=${literal(value, 4)},`);
  if (Object.keys(extra).length) lines.push(`    extra_body=${literal(extra, 4)},`);
  const key = hasKey() ? 'os.environ["SERVD_API_KEY"]' : '"none"';
  return `${hasKey() ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url="${location.origin}/v1", api_key=${key})
stream = client.chat.completions.create(
${lines.join("\n")}
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
`;
}

/** A value as Python writes it. */
function literal(value, indent) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const isList = Array.isArray(value);
  const items = isList ? value.map((item) => literal(item, indent + 4))
    : Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${literal(item, indent + 4)}`);
  const [open, close] = isList ? "[]" : "{}";
  const flat = `${open}${items.join(", ")}${close}`;
  if (flat.length < 90 && !flat.includes("\n")) return flat;
  const pad = " ".repeat(indent + 4);
  return `${open}\n${items.map((item) => `${pad}${item},`).join("\n")}\n${" ".repeat(indent)}${close}`;
}
