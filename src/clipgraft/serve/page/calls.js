// Ask the server, with the key if there is one; wait and ask again while it is busy or away.

import { at } from "./elements.js";

const KEPT = "clipgraft.key";
const AWAY = 5; // seconds until a server that does not answer is asked again

let key = kept();
let asking = null;

export class CallError extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

// Return the response of a path below this page's address; `waiting` is told why and how long, and "" at the end.
export async function call(path, { body, signal, waiting = () => {} } = {}) {
  for (;;) {
    const used = key;
    const response = await reached(path, body, signal, used);
    if (response?.ok) { waiting(""); return response; }
    const { message, code } = response ? await fault(response) : { message: "The server does not answer" };
    signal?.throwIfAborted();
    if (response?.status === 401) { await keyAfter(used); continue; }
    if (response && response.status !== 429 && response.status !== 503) {
      waiting("");
      throw new CallError(response.status, message, code);
    }
    const asked = Number(response ? response.headers.get("Retry-After") : AWAY);
    await pause(asked > 0 ? Math.min(asked, 3600) : AWAY, message, signal, waiting);
  }
}

export const ask = async (path, options) => (await call(path, options)).json();

async function reached(path, body, signal, used) {
  const headers = used ? { Authorization: `Bearer ${used}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const options = { headers, signal, credentials: "same-origin" };
  if (body) Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  try {
    return await fetch(new URL(path, document.baseURI), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    return null;
  }
}

async function fault(response) {
  try {
    const { error } = await response.json();
    return { message: error.message, code: error.code };
  } catch {
    return { message: `The server answered ${response.status} ${response.statusText}`.trim() };
  }
}

async function pause(seconds, message, signal, waiting) {
  // The message of the server says itself when to come back; the seconds that are left are told instead.
  const why = message.replace(/; try again in [\d.]+ s$/, "");
  for (let left = Math.ceil(seconds); left > 0; left -= 1) {
    waiting(`${why}. Trying again in ${left} s.`);
    await new Promise(resolve => setTimeout(resolve, 1000));
    signal?.throwIfAborted();
  }
  waiting(`${why}. Trying again now.`);
}

function kept() {
  try {
    return sessionStorage.getItem(KEPT) ?? "";
  } catch {
    return "";
  }
}

// Ask for a key once, however many calls wait for it; a key given since is tried first.
function keyAfter(used) {
  if (used !== key) return Promise.resolve();
  asking ??= new Promise(resolve => {
    const form = at("key"), field = at("key-value");
    at("key-why").textContent = used ? "This key is not accepted; try another." : "This server asks for a key.";
    form.hidden = false;
    field.value = "";
    field.focus();
    form.addEventListener("submit", event => {
      event.preventDefault();
      key = field.value.trim();
      try {
        sessionStorage.setItem(KEPT, key);
      } catch { /* without storage the key lasts as long as the page */ }
      form.hidden = true;
      field.value = "";
      asking = null;
      at("text").focus();
      resolve();
    }, { once: true });
  });
  return asking;
}
