// Search a folder with each of the compared weights, and show what they find side by side.

import { answered, columns, note, using } from "./columns.js";
import { at, make, many, said } from "./elements.js";
import { enlarge } from "./enlarged.js";
import { pathOf, show } from "./pictures.js";

export const FIRST = 12;
const MOST = 1000;
let running = null;

// Search; an earlier search that still runs is given up.
export async function search(query, weights, folder, k) {
  running?.abort();
  running = new AbortController();
  const { signal } = running;
  at("no-query").hidden = true;
  const parts = columns(at("found"), weights);
  const body = { k, folder: folder.name };
  if (query.text) body.text = query.text;
  if (query.picture) body.image = query.picture.uri;
  if (query.text && query.picture) body.image_weight = query.weight;
  if (at("where").value.trim()) body.where = at("where").value.trim();
  const base = one(parts[0], using(weights[0], body), signal);
  const all = await Promise.all(parts.map(async (part, index) => {
    const hits = index === 0 ? await base : await one(part, using(weights[index], body), signal);
    if (hits && !signal.aborted) list(part, hits, folder, index === 0 ? null : await base);
    return hits;
  }));
  if (signal.aborted) return;
  const most = Math.max(0, ...all.map(hits => hits?.length ?? 0));
  at("more-results").hidden = most < k || k >= MOST;
  said(all.map((hits, index) => `${weights[index].title}: ${hits ? many(hits.length, "result") : "failed"}`).join(", "));
}

async function one(part, body, signal) {
  const found = await answered(part, "search", body, signal);
  if (found && !found.hits.length) note(part, "Nothing was found.");
  return found && found.hits;
}

function list(part, hits, folder, base) {
  const before = base && new Map(base.map(hit => [hit.row, hit.rank]));
  const items = hits.map((hit, index) => make("li", {}, card(hit, folder, before, () => enlarge(hits, index, folder, part))));
  const made = make("ol", { className: folder.pictures ? "hits" : "hits texts" }, ...items);
  part.body.replaceChildren(made);
}

function card(hit, folder, before, open) {
  const button = make("button", { type: "button", className: "hit" });
  if (folder.pictures) {
    const image = make("img", { alt: "", loading: "lazy", decoding: "async" });
    show(image, pathOf(folder.name, hit.row, 320));
    button.append(make("span", { className: "frame" }, image));
  }
  const line = make("span", { className: "line" }, make("b", { textContent: hit.rank }), make("span", { textContent: hit.score.toFixed(3) }));
  if (before) line.append(moved(hit, before));
  const words = make("span", { className: "caption", textContent: hit.caption || hit.path || "" });
  button.append(line, words);
  if (hit.path) button.title = hit.path;
  button.addEventListener("click", open);
  return button;
}

// How far a row rose or fell against the base.
function moved(hit, before) {
  const rank = before.get(hit.row);
  if (rank === undefined) return make("span", { className: "moved up", textContent: "new", title: "not among the base's results" });
  const by = rank - hit.rank;
  if (by === 0) return make("span", { className: "moved", textContent: "=", title: "as with the base" });
  const mark = make("span", { className: `moved ${by > 0 ? "up" : "down"}`, title: `${rank} with the base` });
  mark.append(make("span", { "aria-hidden": "true", textContent: by > 0 ? "▲" : "▼" }));
  mark.append(make("span", { className: "unseen", textContent: by > 0 ? "up " : "down " }), `${Math.abs(by)}`);
  return mark;
}
