// Wires the playground: views, the key, the server's state.

import { askForKey, getJson, hasKey } from "/web/api.js";
import { Chat } from "/web/chat.js";
import { showCode } from "/web/code.js";
import { EngineView } from "/web/engine.js";
import { buildSettings, requestBody } from "/web/settings.js";

const VIEW = "servd.view";
const panel = (name) => document.getElementById(`view-${name}`);
const narrow = matchMedia("(max-width: 899px)");
let model = "";

buildSettings(panel("settings"));
const chat = new Chat(() => model);
const engine = new EngineView(panel("engine"), showState);

function showState(state, name) {
  if (name) model = name;
  document.getElementById("state").dataset.state = state;
  document.getElementById("state-text").textContent = state === "ready" && model ? model : state;
}

/** Shows a view; on wide screens the chat stays beside it. */
function show(name) {
  const beside = name === "chat" && !narrow.matches ? "settings" : name;
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const view = tab.dataset.view;
    const isShown = view === beside || (view === "chat" && !narrow.matches);
    const isSelected = view === (narrow.matches ? name : beside);
    tab.setAttribute("aria-selected", String(isSelected));
    tab.tabIndex = isSelected ? 0 : -1;
    panel(view).hidden = !isShown;
  }
  document.body.dataset.view = beside;
  sessionStorage.setItem(VIEW, name);
  followEngine();
  updateCode();
}

function followEngine() {
  if (!panel("engine").hidden && !document.hidden) engine.start();
  else engine.stop();
}

function updateCode() {
  if (panel("code").hidden) return;
  try {
    showCode(panel("code"), requestBody(chat.nextMessages(), model), null);
  } catch (error) {
    showCode(panel("code"), null, error.message);
  }
}

function shownTabs() {
  return [...document.querySelectorAll("[role=tab]")].filter((tab) => tab.offsetParent !== null);
}

for (const tab of document.querySelectorAll("[role=tab]")) {
  tab.addEventListener("click", () => show(tab.dataset.view));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const tabs = shownTabs();
    const next = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length];
    next.focus();
    show(next.dataset.view);
  });
}
document.addEventListener("showview", (event) => narrow.matches && show(event.detail));
document.addEventListener("visibilitychange", followEngine);
document.addEventListener("settingschange", updateCode);
document.addEventListener("keychange", () => {
  document.getElementById("key").hidden = !hasKey();
  updateCode();
  if (hasKey() && !model) connect();
});
document.getElementById("input").addEventListener("input", updateCode);
document.getElementById("key").addEventListener("click", () => askForKey());
document.getElementById("key").hidden = !hasKey();
narrow.addEventListener("change", () => show(sessionStorage.getItem(VIEW) ?? "chat"));

show(sessionStorage.getItem(VIEW) ?? "chat");
if (!narrow.matches) document.getElementById("input").focus();
await connect();

/** The model's name and whether it is ready; asks again until it is. */
async function connect() {
  for (;;) {
    try {
      const state = (await (await fetch("/health", { cache: "no-store" })).json()).state;
      showState(state);
      if (state === "ready") {
        showState(state, (await getJson("/v1/models")).data[0].id);
        updateCode();
        return;
      }
    } catch (error) {
      showState(error.status === 401 ? "a key is needed" : "unreachable");
      if (error.status === 401) return;
    }
    await new Promise((resolve) => setTimeout(resolve, 1500));
  }
}
