// Small helpers to build a page without ever parsing text as HTML.

/** An element with properties, dataset entries and children; text is always a text node. */
export function element(name, properties = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("aria-") || key === "role" || key === "for") node.setAttribute(key, value);
    else if (key === "data") Object.assign(node.dataset, value);
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node[key] = value;
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** A button that says what it does. */
export function button(label, onclick, properties = {}) {
  return element("button", { type: "button", className: "small", onclick, ...properties }, label);
}

/** Copies text, and says so on the button for a moment. */
export async function copyText(text, source) {
  const before = source.textContent;
  try {
    await navigator.clipboard.writeText(text);
    source.textContent = "Copied";
  } catch {
    source.textContent = "Cannot copy";
  }
  setTimeout(() => { source.textContent = before; }, 1200);
}

/** The value of a CSS custom property, for canvases. */
export function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

/** A canvas's context at the screen's resolution, cleared; sizes are CSS pixels. */
export function clearedCanvas(canvas) {
  const { clientWidth: width, clientHeight: height } = canvas;
  const scale = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
  }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

const tip = () => document.getElementById("tip");

/** Shows nodes beside a point of the window, inside it. */
export function showTip(x, y, ...children) {
  const box = tip();
  box.replaceChildren(...children);
  box.hidden = false;
  const { width, height } = box.getBoundingClientRect();
  box.style.left = `${Math.max(4, Math.min(x + 12, innerWidth - width - 8))}px`;
  box.style.top = `${y + 18 + height > innerHeight ? Math.max(4, y - height - 10) : y + 18}px`;
}

export function hideTip() {
  tip().hidden = true;
}
