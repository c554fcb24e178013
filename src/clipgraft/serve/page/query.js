// What is looked for: a text, a picture, or both.

import { at, size } from "./elements.js";

let picture = null; // {uri, name}
let mostBytes = Infinity;

// Listen to the form, to drops and to the clipboard; `asked` is called when something new is to be looked for.
export function listen(asked) {
  at("query").addEventListener("submit", event => { event.preventDefault(); asked(); });
  at("file").addEventListener("change", () => { if (at("file").files[0]) take(at("file").files[0], asked); });
  at("picture-remove").addEventListener("click", () => { put(null); at("text").focus(); asked(); });
  at("text").addEventListener("input", weigh);
  at("weight").addEventListener("input", () => { weigh(); });
  at("weight").addEventListener("change", asked);
  for (const id of ["folder", "where"]) at(id).addEventListener("change", asked);
  document.addEventListener("paste", event => {
    const file = imageOf(event.clipboardData);
    if (file) { event.preventDefault(); take(file, asked); }
  });
  dropping(asked);
}

export const limit = bytes => { mostBytes = bytes; };
export const query = () => ({ text: at("text").value.trim(), picture, weight: Number(at("weight").value) });

// Read a file as the picture that is looked for.
export async function take(file, asked) {
  at("file").value = "";
  const fault = file.size * 4 / 3 > mostBytes - 4096
    ? `${file.name || "The picture"} has ${size(file.size)}, more than this server takes (${size(mostBytes * 3 / 4)}).` : "";
  at("query-fault").textContent = fault;
  at("query-fault").hidden = !fault;
  if (fault) return;
  put({ uri: await dataUri(file), name: file.name || "A picture from the clipboard", file });
  asked();
}

function dataUri(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(file);
  });
}

function put(given) {
  const image = at("picture-shown");
  if (picture) URL.revokeObjectURL(image.src);
  picture = given;
  at("picture").hidden = !given;
  if (given) {
    image.src = URL.createObjectURL(given.file);
    at("picture-name").textContent = given.name;
  } else image.removeAttribute("src");
  weigh();
}

function weigh() {
  at("picture-weight").hidden = !picture || !at("text").value.trim();
  at("picture-weight").querySelector("output").textContent = Number(at("weight").value).toFixed(2);
}

const imageOf = transfer => [...(transfer?.files ?? [])].find(file => file.type.startsWith("image/"));

function dropping(asked) {
  const veil = at("dropping");
  const files = event => event.dataTransfer?.types.includes("Files");
  document.addEventListener("dragover", event => {
    if (files(event)) { event.preventDefault(); veil.hidden = false; }
  });
  document.addEventListener("dragleave", event => { if (!event.relatedTarget) veil.hidden = true; });
  document.addEventListener("drop", event => {
    veil.hidden = true;
    if (!files(event)) return;
    event.preventDefault();
    const file = imageOf(event.dataTransfer);
    at("query-fault").hidden = Boolean(file);
    at("query-fault").textContent = file ? "" : "What was dropped is not a picture.";
    if (file) take(file, asked);
  });
}
