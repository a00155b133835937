// The live view of the engine: follows /v1/engine/events while it can be seen, and not a moment longer.

import { events, request } from "/web/api.js";
import { drawHistogram, drawMap, drawRates, drawSteps, duration, quantile, stepAt } from "/web/charts.js";
import { element, hideTip, showTip } from "/web/dom.js";

const MINUTE = 60;
const MAX_STEPS = 400;
const number = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

export class EngineView {
  constructor(panel, onState) {
    this.panel = panel;
    this.onState = onState;
    this.controller = null;
    this.steps = [];
    this.samples = [];
    this.frames = []; // [seconds, frame] of the last minute, for what the histograms gained
    this.build();
    document.addEventListener("themechange", () => this.redraw());
    window.addEventListener("resize", () => this.redraw());
  }

  build() {
    const canvas = (name, label) => (this[name] = element("canvas", { className: name, role: "img", "aria-label": label }));
    const legend = (...items) => element("div", { className: "legend" },
      ...items.map(([name, text]) => element("span", {}, element("i", { className: `swatch ${name}` }), text)));
    const card = (title, ...children) => element("section", { className: "card" }, element("h2", {}, title), ...children);
    this.problem = element("p", { className: "problem", role: "alert", hidden: true });
    this.facts = element("dl", { className: "facts" });
    this.rateText = element("p", { className: "figures" });
    this.kvText = element("p", { className: "figures" });
    this.requests = element("div", { className: "scroll" });
    this.ttftText = element("p", { className: "figures" });
    this.itlText = element("p", { className: "figures" });
    this.panel.append(this.problem, this.facts,
      card("Tokens per second", this.rateText, canvas("rates", "tokens per second over the last minute"),
        legend(["prefill", "prompts"], ["decode", "answers"])),
      card("Last steps", canvas("bars", "tokens of the last steps"),
        legend(["prefill", "prefill"], ["decode", "decode"], ["right", "drafts right"], ["wrong", "wrong"])),
      card("KV blocks", this.kvText, canvas("map", "map of the KV blocks"),
        legend(["kv-free", "free"], ["kv-cached", "cached"], ["kv-used", "used"], ["kv-shared", "shared"])),
      card("Requests", this.requests),
      element("div", { className: "pair" },
        card("First token", this.ttftText, canvas("ttft", "histogram of the time to the first token")),
        card("Between tokens", this.itlText, canvas("itl", "histogram of the time between tokens"))));
    this.bars.addEventListener("pointermove", (event) => this.explain(event));
    this.bars.addEventListener("pointerleave", hideTip);
  }

  /** Begins to follow; again and again, as long as it is not stopped. */
  async start() {
    if (this.controller) return;
    const controller = this.controller = new AbortController();
    while (!controller.signal.aborted) {
      try {
        const response = await request("/v1/engine/events", { signal: controller.signal });
        for await (const data of events(response)) {
          if (controller.signal.aborted) return;
          this.take(JSON.parse(data));
        }
        if (!controller.signal.aborted) this.fail("The server ended the stream; trying again.");
      } catch (error) {
        if (controller.signal.aborted) return;
        this.fail(error.message);
        if (error.status === 401) this.stop(); // nobody gave a key: the next look asks again
      }
      await new Promise((resolve) => setTimeout(resolve, 2000));
    }
  }

  stop() {
    this.controller?.abort();
    this.controller = null;
  }

  fail(message) {
    this.problem.hidden = false;
    this.problem.textContent = message;
    this.onState("unreachable");
  }

  take(frame) {
    this.problem.hidden = true;
    this.onState(frame.state, frame.model);
    if (frame.steps.length && frame.steps[0].step <= (this.steps.at(-1)?.step ?? -1)) {
      const known = this.steps.at(-1).step;
      const fresh = frame.steps.filter((step) => step.step > known);
      // Nothing is newer where the server began anew.
      if (fresh.length || frame.steps.at(-1).step === known) this.steps.push(...fresh);
      else this.steps = frame.steps;
    } else this.steps.push(...frame.steps);
    this.steps = this.steps.slice(-MAX_STEPS);
    this.samples.push([frame.time, frame.input_tokens_per_second, frame.output_tokens_per_second]);
    this.samples = this.samples.filter((sample) => sample[0] > frame.time - MINUTE);
    if (this.frame && frame.output_tokens < this.frame.output_tokens) this.frames = [];
    this.frames.push([frame.time, frame]);
    while (this.frames[0][0] < frame.time - MINUTE) this.frames.shift();
    this.frame = frame;
    this.redraw();
  }

