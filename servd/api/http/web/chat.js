// The conversation: sent, streamed, stopped, edited, made again, and kept across reloads.

import { ApiError, events, request } from "/web/api.js";
import { button, copyText, element } from "/web/dom.js";
import { markdown } from "/web/markdown.js";
import { requestBody } from "/web/settings.js";
import { tokenView } from "/web/tokens.js";

const STORE = "servd.chat";
const SUGGESTIONS = ["Explain paged attention in three sentences.", "Write a haiku about a busy queue.",
  "List five uses of a prefix cache."];

/** One conversation in the page. `model()` names the served model. */
export class Chat {
  constructor(model) {
    this.model = model;
    this.box = document.getElementById("messages");
    this.input = document.getElementById("input");
    this.sendButton = document.getElementById("send");
    this.editingNote = document.getElementById("editing");
    this.turns = stored();
    this.controller = null;
    this.editing = null;
    this.followsEnd = true;
    this.listen();
    this.draw();
  }

  get isBusy() {
    return this.controller !== null;
  }

  /** The messages that the next request would send, with what is typed. */
  nextMessages() {
    const text = this.input.value.trim() || "Hello!";
    return [...messagesOf(this.turns.slice(0, this.editing ?? undefined)), { role: "user", content: text }];
  }

  listen() {
    const form = document.getElementById("composer");
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.isBusy) this.stop();
      else this.submit();
    });
    this.input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        if (!this.isBusy) this.submit();
      }
    });
    this.input.addEventListener("input", () => this.fit());
    document.addEventListener("keydown", (event) => {
      if (document.querySelector("dialog[open]")) return;
      if (event.key === "Escape") {
        if (this.isBusy) this.stop();
        else this.cancelEdit();
      } else if (event.key === "/" && !event.target.closest("input, textarea, select")) {
        event.preventDefault();
        document.dispatchEvent(new CustomEvent("showview", { detail: "chat" }));
        this.input.focus();
      }
    });
    document.getElementById("edit-cancel").addEventListener("click", () => this.cancelEdit());
    document.getElementById("clear").addEventListener("click", () => this.clear());
    this.box.addEventListener("scroll", () => {
      this.followsEnd = this.box.scrollHeight - this.box.scrollTop - this.box.clientHeight < 60;
    });
  }

  fit() {
    this.input.style.height = "auto";
    this.input.style.height = `${Math.min(this.input.scrollHeight + 2, 240)}px`;
  }

  submit() {
    const text = this.input.value.trim();
    if (!text) return;
    if (this.editing !== null) this.turns.length = this.editing;
    this.cancelEdit();
    this.input.value = "";
    this.fit();
    this.turns.push({ role: "user", content: text });
    this.answer();
  }

  stop() {
    this.controller?.abort();
  }

  clear() {
    this.stop();
    this.turns = [];
    this.cancelEdit();
    this.save();
    this.draw();
    this.input.focus();
  }

  edit(index) {
    this.editing = index;
    this.editingNote.hidden = false;
    this.input.value = this.turns[index].content;
    this.fit();
    this.input.focus();
  }

  cancelEdit() {
    if (this.editing === null) return;
    this.editing = null;
    this.editingNote.hidden = true;
    this.input.value = "";
    this.fit();
  }

  /** Makes the answer at `index` (the last one if not given) again. */
  regenerate(index) {
    if (this.isBusy) return;
    this.turns.length = index;
    this.answer();
  }

  /** Asks for the answer to the turns as they are. */
  async answer() {
    const turn = { role: "assistant", content: "" };
    const asked = messagesOf(this.turns);
    this.turns.push(turn);
    this.controller = new AbortController();
    this.followsEnd = true;
    this.sendButton.textContent = "Stop";
    this.draw();
    try {
      await this.stream(turn, requestBody(asked, this.model()));
    } catch (error) {
      if (error.name === "AbortError") turn.stopped = true;
      else turn.error = { message: error.message, status: error.status, param: error.param, code: error.code };
    }
    this.controller = null;
    this.sendButton.textContent = "Send";
    if (!this.turns.includes(turn)) return; // the conversation was cleared meanwhile
    this.save();
    this.draw();
  }

  async stream(turn, body) {
    const begin = performance.now();
    const response = await request("/v1/chat/completions", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
      signal: this.controller.signal,
    });
    let first = null;
    let last = begin;
    let isDone = false;
    for await (const data of events(response)) {
      if (data === "[DONE]") {
        isDone = true;
        break;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(200, chunk.error);
      if (chunk.usage) turn.usage = chunk.usage;
      const choice = chunk.choices?.[0];
      if (!choice || choice.index !== 0) continue; // more answers than one have no place here
      take(turn, choice);
      if (choice.delta.content || choice.delta.reasoning_content || choice.delta.tool_calls) {
        last = performance.now();
        first ??= last;
      }
      turn.times = { first: first === null ? null : first - begin, total: last - begin };
      this.redrawSoon(turn);
    }
    if (!isDone) throw new ApiError(0, { message: "The connection broke off before the answer was complete." });
  }

  redrawSoon(turn) {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      if (!this.isBusy || !this.lastBody) return;
      this.lastBody.replaceChildren(...body(turn, true));
      this.scroll();
    });
  }

  draw() {
    if (this.turns.length === 0) {
      const buttons = SUGGESTIONS.map((text) => button(text, () => {
        this.input.value = text;
        this.submit();
      }, { className: "suggestion" }));
      this.box.replaceChildren(element("div", { className: "empty" },
        element("h1", {}, "Ask the model something"), element("div", { className: "suggestions" }, ...buttons)));
      return;
    }
    this.box.replaceChildren(...this.turns.map((turn, index) => this.message(turn, index)));
    this.scroll();
  }

  message(turn, index) {
    const isLive = this.isBusy && index === this.turns.length - 1;
    const content = element("div", { className: "body" }, ...body(turn, isLive));
    if (isLive) this.lastBody = content;
    const node = element("article", { className: `message ${turn.role}`, "aria-label": turn.role, "aria-busy": String(isLive) }, content);
    if (turn.error) node.append(this.problem(turn.error, index));
    if (!isLive) node.append(this.footer(turn, index));
    return node;
  }

  footer(turn, index) {
    const actions = element("div", { className: "actions" });
    if (turn.content) actions.append(button("Copy", (event) => copyText(turn.content, event.target)));
    if (turn.role === "user") actions.append(button("Edit", () => !this.isBusy && this.edit(index)));
    else {
      if (!turn.error) actions.append(button("Regenerate", () => this.regenerate(index)));
      if (turn.tokens?.length) {
        actions.append(button(turn.showsTokens ? "Text" : "Tokens", () => {
          turn.showsTokens = !turn.showsTokens;
          this.save();
          this.draw();
        }, { "aria-pressed": String(Boolean(turn.showsTokens)) }));
      }
      actions.append(element("span", { className: "stats" }, stats(turn)));
    }
    return actions;
  }

  problem(error, index) {
    return element("div", { className: "problem", role: "alert" },
      element("strong", {}, title(error)), element("p", {}, error.message),
      element("div", {}, button("Try again", () => this.regenerate(index))));
  }

  scroll() {
    if (this.followsEnd) this.box.scrollTop = this.box.scrollHeight;
  }

  save() {
    try {
      localStorage.setItem(STORE, JSON.stringify(this.turns));
    } catch { // full: the tokens are what takes the room
      localStorage.setItem(STORE, JSON.stringify(this.turns.map(({ tokens, ...turn }) => turn).slice(-40)));
    }
  }
}

