// Sets the theme before the first paint, so that nothing flashes. "auto" follows the system.
"use strict";

(() => {
  const NEXT = { auto: "light", light: "dark", dark: "auto" };
  const root = document.documentElement;
  const apply = (theme) => {
    root.dataset.theme = theme;
    const button = document.getElementById("theme");
    if (button) {
      button.textContent = { auto: "◐", light: "☀", dark: "☾" }[theme];
      button.title = `Theme: ${theme}`;
      button.setAttribute("aria-label", `Theme: ${theme}. Switch to ${NEXT[theme]}`);
    }
    document.dispatchEvent(new Event("themechange"));
  };
  const stored = localStorage.getItem("servd.theme");
  apply(stored in NEXT ? stored : "auto");
  document.addEventListener("DOMContentLoaded", () => {
    apply(root.dataset.theme);
    document.getElementById("theme").addEventListener("click", () => {
      const theme = NEXT[root.dataset.theme];
      localStorage.setItem("servd.theme", theme);
      apply(theme);
    });
  });
})();
