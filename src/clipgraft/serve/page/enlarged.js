// One result, large: its picture, caption and metadata, and the way to the next.

import { at, make } from "./elements.js";
import { blobOf, fill, pathOf } from "./pictures.js";

const SIDE = 1024;
const TOLD = new Set(["rank", "score", "row", "caption", "thumbnail"]);
let state = null; // {hits, index, folder, title}
let searchWith = () => {};

export function listen(search) {
  searchWith = search;
  at("enlarged-close").addEventListener("click", () => at("enlarged").close());
  at("enlarged-previous").addEventListener("click", () => step(-1));
  at("enlarged-next").addEventListener("click", () => step(1));
  at("enlarged-search").addEventListener("click", take);
  at("enlarged").addEventListener("keydown", event => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  at("enlarged").addEventListener("click", event => { if (event.target === at("enlarged")) at("enlarged").close(); });
}

export function enlarge(hits, index, folder, part) {
  state = { hits, index, folder, title: part.column.dataset.title };
  draw();
  at("enlarged").showModal();
  at("enlarged-close").focus();
}

function step(by) {
  const index = state.index + by;
  if (index < 0 || index >= state.hits.length) return;
  state.index = index;
  draw();
}

function draw() {
  const { hits, index, folder, title } = state, hit = hits[index];
  at("enlarged-title").textContent = `${title}: ${hit.rank} of ${hits.length}, score ${hit.score.toFixed(4)}`;
  at("enlarged-caption").textContent = hit.caption ?? "";
  at("enlarged-caption").hidden = !hit.caption;
  at("enlarged-facts").replaceChildren(...facts(hit));
  at("enlarged-previous").disabled = index === 0;
  at("enlarged-next").disabled = index === hits.length - 1;
  at("enlarged-search").hidden = !folder.pictures;
  const image = at("enlarged-picture");
  image.closest("figure").hidden = !folder.pictures;
  if (!folder.pictures) return;
  image.removeAttribute("src");
  image.classList.remove("lost");
  image.alt = hit.caption || hit.path || "";
  fill(image, pathOf(folder.name, hit.row, SIDE));
}

function facts(hit) {
  const { metadata, ...flat } = hit;
  return Object.entries({ ...flat, ...metadata })
    .filter(([name, value]) => !TOLD.has(name) && value !== null && value !== "")
    .flatMap(([name, value]) => [
      make("dt", { textContent: name }),
      make("dd", { textContent: typeof value === "object" ? JSON.stringify(value) : String(value) }),
    ]);
}

async function take() {
  const { hits, index, folder } = state;
  const blob = await blobOf(pathOf(folder.name, hits[index].row, SIDE));
  at("enlarged").close();
  searchWith(new File([blob], hits[index].path?.split("/").at(-1) ?? `row ${hits[index].row}`, { type: blob.type }));
}
