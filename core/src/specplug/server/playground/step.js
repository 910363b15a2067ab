// What is known of one step, and of one of its tokens.

import { count, element, milliseconds, probability, visible } from "./format.js";
import { drawTree } from "./tree.js";

function summary(step) {
  const committed = count(step.tokens.length, "token");
  if (!step.draft) return `Step ${step.step + 1}: ${committed}, no draft`;
  const accepted = step.draft.nodes.filter((node) => node.accepted).length;
  const kind = step.draft.is_tree ? " (a tree)" : "";
  return `Step ${step.step + 1}: ${committed}, ${accepted} accepted of ${step.draft.nodes.length} drafted by ${step.draft.method}${kind}`;
}

function about(step, index) {
  const token = step.tokens[index];
  const accepted = step.draft ? step.draft.nodes.filter((node) => node.accepted) : [];
  const parts = [element("code", {}, visible(token.text)), ` id ${token.id}: `];
  if (token.method) {
    const draft = accepted[index]?.draft_prob;
    parts.push(`drafted by ${token.method} and accepted; the target gave it ${probability(token.prob)}`);
    if (draft !== null && draft !== undefined) parts.push(`, the draft ${probability(draft)}`);
  } else {
    const isBonus = step.draft && accepted.length && !step.draft.nodes.some((node) => !node.accepted);
    parts.push(isBonus ? "the bonus token after a draft that was accepted whole" : "chosen by the target");
    parts.push(`; probability ${probability(token.prob)}`);
  }
  parts.push(".");
  return element("p", {}, ...parts);
}

function times(step) {
  let text = `It took ${milliseconds(step.seconds)}`;
  if (step.num_prompt_tokens) text += ` and computed ${count(step.num_prompt_tokens, "token")} of the prompt`;
  if (step.plain_seconds !== null && step.draft) {
    text += `; plain decoding would have taken ${milliseconds(step.plain_seconds)} for ${count(step.tokens.length, "token")}`;
  } else if (step.draft) {
    text += "; what plain decoding would have taken is known after a run with 0 draft tokens";
  }
  if (step.num_rows > 1) text += `, in a batch of ${step.num_rows} sequences`;
  return element("p", {}, `${text}.`);
}

function table(draft) {
  const rows = draft.nodes.map((node, index) =>
    element(
      "tr",
      {},
      element("td", {}, String(index)),
      element("td", {}, element("code", {}, visible(node.text))),
      element("td", {}, node.parent < 0 ? "root" : String(node.parent)),
      element("td", {}, probability(node.draft_prob)),
      element("td", {}, probability(node.target_prob)),
      element("td", {}, node.accepted ? "accepted" : "rejected"),
    ),
  );
  const heads = ["Node", "Token", "Parent", "Draft's probability", "Target's probability", "Result"];
  const head = element("tr", {}, ...heads.map((text) => element("th", { scope: "col" }, text)));
  return element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows));
}

// Fills the inspector of a pane. `before` is the text of the last token before the step.
export function showStep(place, step, index, before) {
  const wasOpen = place.querySelector("details")?.open ?? false;
  const parts = [element("h3", {}, summary(step)), about(step, index), times(step)];
  if (step.draft) {
    const picture = element("div", { class: "tree" }, drawTree(step, before));
    const details = element("details", {}, element("summary", {}, "The draft as a table"), table(step.draft));
    details.open = wasOpen;
    parts.push(picture, details);
  }
  place.replaceChildren(...parts);
}
