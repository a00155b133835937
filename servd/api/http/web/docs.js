// Shows /openapi.json: each operation with its schemas, and a form to try it.

import { askForKey, request } from "/web/api.js";
import { element } from "/web/dom.js";

const box = document.getElementById("operations");
const filter = document.getElementById("filter");
const MAX_SHOWN = 200_000; // characters of a reply
let spec = null;

document.getElementById("key").addEventListener("click", () => askForKey());
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !event.target.closest("input, textarea") && !document.querySelector("dialog[open]")) {
    event.preventDefault();
    filter.focus();
  }
});

try {
  spec = await (await request("/openapi.json")).json();
  draw();
  filter.addEventListener("input", narrow);
} catch (error) {
  box.replaceChildren(element("p", { className: "problem", role: "alert" }, error.message));
}

function draw() {
  const groups = new Map();
  for (const [path, methods] of Object.entries(spec.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const name = /^\/v\d+(?=\/)/.exec(path)?.[0] ?? "Server";
      if (!groups.has(name)) groups.set(name, []);
      groups.get(name).push(show(path, method.toUpperCase(), operation));
    }
  }
  const last = (name) => name === "Server";
  box.replaceChildren(...[...groups].sort(([a], [b]) => last(a) - last(b)).map(([name, shown]) =>
    element("section", {}, element("h2", { className: "group" }, name), ...shown)));
}

function narrow() {
  const words = filter.value.toLowerCase().split(/\s+/);
  for (const section of box.children) {
    let isEmpty = true;
    for (const operation of section.querySelectorAll(".operation")) {
      operation.hidden = !words.every((word) => operation.dataset.words.includes(word));
      isEmpty &&= operation.hidden;
    }
    section.hidden = isEmpty;
  }
}

function show(path, method, operation) {
  const detail = element("div", { className: "detail" });
  const node = element("details", { className: "operation", id: operation.operationId,
    data: { words: `${method} ${path} ${operation.summary} ${operation.description}`.toLowerCase() } },
  element("summary", {}, element("span", { className: `method ${method}` }, method),
    element("code", { className: "path" }, path), element("span", { className: "summary" }, operation.summary)), detail);
  node.addEventListener("toggle", () => {
    if (node.open && !detail.childElementCount) fill(detail, path, method, operation);
  });
  return node;
}

function fill(detail, path, method, operation) {
  detail.append(element("p", {}, operation.description));
  if (operation.parameters) {
    detail.append(element("h3", {}, "Parameters"), table(operation.parameters.map((p) => row(p.name, p.schema, p.required, 0))));
  }
  const content = operation.requestBody?.content["application/json"];
  if (content) detail.append(element("h3", {}, "Body"), fields(content.schema, 0));
  detail.append(element("h3", {}, "Replies"));
  for (const [status, reply] of Object.entries(operation.responses)) detail.append(replyNode(status, reply));
  detail.append(element("h3", {}, "Try it"), form(path, method, operation, content?.schema));
}

function replyNode(status, reply) {
  const kinds = Object.entries(reply.content ?? {}).map(([kind, media]) => {
    const data = media.schema.properties?.data?.anyOf?.[1].contentSchema.anyOf[0];
    return element("div", {}, element("small", {}, kind + (data ? ", the data of each event" : "")), fields(data ?? media.schema, 0));
  });
  return element("details", { className: "nested" },
    element("summary", {}, `${status} `, element("span", { className: "kind" }, reply.description)), ...kinds);
}

const resolve = (schema) => (schema?.$ref ? spec.components.schemas[schema.$ref.split("/").pop()] : schema);

function fields(schema, depth) {
  const resolved = resolve(schema);
  if (!resolved?.properties) return element("p", { className: "note" }, kind(schema));
  const required = new Set(resolved.required ?? []);
  return element("div", {}, resolved.description ? element("p", { className: "note" }, resolved.description) : null,
    table(Object.entries(resolved.properties).map(([name, part]) => row(name, part, required.has(name), depth))));
}

function table(rows) {
  return element("table", { className: "fields" }, element("tbody", {}, ...rows));
}

function row(name, schema, isRequired, depth) {
  const cell = element("td", {}, element("span", { className: "kind" }, kind(schema)));
  const inner = structOf(schema);
  if (inner && depth < 6) {
    const nested = element("details", { className: "nested" }, element("summary", {}, inner.title ?? "fields"));
    nested.addEventListener("toggle", () => {
      if (nested.open && nested.childElementCount === 1) nested.append(fields(inner, depth + 1));
    });
    cell.append(nested);
  }
  return element("tr", {}, element("td", {}, element("code", {}, name), isRequired ? element("span", { className: "required", title: "required" }, " *") : null), cell);
}

