// What is loaded and how busy the server is; asked again every few seconds while it is looked at.

import { ask } from "./calls.js";
import { at, make, many, size, whole } from "./elements.js";

const EVERY = 2000; // ms
const MOST = 200; // adapters of the table
let stop = null;
let before = null; // {time, counts}
let filter = "";

// Keep the panel up to date until it is left; `described` is called with each description.
export function watch(described) {
  leave();
  const ending = new AbortController();
  stop = ending;
  const { signal } = ending;
  const look = async () => {
    while (!signal.aborted) {
      if (!document.hidden) {
        const [description, statistics] = await Promise.all([
          ask("describe", { signal, waiting }), ask("statistics", { signal }),
        ]);
        described(description);
        draw(description, statistics);
      }
      await new Promise(resolve => setTimeout(resolve, EVERY));
    }
  };
  look().catch(error => { if (error.name !== "AbortError") waiting(error.message); });
}

export function leave() {
  stop?.abort();
  stop = null;
}

function waiting(text) {
  at("waiting").textContent = text;
  at("waiting").hidden = !text;
}

function draw(description, statistics) {
  const panel = at("loaded");
  if (!panel.firstChild) panel.append(make("div", { id: "busy" }), make("div", { id: "served-facts" }), make("div", { id: "adapters" }));
  at("busy").replaceChildren(...busy(statistics));
  at("served-facts").replaceChildren(...base(description));
  adapters(at("adapters"), description);
}

function busy({ counts, gauges }) {
  const now = performance.now(), rate = name => perSecond(name, counts, now);
  const facts = [
    ["Texts a second", rate("items_text")], ["Images a second", rate("items_image")],
    ["Waiting", many((gauges.queue_text ?? 0) + (gauges.queue_image ?? 0), "item")],
    ["Wait now", `${(gauges.queue_seconds ?? 0).toFixed(2)} s`],
    ["Adapters in memory", `${whole(gauges.adapters_loaded ?? 0)}, ${size(gauges.adapter_bytes ?? 0)}`],
    ["Memory of the process", gauges.rss_bytes ? size(gauges.rss_bytes) : "not told"],
    ["Refused, expired", `${whole(counts.rejected ?? 0)}, ${whole(counts.expired ?? 0)}`],
  ];
  before = { time: now, counts };
  return [make("h2", { textContent: "Busy" }), make("dl", { className: "tiles" },
    ...facts.map(([name, value]) => make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value }))))];
}

function perSecond(name, counts, now) {
  if (!before) return "…";
  const passed = (now - before.time) / 1000, done = (counts[name] ?? 0) - (before.counts[name] ?? 0);
  return done < 0 ? "…" : (done / passed).toFixed(done ? 1 : 0);
}

function base(description) {
  const facts = {
    Base: description.base, Computes: `on ${description.device} in ${description.dtype}`,
    Features: `${description.dim} wide`, Context: many(description.context_length, "token"), Fingerprint: description.fingerprint,
    Folders: description.folders.map(folder => `${folder.name} (${many(folder.rows, "row")})`).join(", ") || "none",
  };
  return [make("h2", { textContent: "Base" }), make("dl", { className: "facts" },
    ...Object.entries(facts).flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", { textContent: value })]))];
}

function adapters(root, { adapters: all }) {
  if (!root.firstChild) {
    const field = make("input", { id: "adapter-filter", type: "search", autocomplete: "off", placeholder: "Part of a name" });
    root.append(make("h2", { textContent: "Adapters" }), make("p", { className: "row" }, make("label", { htmlFor: field.id, textContent: "Show only" }), field),
      make("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Adapters" }), make("p", { className: "quiet" }));
    field.addEventListener("input", () => { filter = field.value.trim().toLowerCase(); });
  }
  const shown = all.filter(adapter => adapter.name.toLowerCase().includes(filter));
  root.querySelector(".row").hidden = all.length < 10;
  root.querySelector(".scroll").replaceChildren(...(shown.length ? [table(shown.slice(0, MOST))] : []));
  const left = shown.length - MOST;
  root.querySelector(".quiet").textContent = all.length === 0 ? "None are registered: start the server with --adapters NAME=PATH."
    : left > 0 ? `and ${whole(left)} more` : `${whole(shown.length)} of ${many(all.length, "adapter")}`;
}

function table(shown) {
  const head = ["Name", "State", "Rank", "Targets", "Towers", "Memory", "Classes", "Items"];
  const rows = shown.map(adapter => make("tr", {},
    make("th", { scope: "row", textContent: adapter.name }),
    make("td", { className: `words ${adapter.state}`, textContent: adapter.error ? `${adapter.state}: ${adapter.error}` : adapter.state }),
    ...[adapter.rank ?? "", adapter.targets, adapter.towers.join(", "), adapter.nbytes ? size(adapter.nbytes) : "",
      adapter.classes.length || "", whole(adapter.requests)]
      .map((value, index) => make("td", { className: index === 1 || index === 2 ? "words" : "", textContent: value }))));
  return make("table", {}, make("thead", {}, make("tr", {}, ...head.map((name, index) =>
    make("th", { scope: "col", className: [0, 1, 3, 4].includes(index) ? "words" : "", textContent: name })))), make("tbody", {}, ...rows));
}
