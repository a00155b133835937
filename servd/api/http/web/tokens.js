// An answer as its tokens, shaded by how likely each was; what else was likely on hover and on focus.

import { element, hideTip, showTip } from "/web/dom.js";

/** entries: [token, logprob, [[token, logprob], …]] in order. */
export function tokenView(entries) {
  const box = element("div", { className: "tokens", tabIndex: 0, role: "group",
    "aria-label": `${entries.length} tokens; arrow keys go from one to the next` });
  const spans = entries.map((entry, i) => element("span", { className: `token p${shade(entry[1])}`, data: { i } }, entry[0] || "∅"));
  box.append(...spans);
  let at = -1;
  const show = (i) => {
    if (at >= 0) spans[at].classList.remove("at");
    at = i;
    if (i < 0) return hideTip();
    spans[i].classList.add("at");
    const { left, bottom } = spans[i].getBoundingClientRect();
    return showTip(left - 12, bottom - 12, details(entries[i]));
  };
  box.addEventListener("pointerover", (event) => event.target.dataset.i && show(Number(event.target.dataset.i)));
  box.addEventListener("pointerleave", () => show(-1));
  box.addEventListener("blur", () => show(-1));
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !spans.length) return;
    event.preventDefault();
    show(Math.min(Math.max(at + step, 0), spans.length - 1));
  });
  return box;
}

/** 0 (sure) to 4 (a surprise). */
function shade(logprob) {
  const p = Math.exp(logprob);
  return p > 0.9 ? 0 : p > 0.6 ? 1 : p > 0.3 ? 2 : p > 0.1 ? 3 : 4;
}

function details([token, logprob, top]) {
  const rows = top.some(([other]) => other === token) ? top : [[token, logprob], ...top];
  const body = rows.map(([other, value]) => {
    const bar = element("span", { className: "bar" }, element("i"));
    bar.firstChild.style.width = `${100 * Math.exp(value)}%`;
    return element("div", { className: other === token ? "chosen" : "" },
      element("code", {}, visible(other)), bar, element("span", {}, percent(value)));
  });
  return element("div", { className: "alternatives" }, ...body);
}

const visible = (token) => token.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";

function percent(logprob) {
  const p = 100 * Math.exp(logprob);
  return p >= 99.95 ? "100 %" : p >= 0.1 ? `${p.toFixed(1)} %` : "< 0.1 %";
}
