// Drawings of the engine on canvases: steps, speed, latencies, the KV map. Colours come from the style sheet.

import { clearedCanvas, color } from "/web/dom.js";

const STATES = ["free", "cached", "used", "shared"];

/** Steps as stacked bars, oldest left; heights go with the square root, so that one token shows beside a thousand. */
export function drawSteps(canvas, steps) {
  const { context, width, height } = clearedCanvas(canvas);
  const bar = 5;
  const shown = steps.slice(-Math.floor(width / (bar + 1)));
  const highest = Math.max(16, ...shown.map((step) => total(step)));
  const scale = (height - 14) / Math.sqrt(highest);
  context.font = "11px system-ui";
  context.fillStyle = color("muted");
  context.fillText(shown.length ? `${highest} tokens` : "no steps yet", 2, 10);
  let x = width - shown.length * (bar + 1);
  const colors = [color("decode"), color("right"), color("wrong"), color("prefill")];
  for (const step of shown) {
    const all = total(step);
    let y = height;
    const full = Math.sqrt(all) * scale;
    pieces(step).forEach((count, i) => {
      if (!count) return;
      const part = Math.max(1, full * count / all);
      context.fillStyle = colors[i];
      context.fillRect(x, y - part, bar, part);
      y -= part;
    });
    x += bar + 1;
  }
}

const pieces = (step) => [step.decode_tokens, step.accepted_tokens, step.draft_tokens - step.accepted_tokens, step.prefill_tokens];
const total = (step) => pieces(step).reduce((sum, count) => sum + count, 0);

/** The step under an x of the canvas. */
export function stepAt(canvas, steps, x) {
  const back = Math.floor((canvas.clientWidth - x) / 6);
  return steps[steps.length - 1 - back];
}

/** Lines of tokens per second over the last minute; samples: [[seconds, in, out], …]. */
export function drawRates(canvas, samples, now, span) {
  const { context, width, height } = clearedCanvas(canvas);
  [["prefill", 1], ["decode", 2]].forEach(([name, column]) => {
    const highest = Math.max(1, ...samples.map((sample) => sample[column]));
    context.beginPath();
    samples.forEach((sample, i) => {
      const x = width * (1 - (now - sample[0]) / span);
      const y = height - 2 - (height - 6) * sample[column] / highest;
      if (i) context.lineTo(x, y);
      else context.moveTo(x, y);
    });
    context.strokeStyle = color(name);
    context.lineWidth = 1.5;
    context.stroke();
  });
  context.fillStyle = color("line");
  context.fillRect(0, height - 1, width, 1);
}

/** Bars of a histogram, from the first to the last bucket that holds something. */
export function drawHistogram(canvas, bounds, counts) {
  const { context, width, height } = clearedCanvas(canvas);
  const filled = counts.map((count, i) => (count ? i : -1)).filter((i) => i >= 0);
  context.font = "11px system-ui";
  context.fillStyle = color("muted");
  if (!filled.length) {
    context.fillText("nothing yet", 2, height / 2 + 4);
    return;
  }
  const low = Math.max(0, filled[0] - 1);
  const high = Math.min(counts.length - 1, filled[filled.length - 1] + 1);
  const shown = counts.slice(low, high + 1);
  const highest = Math.max(...shown);
  const step = width / shown.length;
  shown.forEach((count, i) => {
    const size = (height - 18) * count / highest;
    context.fillStyle = color("decode");
    context.fillRect(i * step + 1, height - 15 - size, step - 2, count ? Math.max(size, 1) : 0);
    const label = i + low < bounds.length ? duration(bounds[i + low]) : "more";
    context.fillStyle = color("muted");
    if (step > 44 || i % Math.ceil(44 / step) === 0) context.fillText(label, i * step + 2, height - 3);
  });
}

export const duration = (seconds) => (seconds < 1 ? `${+(1000 * seconds).toPrecision(3)} ms` : `${+seconds.toPrecision(3)} s`);

/** The bucket bound under which a share of all values lies; null without values. */
export function quantile(bounds, counts, share) {
  const all = counts.reduce((sum, count) => sum + count, 0);
  if (!all) return null;
  let seen = 0;
  for (let i = 0; i < counts.length; i += 1) {
    seen += counts[i];
    if (seen >= share * all) return i < bounds.length ? bounds[i] : Infinity;
  }
  return Infinity;
}

/** The KV blocks as small squares, in the order of their numbers. */
export function drawMap(canvas, kv) {
  const bytes = Uint8Array.from(atob(kv.map), (char) => char.charCodeAt(0));
  const width = canvas.clientWidth;
  const size = kv.cells > 2000 ? 4 : kv.cells > 600 ? 7 : 10;
  const columns = Math.max(1, Math.floor(width / size));
  canvas.style.height = `${Math.ceil(kv.cells / columns) * size}px`;
  const { context } = clearedCanvas(canvas);
  const colors = STATES.map((state) => color(`kv-${state}`));
  for (let i = 0; i < kv.cells; i += 1) {
    context.fillStyle = colors[bytes[i >> 2] >> 2 * (i & 3) & 3];
    context.fillRect((i % columns) * size, Math.floor(i / columns) * size, size - 1, size - 1);
  }
}