/** The struct inside a schema: itself, of a list, or of one of several. */
function structOf(schema, depth = 0) {
  const resolved = resolve(schema);
  if (!resolved || depth > 4) return null;
  if (resolved.properties) return resolved;
  for (const part of [resolved.items, ...(resolved.anyOf ?? [])]) {
    const found = part && typeof part === "object" ? structOf(part, depth + 1) : null;
    if (found) return found;
  }
  return null;
}

function kind(schema, depth = 0) {
  if (!schema || depth > 5) return "any";
  if (schema.$ref) return resolve(schema).title ?? "object";
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.anyOf) return schema.anyOf.map((part) => kind(part, depth + 1)).join(" | ");
  const bounds = [];
  const low = schema.minimum ?? schema.exclusiveMinimum;
  if (low !== undefined) bounds.push(`${schema.minimum === undefined ? "above " : "from "}${low}`);
  if (schema.maximum !== undefined) bounds.push(`to ${schema.maximum}`);
  if (schema.maxLength !== undefined) bounds.push(`at most ${schema.maxLength} characters`);
  if (schema.maxItems !== undefined) bounds.push(`at most ${schema.maxItems}`);
  const of = schema.type === "array" && schema.items ? ` of ${kind(schema.items, depth + 1)}` : "";
  const fallback = schema.default !== undefined && schema.default !== null ? `; default ${JSON.stringify(schema.default)}` : "";
  return `${schema.type ?? "any"}${of}${bounds.length ? ` ${bounds.join(" ")}` : ""}${fallback}`;
}

/** A small valid body: required fields alone. */
function example(schema, depth = 0) {
  const resolved = resolve(schema);
  if (!resolved || depth > 5) return null;
  if (resolved.enum) return resolved.enum.find((value) => value === "user") ?? resolved.enum[0];
  if (resolved.anyOf) return example(resolved.anyOf[0], depth + 1);
  if (resolved.properties) {
    const names = [...(resolved.required ?? [])];
    if (resolved.properties.role && resolved.properties.content && !names.includes("content")) names.push("content");
    if (resolved.properties.max_tokens && depth === 0 && !names.includes("max_tokens")) names.push("max_tokens");
    return Object.fromEntries(names.map((name) => [name,
      name === "max_tokens" ? 32 : example(resolved.properties[name], depth + 1)]));
  }
  if (resolved.type === "array") return resolved.minItems === 0 ? [] : [example(resolved.items, depth + 1)];
  return { string: "Hello", integer: Math.max(1, resolved.minimum ?? 1), number: 1, boolean: false, object: {} }[resolved.type] ?? null;
}

function form(path, method, operation, schema) {
  const inputs = (operation.parameters ?? []).map((parameter) => [parameter, element("input", { placeholder: parameter.name, "aria-label": parameter.name })]);
  const body = schema ? element("textarea", { className: "mono", spellcheck: false, "aria-label": "Body",
    value: JSON.stringify(example(schema), null, 2) }) : null;
  const status = element("span", { className: "note", role: "status" });
  const result = element("pre", { className: "result", hidden: true, tabIndex: 0 });
  const send = element("button", { type: "submit", className: "primary" }, "Send");
  let controller = null;
  const run = async () => {
    if (controller) {
      controller.abort();
      return;
    }
    controller = new AbortController();
    send.textContent = "Stop";
    result.hidden = false;
    result.textContent = "";
    try {
      await follow(target(path, inputs), { method, body: body?.value, signal: controller.signal,
        headers: body ? { "Content-Type": "application/json" } : {} }, status, result);
    } catch (error) {
      if (error.name === "AbortError") status.textContent = "stopped";
      else {
        status.textContent = `${error.status || "failed"}`;
        result.textContent = error.message + (error.param ? `\nfield: ${error.param}` : "");
      }
    }
    controller = null;
    send.textContent = "Send";
  };
  return element("form", { className: "try", onsubmit: (event) => {
    event.preventDefault();
    run();
  } }, ...inputs.map(([, input]) => input), body, element("div", { className: "try-row" }, send, status), result);
}

function target(path, inputs) {
  const query = new URLSearchParams();
  let filled = path;
  for (const [parameter, input] of inputs) {
    if (parameter.in === "path") filled = filled.replace(`{${parameter.name}}`, encodeURIComponent(input.value));
    else if (input.value) query.set(parameter.name, input.value);
  }
  return query.size ? `${filled}?${query}` : filled;
}

async function follow(url, options, status, result) {
  status.textContent = "…";
  const response = await request(url, options);
  status.textContent = `${response.status} ${response.headers.get("Content-Type") ?? ""}`;
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    text = (text + value).slice(-MAX_SHOWN);
    result.textContent = text;
    result.scrollTop = result.scrollHeight;
  }
  try {
    result.textContent = JSON.stringify(JSON.parse(text), null, 2).slice(0, MAX_SHOWN);
    result.scrollTop = 0;
  } catch { /* no JSON: shown as it came */ }
}
