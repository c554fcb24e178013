// Start the page: find out what is served, and join the query, the compared weights and the views.

import { CallError, ask } from "./calls.js";
import * as classes from "./classes.js";
import { compared, offer } from "./columns.js";
import { at, calmly, make, many } from "./elements.js";
import * as enlarged from "./enlarged.js";
import * as loaded from "./loaded.js";
import * as query from "./query.js";
import { FIRST, search } from "./results.js";

const TABS = ["results", "classes", "loaded"];
const STATES = { ready: "ready", starting: "starting", restarting: "restarting", draining: "stopping", failed: "failed" };
let description = null;
let tab = "results";
let k = FIRST;

async function start() {
  listen();
  try {
    described(await ask("describe", { waiting }));
  } catch (error) {
    waiting(error instanceof CallError ? error.message : String(error));
    return;
  }
  at("main").hidden = false;
  hints();
  at("text").focus();
}

function listen() {
  query.listen(() => { k = FIRST; if (tab === "loaded") open("results"); else update(); });
  classes.listen(update);
  enlarged.listen(file => query.take(file, () => { k = FIRST; open("results"); }));
  at("more-results").addEventListener("click", () => { k = Math.min(1000, 2 * k); update(); });
  for (const name of TABS) {
    at(`tab-${name}`).addEventListener("click", () => open(name));
    at(`tab-${name}`).addEventListener("keydown", event => alongTabs(event, name));
  }
}

// Take over what the server says of itself; what is chosen stays chosen.
function described(found) {
  const names = given => JSON.stringify([given?.adapters.map(one => [one.name, one.state === "failed"]), given?.folders]);
  const changed = names(found) !== names(description);
  description = found;
  at("state").textContent = STATES[found.state] ?? found.state;
  at("state").dataset.state = found.state;
  if (!changed) return;
  query.limit(found.limits.max_body_mb * 2 ** 20);
  offer(found, chosenAnew);
  folders();
  const served = [found.base, many(found.adapters.length, "adapter"), ...found.folders.map(one => `${one.name}: ${many(one.rows, kindOf(one))}`)];
  at("served").textContent = served.slice(0, 5).join(" · ");
}

const kindOf = folder => folder.kind.startsWith("text") ? "text" : "image";

function folders() {
  const select = at("folder"), before = select.value;
  select.replaceChildren(...description.folders.map(one => make("option", { value: one.name, textContent: one.name })));
  if (description.folders.some(one => one.name === before)) select.value = before;
  at("folder-field").hidden = description.folders.length < 2;
  at("more").hidden = description.folders.length === 0;
}

// What stands where results will be.
function hints() {
  const empty = description.folders.length === 0;
  at("no-folder").hidden = !empty;
  at("encode-command").textContent = `clipgraft encode photos/ encoded/ --model ${description.base}\n`
    + `clipgraft serve --model ${description.base} --folders photos=encoded/`;
  at("no-query").hidden = empty;
  const about = description.adapters.length ? " Choose one or two adapters to see what they find beside the base." : "";
  at("no-query").replaceChildren(make("p", { textContent: `Type what should be on a picture and press Enter, or give a picture.${about}` }));
}

const calm = calmly(150, () => update());

function chosenAnew() {
  classes.offerHeads(description, compared(description), update);
  calm();
}

// Answer the query in the view that is open.
function update() {
  const asked = query.query(), weights = compared(description);
  if (tab === "classes") classes.classify(asked, weights);
  if (tab !== "results" || description.folders.length === 0) return;
  if (!asked.text && !asked.picture) return;
  const folder = description.folders.find(one => one.name === at("folder").value);
  search(asked, weights, { name: folder.name, pictures: kindOf(folder) === "image" }, k);
}

function open(name) {
  tab = name;
  for (const other of TABS) {
    const selected = other === name;
    at(`tab-${other}`).setAttribute("aria-selected", selected);
    at(`tab-${other}`).tabIndex = selected ? 0 : -1;
    at(other).hidden = !selected;
  }
  if (name === "loaded") loaded.watch(described); else loaded.leave();
  update();
}

function alongTabs(event, name) {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const ends = { Home: TABS[0], End: TABS.at(-1) }[event.key];
  const next = ends ?? (step && TABS[(TABS.indexOf(name) + step + TABS.length) % TABS.length]);
  if (!next) return;
  event.preventDefault();
  open(next);
  at(`tab-${next}`).focus();
}

function waiting(text) {
  at("waiting").textContent = text;
  at("waiting").hidden = !text;
}

start();