function stored() {
  try {
    const turns = JSON.parse(localStorage.getItem(STORE));
    return Array.isArray(turns) ? turns.filter((turn) => typeof turn?.content === "string") : [];
  } catch {
    return [];
  }
}

/** What the model is told of the turns: a failed answer is none. */
function messagesOf(turns) {
  return turns.filter((turn) => turn.role === "user" || (turn.content && !turn.error))
    .map(({ role, content }) => ({ role, content }));
}

function take(turn, choice) {
  const { delta } = choice;
  if (delta.content) turn.content += delta.content;
  if (delta.reasoning_content) turn.reasoning = (turn.reasoning ?? "") + delta.reasoning_content;
  for (const call of delta.tool_calls ?? []) {
    turn.calls ??= [];
    const known = (turn.calls[call.index] ??= { name: "", arguments: "" });
    known.name += call.function?.name ?? "";
    known.arguments += call.function?.arguments ?? "";
  }
  if (choice.finish_reason) turn.finish = choice.finish_reason;
  for (const entry of choice.logprobs?.content ?? []) {
    turn.tokens ??= [];
    turn.tokens.push([entry.token, entry.logprob, entry.top_logprobs.map((top) => [top.token, top.logprob])]);
    if (turn.showsTokens === undefined) turn.showsTokens = true;
  }
}

function body(turn, isLive) {
  if (turn.role === "user") return [element("p", { className: "pre" }, turn.content)];
  const parts = [];
  if (turn.reasoning) {
    parts.push(element("details", { className: "reasoning", open: isLive && !turn.content },
      element("summary", {}, "Thoughts"), element("p", { className: "pre" }, turn.reasoning)));
  }
  if (turn.showsTokens && turn.tokens?.length) parts.push(tokenView(turn.tokens));
  else if (turn.content) parts.push(element("div", { className: "markdown" }, markdown(turn.content)));
  for (const call of turn.calls ?? []) {
    parts.push(element("pre", { className: "call", tabIndex: 0 }, `${call.name}(${call.arguments})`));
  }
  if (isLive) parts.push(element("span", { className: "cursor", "aria-hidden": "true" }));
  else if (!parts.length && !turn.error) parts.push(element("p", { className: "note" }, turn.stopped ? "Stopped before the first token." : "The answer is empty."));
  return parts;
}

function stats(turn) {
  const shown = [];
  const count = turn.usage?.completion_tokens;
  if (turn.usage) shown.push(`${turn.usage.prompt_tokens} → ${count} tokens`);
  const { first, total } = turn.times ?? {};
  if (first) shown.push(`first after ${first < 1000 ? `${first.toFixed(0)} ms` : `${(first / 1000).toFixed(1)} s`}`);
  if (count > 1 && total > first) shown.push(`${((count - 1) / (total - first) * 1000).toFixed(1)} tokens/s`);
  if (turn.finish === "length") shown.push("cut at the limit");
  if (turn.stopped) shown.push("stopped");
  return shown.join(" · ");
}

function title(error) {
  if (error.status === undefined) return "Not sent";
  const known = { 0: "No connection", 200: "The answer broke off", 400: "The server refused this request", 401: "A key is needed",
    403: "Not allowed", 404: "Not found", 408: "Too late", 413: "Too long", 429: "The server is busy", 503: "The server is not ready" };
  const text = known[error.status] ?? (error.status >= 500 ? "The server failed" : `Error ${error.status}`);
  return error.param ? `${text}: ${error.param}` : text;
}
