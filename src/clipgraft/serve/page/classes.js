// Give a text or a picture probabilities over classes that are typed by hand, with each of the compared weights.

import { answered, columns, using } from "./columns.js";
import { at, make, said } from "./elements.js";

const MOST = 30; // bars of a column
let running = null;

export function listen(asked) {
  at("class-form").addEventListener("submit", event => { event.preventDefault(); asked(); });
}

const typed = () => [...new Set(at("class-names").value.split("\n").map(line => line.trim()).filter(Boolean))];

// Offer the classes that adapters were trained with.
export function offerHeads(description, weights, asked) {
  const trained = description.adapters.filter(adapter => adapter.classes.length && weights.some(one => one.adapter === adapter.name));
  const line = at("heads");
  line.hidden = trained.length === 0;
  line.replaceChildren(...trained.map(adapter => {
    const button = make("button", { type: "button", textContent: `Use the ${adapter.classes.length} classes of ${adapter.name}` });
    button.addEventListener("click", () => { at("class-names").value = adapter.classes.join("\n"); asked(); });
    return button;
  }));
}

// Classify; an earlier call that still runs is given up.
export async function classify(query, weights) {
  running?.abort();
  running = new AbortController();
  const { signal } = running, names = typed(), template = at("template").value.trim() || "{}";
  const missing = lacking(query, names, template);
  at("class-note").textContent = missing || about(query);
  if (missing) { at("classified").replaceChildren(); return; }
  const parts = columns(at("classified"), weights);
  const input = query.picture ? { image: query.picture.uri } : query.text;
  const asked = parts.map((part, index) => answered(part, "classify", using(weights[index], { input, classes: names, templates: [template] }), signal));
  const base = await asked[0];
  const all = await Promise.all(asked);
  if (signal.aborted) return;
  parts.forEach((part, index) => { if (all[index]) bars(part, all[index], index === 0 ? null : base); });
  said(all.map((found, index) => `${weights[index].title}: ${found ? found.data[0].label : "failed"}`).join(", "));
}

function lacking(query, names, template) {
  if (!query.text && !query.picture) return "Type a text above, or choose a picture, to see which class it belongs to.";
  if (names.length === 0) return "Type some classes, one a line.";
  return template.includes("{}") ? "" : "The prompt needs {} where the class goes.";
}

const about = ({ text, picture }) => picture
  ? `The picture ${picture.name} against these classes${text ? "; the text is left aside" : ""}.` : `“${text}” against these classes.`;

function bars(part, found, base) {
  const { probs } = found.data[0];
  const before = base && new Map(base.classes.map((name, index) => [name, base.data[0].probs[index]]));
  const order = probs.map((_, index) => index).sort((a, b) => probs[b] - probs[a]);
  const rows = order.slice(0, MOST).map(index => bar(found.classes[index], probs[index], before?.get(found.classes[index])));
  const left = order.length - rows.length;
  part.body.replaceChildren(make("ol", { className: "bars" }, ...rows));
  if (left > 0) part.body.append(make("p", { className: "quiet", textContent: `and ${left} less probable` }));
  if (found.kind === "sigmoid") part.body.append(make("p", { className: "quiet", textContent: "Each class by itself; they need not add up to 100 %." }));
}

function bar(name, probability, before) {
  const fill = make("span", { className: "fill" });
  fill.style.width = `${(100 * probability).toFixed(2)}%`;
  const value = make("span", { className: "value", textContent: `${(100 * probability).toFixed(1)} %` });
  if (before !== undefined) value.append(" ", difference(100 * (probability - before)));
  return make("li", {}, make("span", { className: "name", textContent: name }), value, make("span", { className: "track", "aria-hidden": "true" }, fill));
}

function difference(points) {
  const text = Math.abs(points) < 0.05 ? "±0" : `${points > 0 ? "+" : "−"}${Math.abs(points).toFixed(1)}`;
  return make("small", { className: text === "±0" ? "" : points > 0 ? "up" : "down", textContent: text, title: "points against the base" });
}