  redraw() {
    const { frame } = this;
    if (!frame || !this.panel.offsetWidth) return;
    this.showFacts(frame);
    this.rateText.textContent = `${number.format(frame.output_tokens_per_second)} out · ${number.format(frame.input_tokens_per_second)} in`;
    drawRates(this.rates, this.samples, frame.time, MINUTE);
    drawSteps(this.bars, this.steps);
    const last = this.steps.at(-1);
    if (last) this.bars.setAttribute("aria-label", `last step: ${last.prefill_tokens} prefill, ${last.decode_tokens} decode tokens, ${last.milliseconds} ms`);
    if (frame.kv) this.showKv(frame.kv);
    this.showRequests(frame);
    this.showHistogram("time_to_first_token", this.ttft, this.ttftText);
    this.showHistogram("inter_token", this.itl, this.itlText);
  }

  showFacts(frame) {
    const facts = [["running", `${frame.num_running} / ${frame.max_running}`], ["waiting", frame.num_waiting],
      ["tokens out", number.format(frame.output_tokens)], ["preempted", frame.preemptions],
      ["worker restarts", frame.worker_restarts], ["servd", frame.version]];
    this.facts.replaceChildren(...facts.map(([name, value]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, String(value)))));
  }

  showKv(kv) {
    const share = 100 * kv.used / kv.num_blocks;
    const cell = kv.blocks_per_cell > 1 ? `; a square is ${kv.blocks_per_cell} blocks` : "";
    this.kvText.textContent = `${number.format(share)} % used: ${kv.used} used (${kv.shared} shared), ${kv.cached} cached, ` +
      `${kv.free} free of ${kv.num_blocks} blocks of ${kv.block_size} tokens${cell}`;
    drawMap(this.map, kv);
    this.map.setAttribute("aria-label", this.kvText.textContent);
  }

  showRequests(frame) {
    const all = [...frame.running, ...frame.waiting];
    if (!all.length && !frame.num_running && !frame.num_waiting) {
      this.requests.replaceChildren(element("p", { className: "note" }, "None now."));
      return;
    }
    const rows = all.slice(0, 40).map((item) => element("tr", {},
      element("td", { className: "id", title: item.id }, item.id.replace(/^([a-z]+-)(.{6}).*?(#\d+)?$/, "$1$2$3")),
      element("td", {}, element("span", { className: `phase ${item.state}` }, item.state)),
      element("td", { className: "n" }, item.cached_tokens ? `${item.prompt_tokens} (${item.cached_tokens})` : String(item.prompt_tokens)),
      element("td", { className: "n" }, String(item.output_tokens)),
      element("td", { className: "n" }, `${item.age_seconds.toFixed(1)} s`)));
    const head = ["id", "state", "prompt (cached)", "out", "age"].map((name, i) => element("th", { className: i > 1 ? "n" : "", scope: "col" }, name));
    this.requests.replaceChildren(element("table", { className: "requests" },
      element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows)));
    const hidden = frame.num_running + frame.num_waiting - rows.length;
    if (hidden > 0) this.requests.append(element("p", { className: "note" }, `and ${hidden} more`));
  }

  /** What the last minute brought, or everything if it brought nothing. */
  showHistogram(name, canvas, text) {
    const now = this.frame[name];
    const before = this.frames[0][1][name];
    let counts = now.counts.map((count, i) => count - before.counts[i]);
    let span = "last minute";
    if (!counts.some(Boolean)) {
      counts = now.counts;
      span = "since the start";
    }
    drawHistogram(canvas, now.bounds, counts);
    const bound = (share) => {
      const seconds = quantile(now.bounds, counts, share);
      return seconds === Infinity ? "more" : duration(seconds);
    };
    const isEmpty = !counts.some(Boolean);
    text.textContent = isEmpty ? "" : `half ≤ ${bound(0.5)} · 95 % ≤ ${bound(0.95)} · ${span}`;
    canvas.setAttribute("aria-label", `${canvas.className}: ${text.textContent || "nothing yet"}`);
  }

  explain(event) {
    const step = stepAt(this.bars, this.steps, event.offsetX);
    if (!step) {
      hideTip();
      return;
    }
    const lines = [`step ${step.step}: ${step.requests} requests, ${step.milliseconds} ms`,
      `${step.prefill_tokens} prefill · ${step.decode_tokens} decode · ${step.accepted_tokens} of ${step.draft_tokens} drafts right`,
      ...step.parts.slice(0, 8).map(([id, prefill, decode, right]) =>
        `${id.replace(/^([a-z]+-.{6}).*?(#\d+)?$/, "$1$2")}  ${prefill ? `prefill ${prefill}` : `decode ${decode + right}`}`)];
    const hidden = step.requests - Math.min(step.parts.length, 8);
    if (hidden > 0) lines.push(`and ${hidden} more`);
    showTip(event.clientX, event.clientY, ...lines.map((line) => element("div", {}, line)));
  }
}
