// Make elements and texts. Data becomes text nodes only, never markup.

export const at = id => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter(child => child !== null && child !== undefined));
  return element;
}

export const many = (count, one, more = `${one}s`) => `${whole(count)} ${count === 1 ? one : more}`;
export const whole = number => number.toLocaleString("en");
export const said = text => { at("said").textContent = text; };

// Bytes as people read them.
export function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (bytes >= 1000 && unit < units.length - 1) { bytes /= 1000; unit += 1; }
  return `${bytes >= 100 || unit === 0 ? Math.round(bytes) : bytes.toFixed(1)} ${units[unit]}`;
}

// Call a function once no more calls have come for some milliseconds.
export function calmly(milliseconds, action) {
  let timer;
  return () => { clearTimeout(timer); timer = setTimeout(action, milliseconds); };
}
