// Talks to the server this page came from: the key, errors as people need them, events as they come.

const KEY = "servd.key";

/** What the server refused or failed at; `status` is 0 where it could not be reached. */
export class ApiError extends Error {
  constructor(status, body) {
    super(body?.message ?? `the server answered ${status}`);
    this.status = status;
    this.param = body?.param ?? null;
    this.code = body?.code ?? null;
  }
}

export const hasKey = () => Boolean(sessionStorage.getItem(KEY));

export function setKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

/** fetch() with the key; asks for one when the server does, and tries again. Throws ApiError, AbortError. */
export async function request(path, options = {}) {
  for (;;) {
    const headers = { ...options.headers };
    const key = sessionStorage.getItem(KEY);
    if (key) headers.Authorization = `Bearer ${key}`;
    let response;
    try {
      response = await fetch(path, { ...options, headers, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, { message: "The server cannot be reached. Is it running?" });
    }
    if (response.ok) return response;
    const body = await response.json().catch(() => null);
    if (response.status !== 401 || !(await askForKey(Boolean(key)))) {
      throw new ApiError(response.status, body?.error ?? body);
    }
  }
}

export async function getJson(path) {
  return (await request(path)).json();
}

/** The `data` of each server-sent event; comments and other fields are skipped. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

let asking = null;

/** Opens the dialog, once for all who wait; resolves to whether a key was given. */
export function askForKey(wasWrong = false) {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key-dialog");
    const input = document.getElementById("key-input");
    document.getElementById("key-problem").hidden = !wasWrong;
    input.value = "";
    dialog.returnValue = "";
    dialog.addEventListener("close", () => {
      asking = null;
      const given = dialog.returnValue === "ok" && input.value.trim();
      if (given) setKey(input.value.trim());
      document.dispatchEvent(new Event("keychange"));
      resolve(Boolean(given));
    }, { once: true });
    dialog.showModal();
    input.focus();
  });
  return asking;
}
