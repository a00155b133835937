// Markdown as models write it, to DOM nodes. Text only ever becomes text nodes; links lead to http(s) alone.

import { button, copyText, element } from "/web/dom.js";

// Each run is bounded, so that no line takes more than linear time.
const INLINE = new RegExp(
  "`([^`\\n]{1,500})`|\\*\\*([^*\\n]{1,500})\\*\\*|__([^_\\n]{1,500})__|(?<![\\w*])\\*([^*\\s][^*\\n]{0,500})\\*" +
  "|(?<![\\w_])_([^_\\s][^_\\n]{0,500})_(?!\\w)|\\[([^\\]\\n]{1,300})\\]\\((https?://[^\\s)]{1,1000})\\)", "g");
const ITEM = /^(\s{0,12})([-*+]|\d{1,9}[.)])\s+(.*)$/;

/** A fragment that shows `text`. */
export function markdown(text) {
  const lines = text.split("\n");
  const out = document.createDocumentFragment();
  let at = 0;
  while (at < lines.length) at = block(lines, at, out);
  return out;
}

function block(lines, at, out) {
  const line = lines[at];
  const fence = /^\s{0,12}(`{3,}|~{3,})\s*([\w+#.-]{0,30})/.exec(line);
  if (fence) return code(lines, at, fence, out);
  const heading = /^(#{1,6})\s+(.*)$/.exec(line);
  if (heading) {
    out.append(element(`h${Math.min(heading[1].length + 2, 6)}`, {}, inline(heading[2])));
    return at + 1;
  }
  if (/^\s*([-*_])(\s*\1){2,40}\s*$/.test(line)) {
    out.append(element("hr"));
    return at + 1;
  }
  if (ITEM.test(line)) return list(lines, at, out);
  if (line.startsWith(">")) return quote(lines, at, out);
  if (isRow(line) && isRule(lines[at + 1] ?? "")) return table(lines, at, out);
  if (line.trim() === "") return at + 1;
  let end = at + 1;
  while (end < lines.length && lines[end].trim() !== "" && !startsBlock(lines[end])) end += 1;
  const paragraph = element("p");
  lines.slice(at, end).forEach((part, i) => paragraph.append(...(i ? [element("br")] : []), inline(part)));
  out.append(paragraph);
  return end;
}

const startsBlock = (line) => /^\s{0,12}(`{3,}|~{3,})|^#{1,6}\s|^>/.test(line) || ITEM.test(line);

function code(lines, at, fence, out) {
  let end = at + 1;
  while (end < lines.length && !lines[end].trim().startsWith(fence[1])) end += 1;
  const text = lines.slice(at + 1, end).join("\n");
  const copy = button("Copy", (event) => copyText(text, event.target));
  out.append(element("div", { className: "code" },
    element("div", { className: "code-head" }, element("span", {}, fence[2] || "text"), copy),
    element("pre", { tabIndex: 0 }, element("code", {}, text))));
  return end + 1;
}

function list(lines, at, out) {
  const first = ITEM.exec(lines[at]);
  const indent = first[1].length;
  const ordered = /\d/.test(first[2]);
  const node = element(ordered ? "ol" : "ul");
  if (ordered) node.start = parseInt(first[2], 10);
  let item = null;
  while (at < lines.length) {
    const found = ITEM.exec(lines[at]);
    if (found && found[1].length > indent + 1 && item) {
      at = list(lines, at, item);
    } else if (found && found[1].length >= indent && /\d/.test(found[2]) === ordered) {
      item = element("li", {}, inline(found[3]));
      node.append(item);
      at += 1;
    } else if (item && !found && /^\s{2,}\S/.test(lines[at])) {
      item.append(" ", inline(lines[at].trim()));
      at += 1;
    } else if (lines[at].trim() === "" && ITEM.test(lines[at + 1] ?? "")) {
      at += 1;
    } else break;
  }
  out.append(node);
  return at;
}

function quote(lines, at, out) {
  let end = at;
  while (end < lines.length && lines[end].startsWith(">")) end += 1;
  const text = lines.slice(at, end).map((line) => line.replace(/^>\s?/, ""));
  const node = element("blockquote");
  text.forEach((part, i) => node.append(...(i ? [element("br")] : []), inline(part)));
  out.append(node);
  return end;
}

const isRow = (line) => line.trim().startsWith("|");
const isRule = (line) => isRow(line) && /^[\s|:-]{3,}$/.test(line);
const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

function table(lines, at, out) {
  const row = (name, line) => element("tr", {}, ...cells(line).map((cell) => element(name, {}, inline(cell))));
  const body = element("tbody");
  let end = at + 2;
  while (end < lines.length && isRow(lines[end])) body.append(row("td", lines[end++]));
  out.append(element("div", { className: "scroll" },
    element("table", {}, element("thead", {}, row("th", lines[at])), body)));
  return end;
}

function inline(text) {
  const out = document.createDocumentFragment();
  let last = 0;
  for (const match of text.matchAll(INLINE)) {
    out.append(text.slice(last, match.index));
    last = match.index + match[0].length;
    const [, mono, strong, strong2, em, em2, label, href] = match;
    if (mono !== undefined) out.append(element("code", {}, mono));
    else if (label !== undefined) {
      out.append(element("a", { href, target: "_blank", rel: "noopener noreferrer nofollow" }, label));
    } else if (strong ?? strong2) out.append(element("strong", {}, strong ?? strong2));
    else out.append(element("em", {}, em ?? em2));
  }
  out.append(text.slice(last));
  return out;
}
