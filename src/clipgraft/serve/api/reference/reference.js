// Shows the OpenAPI schema, and sends its examples. Text of the schema and of answers is never read as HTML.

const LONGEST = 20_000; // characters of an answer that are shown
const root = new URL("..", import.meta.url); // the server, wherever it is mounted
const keyField = document.getElementById("key");
keyField.value = sessionStorage.getItem("clipgraft-key") ?? "";
keyField.addEventListener("change", () => sessionStorage.setItem("clipgraft-key", keyField.value));

function element(name, content = [], properties = {}) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) made.setAttribute(key, value);
  made.append(...(Array.isArray(content) ? content : [content]));
  return made;
}

function resolved(schema, shape) {
  if (!shape || !shape.$ref) return shape ?? {};
  return shape.$ref.slice(2).split("/").reduce((at, part) => at[part], schema);
}

function kindOf(schema, shape) {
  const choices = shape.anyOf ?? shape.oneOf;
  if (choices) return [...new Set(choices.map((choice) => kindOf(schema, choice)))].join(" or ");
  if (shape.$ref) return shape.$ref.split("/").pop();
  if (shape.enum) return shape.enum.map((value) => JSON.stringify(value)).join(" or ");
  if (shape.const !== undefined) return JSON.stringify(shape.const);
  if (shape.type === "array") return `list of ${kindOf(schema, shape.items ?? {})}`;
  return shape.type ?? "anything";
}

function row(schema, name, shape, required, description) {
  const fallback = shape.default === undefined ? "" : ` · default ${JSON.stringify(shape.default)}`;
  return element("tr", [
    element("th", element("code", name), { scope: "row" }),
    element("td", [
      element("span", `${kindOf(schema, shape)}${required ? " · required" : fallback}`, { class: "kind" }),
      element("div", description ?? ""),
    ]),
  ]);
}

function fields(schema, operation) {
  const rows = (operation.parameters ?? []).map((parameter) =>
    row(schema, parameter.name, parameter.schema, parameter.required, parameter.description ?? parameter.schema.description));
  const body = resolved(schema, operation.requestBody?.content?.["application/json"]?.schema);
  for (const [name, shape] of Object.entries(body.properties ?? {})) {
    rows.push(row(schema, name, shape, (body.required ?? []).includes(name), shape.description));
  }
  return rows.length ? [element("table", element("tbody", rows))] : [];
}

function headers(hasBody) {
  const sent = hasBody ? { "Content-Type": "application/json" } : {};
  if (keyField.value) sent.Authorization = `Bearer ${keyField.value}`;
  return sent;
}

async function shown(answer) {
  const kind = answer.headers.get("Content-Type") ?? "";
  if (kind.startsWith("image/")) {
    return element("img", [], { src: URL.createObjectURL(await answer.blob()), alt: "the answer" });
  }
  const text = await answer.text();
  let told = text;
  try { told = JSON.stringify(JSON.parse(text), null, 1); } catch { /* it is no JSON, and shown as it is */ }
  return element("pre", told.length > LONGEST ? `${told.slice(0, LONGEST)}\n…` : told, { tabindex: "0" });
}

async function send(method, address, body, place, button) {
  button.disabled = true;
  place.replaceChildren(element("p", "Waiting …"));
  try {
    const answer = await fetch(new URL(address.slice(1), root), { method, headers: headers(body !== undefined), body });
    const retry = answer.headers.get("Retry-After");
    const line = `${answer.status} ${answer.statusText}${retry ? ` · try again in ${retry} s` : ""}`;
    place.replaceChildren(element("p", line, { class: answer.ok ? "good" : "bad" }), await shown(answer));
  } catch {
    place.replaceChildren(element("p", "The server did not answer.", { class: "bad" }));
  } finally {
    button.disabled = false;
  }
}

function trying(path, method, operation) {
  const examples = Object.values(operation.requestBody?.content?.["application/json"]?.examples ?? {});
  const place = element("div", [], { "aria-live": "polite" });
  const button = element("button", "Send", { type: "button" });
  const parts = [];
  const values = (operation.parameters ?? []).filter((one) => one.in === "path").map((parameter) => {
    const input = element("input", [], { "data-name": parameter.name });
    input.value = parameter.example ?? "";
    parts.push(element("label", [parameter.name, input]));
    return input;
  });
  let text;
  if (operation.requestBody) {
    text = element("textarea", [], { "aria-label": `Body of ${method} ${path}`, spellcheck: "false" });
    const fill = (example) => { text.value = JSON.stringify(example?.value ?? {}, null, 1); };
    fill(examples[0]);
    if (examples.length > 1) {
      const options = examples.map((example, index) => element("option", example.summary ?? "example", { value: index }));
      const choice = element("select", options);
      choice.addEventListener("change", () => fill(examples[choice.value]));
      parts.push(element("label", ["Example", choice]));
    }
    parts.push(text);
  }
  button.addEventListener("click", () => {
    const address = values.reduce(
      (at, input) => at.replace(`{${input.dataset.name}}`, encodeURIComponent(input.value)), path);
    send(method.toUpperCase(), address, text?.value, place, button);
  });
  return [...parts, button, place];
}

function section(schema, path, method, operation) {
  return element("section", [
    element("h2", [element("span", method.toUpperCase(), { class: "method" }), element("code", path)]),
    element("p", operation.description ?? operation.summary ?? ""),
    ...fields(schema, operation),
    element("h3", "Try it"),
    ...trying(path, method, operation),
  ], { id: operation.operationId });
}

async function load() {
  const place = document.getElementById("routes");
  let schema;
  try {
    schema = await (await fetch(new URL("openapi.json", root))).json();
  } catch {
    place.replaceChildren(element("p", "The server did not give its schema. Reload the page to try again.", { class: "bad" }));
    return;
  }
  const operations = Object.entries(schema.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, operation]) => [path, method, operation]));
  const links = operations.map(([path, , operation]) =>
    element("li", element("a", path, { href: `#${operation.operationId}` })));
  document.getElementById("contents").replaceChildren(element("ul", links));
  place.replaceChildren(...operations.map((one) => section(schema, ...one)));
}

load();
