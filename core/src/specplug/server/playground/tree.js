// Draws the draft of a step: the root, which is the last token before it, every node, and the token that came after.

import { probability, visible } from "./format.js";

const SPACE = "http://www.w3.org/2000/svg";
const WIDTH = 82, HEIGHT = 56, GAP_X = 14, GAP_Y = 8, LONGEST = 8;

function shape(name, attributes, text) {
  const made = document.createElementNS(SPACE, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function short(text) {
  const shown = visible(text);
  return shown.length > LONGEST ? `${shown.slice(0, LONGEST - 1)}…` : shown;
}

// The place of every node: its depth, and a line for every leaf. Lines are given in the order of a walk from the root.
function layout(nodes) {
  const children = new Map();
  nodes.forEach((node, index) => children.set(node.parent, [...(children.get(node.parent) ?? []), index]));
  const places = new Map();
  let lines = 0;
  const walk = (index, depth) => {
    const own = children.get(index) ?? [];
    if (own.length === 0) {
      places.set(index, { depth, line: lines++ });
      return;
    }
    // Accepted nodes stay on the first line, so that the accepted path is straight.
    const ordered = [...own].sort((a, b) => nodes[b].accepted - nodes[a].accepted);
    const first = lines;
    for (const child of ordered) walk(child, depth + 1);
    places.set(index, { depth, line: first });
  };
  walk(-1, 0);
  return { places, lines };
}

function box(x, y, kind, name, lines, mark) {
  const group = shape("g", { class: kind, transform: `translate(${x} ${y})` });
  group.append(
    shape("rect", { x: 0.5, y: 0.5, width: WIDTH, height: HEIGHT, rx: 7 }),
    shape("text", { class: "name", x: 7, y: 17 }, name),
    ...lines.map((text, place) => shape("text", { class: "small", x: 7, y: 33 + 14 * place }, text)),
  );
  if (mark) group.append(shape("text", { class: "mark", x: WIDTH - 15, y: 17 }, mark));
  return group;
}

export function drawTree(step, before) {
  const { nodes } = step.draft;
  const { places, lines } = layout(nodes);
  const depth = Math.max(...[...places.values()].map((place) => place.depth));
  const accepted = nodes.map((node, index) => (node.accepted ? index : -1)).filter((index) => index >= 0);
  const end = accepted.length ? accepted[accepted.length - 1] : -1;
  const next = step.tokens[accepted.length];
  const at = ({ depth: column, line }) => ({ x: 1 + column * (WIDTH + GAP_X), y: 1 + line * (HEIGHT + GAP_Y) });
  const hasFollower = nodes.some((node) => node.parent === end);
  const nextPlace = next && { depth: places.get(end).depth + 1, line: hasFollower ? lines : places.get(end).line };
  const columns = Math.max(depth, nextPlace ? nextPlace.depth : 0) + 1;
  const rows = nextPlace ? Math.max(lines, nextPlace.line + 1) : lines;
  const width = columns * (WIDTH + GAP_X) - GAP_X + 3, height = rows * (HEIGHT + GAP_Y) - GAP_Y + 3;
  const svg = shape("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
  const edge = (from, to, kind) => {
    const a = at(from), b = at(to);
    const x1 = a.x + WIDTH, y1 = a.y + HEIGHT / 2, x2 = b.x, y2 = b.y + HEIGHT / 2, middle = (x1 + x2) / 2;
    svg.append(shape("path", { class: `edge ${kind}`, d: `M${x1} ${y1} C${middle} ${y1} ${middle} ${y2} ${x2} ${y2}` }));
  };
  nodes.forEach((node, index) => edge(places.get(node.parent), places.get(index), node.accepted ? "accepted" : ""));
  if (nextPlace) edge(places.get(end), nextPlace, "accepted");
  const root = at(places.get(-1));
  svg.append(box(root.x, root.y, "root", short(before), ["before"]));
  nodes.forEach((node, index) => {
    const { x, y } = at(places.get(index));
    const draft = node.draft_prob === null ? [] : [`draft ${probability(node.draft_prob)}`];
    const chances = [`target ${probability(node.target_prob)}`, ...draft];
    const kind = node.accepted ? "accepted" : "rejected";
    const group = box(x, y, kind, short(node.text), chances, node.accepted ? "✓" : "✗");
    group.append(shape("title", {}, `${visible(node.text)}, ${kind}`));
    svg.append(group);
  });
  if (nextPlace) {
    const { x, y } = at(nextPlace);
    svg.append(box(x, y, "next", short(next.text), [`target ${probability(next.prob)}`, "next"]));
  }
  return svg;
}
