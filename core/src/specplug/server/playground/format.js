// How numbers and tokens are written, and a short way to make elements.

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else if (value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

export function probability(value) {
  if (value === null || value === undefined) return "unknown";
  if (value >= 0.9995) return "100%";
  if (value < 0.0005) return "<0.1%";
  return `${(100 * value).toFixed(value < 0.1 ? 1 : 0)}%`;
}

export function milliseconds(seconds) {
  if (seconds === null || seconds === undefined) return "unknown";
  const value = 1000 * seconds;
  return `${value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0)} ms`;
}

// Spaces and line breaks of a token that is shown outside the text.
export function visible(text) {
  if (text === null || text === undefined) return "?";
  if (text === "") return "∅";
  return text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length));
}

// The same for screen readers.
export function spoken(text) {
  if (!text) return "no text";
  return text.trim() === "" ? (text.includes("\n") ? "line break" : "space") : text.trim();
}

export function count(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}
