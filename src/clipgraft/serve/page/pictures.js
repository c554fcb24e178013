// Pictures of encoded folders: fetched with the key, a few at once, each once, when they come into view.

import { call } from "./calls.js";

const AT_ONCE = 4;
const KEPT = 400;
const urls = new Map(); // path -> promise of an address in memory
const queue = [];
let running = 0;

const watcher = new IntersectionObserver(entries => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    watcher.unobserve(target);
    fill(target, target.dataset.path);
  }
}, { rootMargin: "400px" });

export const pathOf = (folder, row, side) => `thumbnails/${encodeURIComponent(folder)}/${row}?side=${side}`;

// Show the picture of a path in an <img> once that is near the window.
export function show(image, path) {
  image.dataset.path = path;
  watcher.observe(image);
}

// Show it now.
export async function fill(image, path) {
  image.dataset.path = path;
  try {
    const url = await urlOf(path);
    if (image.dataset.path === path) image.src = url;
  } catch (error) {
    image.alt = `no picture: ${error.message}`;
    image.classList.add("lost");
  }
}

export async function blobOf(path) {
  return (await call(path)).blob();
}

function urlOf(path) {
  const known = urls.get(path);
  urls.delete(path);
  const promise = known ?? inTurn(async () => URL.createObjectURL(await blobOf(path)));
  urls.set(path, promise);
  promise.catch(() => urls.delete(path));
  if (urls.size > KEPT) forgetOldest();
  return promise;
}

function forgetOldest() {
  const [path, promise] = urls.entries().next().value;
  urls.delete(path);
  promise.then(url => URL.revokeObjectURL(url), () => {});
}

function inTurn(work) {
  return new Promise((resolve, reject) => {
    queue.push(() => work().then(resolve, reject));
    next();
  });
}

function next() {
  if (running >= AT_ONCE || queue.length === 0) return;
  running += 1;
  queue.shift()().finally(() => { running -= 1; next(); });
}
