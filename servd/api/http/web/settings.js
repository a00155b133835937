// The parameters of a request, as fields that are remembered; and the request they make.

import { element } from "/web/dom.js";

const STORE = "servd.settings";
const FIELDS = [
  { name: "system", label: "System prompt", kind: "text", rows: 3 },
  { name: "temperature", label: "Temperature", kind: "number", min: 0, max: 100, step: 0.1, hint: "0 is greedy" },
  { name: "top_p", label: "Top p", kind: "number", min: 0, max: 1, step: 0.05 },
  { name: "top_k", label: "Top k", kind: "integer", min: 0, hint: "0 keeps all" },
  { name: "min_p", label: "Min p", kind: "number", min: 0, max: 1, step: 0.01 },
  { name: "max_tokens", label: "Max tokens", kind: "integer", min: 1 },
  { name: "seed", label: "Seed", kind: "integer", hint: "to repeat" },
  { name: "frequency_penalty", label: "Frequency penalty", kind: "number", min: -2, max: 2, step: 0.1 },
  { name: "presence_penalty", label: "Presence penalty", kind: "number", min: -2, max: 2, step: 0.1 },
  { name: "stop", label: "Stop strings", kind: "text", rows: 2, hint: "one a line" },
  { name: "schema", label: "JSON schema of the answer", kind: "text", rows: 4, mono: true, hint: "followed strictly" },
  { name: "extra", label: "More fields, as JSON", kind: "text", rows: 2, mono: true, hint: 'as {"min_tokens": 20}' },
];

let values = {};
try {
  values = JSON.parse(localStorage.getItem(STORE)) ?? {};
} catch { /* an old or broken store: begin anew */ }

export const setting = (name) => values[name] ?? "";

function set(name, value) {
  if (value === "" || value === false) delete values[name];
  else values[name] = value;
  localStorage.setItem(STORE, JSON.stringify(values));
  document.dispatchEvent(new Event("settingschange"));
}

/** Fills the panel; the model's name comes later. */
export function buildSettings(panel) {
  const form = element("form", { className: "settings", onsubmit: (event) => event.preventDefault() });
  for (const field of FIELDS) form.append(row(field));
  const tokens = element("input", { type: "checkbox", id: "set-tokens", checked: Boolean(values.tokens),
    onchange: (event) => set("tokens", event.target.checked) });
  form.append(element("label", { className: "check wide" }, tokens,
    element("span", {}, "Token probabilities ", element("small", {}, "show each answer as tokens, with what else was likely"))));
  const reset = element("button", { type: "button", className: "small wide", onclick: () => {
    values = {};
    set("system", "");
    panel.replaceChildren();
    buildSettings(panel);
  } }, "Back to the model's defaults");
  form.append(reset);
  panel.append(form);
}

function row(field) {
  const id = `set-${field.name}`;
  const isText = field.kind === "text";
  const input = element(isText ? "textarea" : "input", {
    id, value: setting(field.name), spellcheck: field.name === "system",
    oninput: () => set(field.name, input.value), className: field.mono ? "mono" : "",
  });
  if (isText) input.rows = field.rows;
  else {
    Object.assign(input, { type: "number", step: field.step ?? 1, placeholder: "default", inputMode: "decimal" });
    if (field.min !== undefined) input.min = field.min;
    if (field.max !== undefined) input.max = field.max;
  }
  const label = element("label", { for: id }, field.label, field.hint ? element("small", {}, ` ${field.hint}`) : null);
  return element("div", { className: isText ? "field wide" : "field" }, label, input);
}

/** The body of a chat completion. Throws an Error that names the field whose text is no JSON. */
export function requestBody(messages, model) {
  const system = setting("system").trim() ? [{ role: "system", content: setting("system") }] : [];
  const body = { model, messages: [...system, ...messages], stream: true, stream_options: { include_usage: true } };
  for (const { name, kind } of FIELDS) {
    if (kind !== "text" && setting(name) !== "") body[name] = Number(setting(name));
  }
  const stops = setting("stop").split("\n").filter((line) => line !== "");
  if (stops.length) body.stop = stops;
  if (setting("schema").trim()) {
    const schema = parsed("JSON schema of the answer", setting("schema"));
    body.response_format = { type: "json_schema", json_schema: { name: "answer", schema, strict: true } };
  }
  if (setting("tokens")) Object.assign(body, { logprobs: true, top_logprobs: 5 });
  if (setting("extra").trim()) Object.assign(body, parsed("More fields, as JSON", setting("extra")), { stream: true });
  return body;
}

function parsed(label, text) {
  let value = null;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new Error(`“${label}” is not valid JSON: ${error.message}`);
  }
  if (value === null || typeof value !== "object" || Array.isArray(value)) {
    throw new Error(`“${label}” is not a JSON object`);
  }
  return value;
}
