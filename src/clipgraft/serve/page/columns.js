// The base and up to two adapters: which are compared, and the columns that show their answers.

import { CallError, ask } from "./calls.js";
import { at, make } from "./elements.js";

const MOST = 2;
let chosen = []; // {name, strength} of each place, name "" for none
let shown = 0; // the column that a narrow screen shows

// The weights that answer, the base first: what the server calls them, and what people do.
export function compared(description) {
  const adapters = chosen.filter(place => place.name).map(({ name, strength }) => ({
    title: name, adapter: name, strength, model: `${description.base}:${name}`,
  }));
  return [{ title: description.base, adapter: null, strength: 1, model: description.base }, ...adapters];
}

// Ask the server with these weights: a body with the fields that say so.
export const using = (weights, body) => ({
  ...body, model: weights.model, ...(weights.adapter === null ? {} : { strength: weights.strength }),
});

// Offer the adapters; `changed` is called after each choice.
export function offer(description, changed) {
  const places = Math.min(MOST, description.adapters.length);
  const names = description.adapters.map(adapter => adapter.name);
  chosen = Array.from({ length: places }, (_, index) => {
    const before = chosen[index];
    return before && names.includes(before.name) ? before : { name: "", strength: 1 };
  });
  const form = at("compared");
  form.hidden = places === 0;
  form.replaceChildren(form.querySelector("legend"), ...chosen.map((place, index) => control(place, index, description, changed)));
}

function control(place, index, description, changed) {
  const number = index + 1;
  const select = make("select", { id: `adapter-${number}` }, make("option", { value: "", textContent: "no adapter" }));
  for (const adapter of description.adapters) {
    const failed = adapter.state === "failed" ? " (failed)" : "";
    select.append(make("option", { value: adapter.name, textContent: adapter.name + failed }));
  }
  select.value = place.name;
  const range = make("input", { id: `strength-${number}`, type: "range", min: 0, max: 1.5, step: 0.05, value: place.strength, "aria-label": `Strength of adapter ${number}` });
  const output = make("output", { textContent: place.strength.toFixed(2) });
  output.setAttribute("for", range.id);
  const slider = make("div", { className: "slider" }, make("label", { htmlFor: range.id, textContent: "Strength" }), range, output);
  slider.hidden = !place.name;
  select.addEventListener("change", () => {
    place.name = select.value;
    slider.hidden = !place.name;
    changed();
  });
  range.addEventListener("input", () => {
    place.strength = Number(range.value);
    output.textContent = place.strength.toFixed(2);
    changed();
  });
  const label = make("label", { htmlFor: select.id, textContent: `Adapter ${number}`, className: "unseen" });
  return make("div", { className: "place" }, label, select, slider);
}

// One column for each of the weights, below `root`; columns that stay keep what they show until it is replaced.
export function columns(root, weights) {
  const grid = root.querySelector(".columns") ?? make("div", { className: "columns" });
  const before = [...grid.children];
  const made = weights.map((one, index) => {
    const column = before[index]?.dataset.title === one.title ? before[index] : empty(one);
    const strength = one.adapter === null ? "base" : `× ${one.strength.toFixed(2)}`;
    column.querySelector(".strength").textContent = strength;
    return column;
  });
  grid.replaceChildren(...made);
  root.replaceChildren(switches(grid, weights), grid);
  return made.map(column => ({ column, note: column.querySelector(".note"), body: column.querySelector(".answer") }));
}

function empty(weights) {
  const title = make("h2", {}, make("span", { textContent: weights.title }), " ", make("small", { className: "strength" }));
  const column = make("section", { className: "column", "aria-label": weights.title });
  column.dataset.title = weights.title;
  column.append(title, make("p", { className: "note", hidden: true }), make("div", { className: "answer" }));
  return column;
}

function switches(grid, weights) {
  const group = make("div", { className: "switches", role: "group", "aria-label": "Shown column" });
  const show = index => {
    shown = index;
    [...grid.children].forEach((column, at) => column.classList.toggle("shown", at === index));
    [...group.children].forEach((button, at) => button.setAttribute("aria-pressed", at === index));
  };
  if (weights.length > 1) {
    group.append(...weights.map((one, index) => {
      const button = make("button", { type: "button", textContent: one.title });
      button.addEventListener("click", () => show(index));
      return button;
    }));
  }
  show(Math.min(shown, weights.length - 1));
  return group;
}

// Say something above a column's answer: a fault, or why it takes long.
export function note(part, text, fault = false) {
  part.note.hidden = !text;
  part.note.textContent = text;
  part.note.classList.toggle("fault", fault);
}

// The answer for a column, which tells what goes wrong in its place; null for none.
export async function answered(part, path, body, signal) {
  part.column.setAttribute("aria-busy", "true");
  try {
    const found = await ask(path, { body, signal, waiting: text => note(part, text) });
    note(part, "");
    return found;
  } catch (error) {
    if (error.name === "AbortError") return null;
    part.body.replaceChildren();
    note(part, error instanceof CallError ? error.message : String(error), true);
    return null;
  } finally {
    if (!signal.aborted) part.column.removeAttribute("aria-busy");
  }
}
