// One run: its figures, its text token by token, and the step of the token that is pointed at.

import { element, milliseconds, probability, spoken } from "./format.js";
import { showStep } from "./step.js";

const STYLES = 6;
let panes = 0;

export function styleOf(methods, method) {
  const place = methods.indexOf(method);
  return place < 0 ? "" : `m${place % STYLES}`;
}

export class Pane {
  constructor(title) {
    this.number = panes++;
    this.steps = [];
    this.tokens = []; // { span, step, index }
    this.methods = [];
    this.active = -1;
    this.answer = "";
    this.prompt = "";
    this.firstAt = null;
    this.totals = { tokens: 0, drafts: 0, committed: 0, steps: 0, seconds: 0, timed: 0, timedTokens: 0, plain: 0 };
    this.scheduled = false;
    this.#build(title);
  }

  #build(title) {
    const figure = (name) => {
      const value = element("dd", {}, "–");
      this.figures.append(element("div", {}, element("dt", {}, name), value));
      return value;
    };
    this.figures = element("dl", { class: "figures" });
    this.length = figure("acceptance length");
    this.speed = figure("tokens per second");
    this.stepTime = figure("mean step");
    this.plainTime = figure("plain instead");
    this.gain = figure("versus plain");
    const bar = (label, kind) => {
      const fill = element("span", { class: `bar ${kind}` });
      const value = element("output", {}, "–");
      return { fill, value, row: [element("span", {}, label), element("span", { class: "track" }, fill), value] };
    };
    this.own = bar("per token", "");
    this.plain = bar("plain, per token", "plain");
    this.note = element("small", {}, "");
    this.text = element("div", {
      class: "text", role: "listbox", tabindex: "0", id: `text-${this.number}`,
      "aria-label": `Generated tokens of ${title}; arrow keys move between tokens and steps`,
    });
    this.step = element("div", { class: "step", "aria-live": "polite" });
    this.step.append(element("p", { class: "note" }, "Point at a token, or move to the text and use the arrow keys."));
    this.whole = element("pre", {});
    this.root = element(
      "article", { class: "pane", "aria-label": title },
      element("h2", {}, title, this.note),
      this.figures,
      element("div", { class: "bars", "aria-hidden": "true" }, ...this.own.row, ...this.plain.row),
      this.text,
      this.step,
      element("details", {}, element("summary", {}, "The text alone"), this.whole),
    );
    this.text.addEventListener("pointerover", (event) => this.#point(event));
    this.text.addEventListener("click", (event) => this.#point(event));
    this.text.addEventListener("keydown", (event) => this.#move(event));
    this.text.addEventListener("focus", () => this.active < 0 && this.tokens.length && this.select(0));
  }

  receive(event) {
    if (event.event === "start") {
      this.methods = event.methods;
      this.prompt = event.prompt ?? "";
      if (this.prompt) this.text.append(element("span", { class: "prompt", role: "presentation" }, this.prompt));
    } else if (event.event === "step") {
      this.#addStep(event);
    } else if (event.event === "end") {
      if (event.text) this.#append(event.text);
      this.note.textContent = `${this.totals.tokens} tokens, ended by ${event.finish_reason}`;
      this.#show();
    } else if (event.event === "error") {
      throw new Error(event.error.message);
    }
  }

  // Notes that the run was stopped, or failed.
  cut() {
    if (!this.note.textContent) this.note.textContent = this.steps.length ? `${this.totals.tokens} tokens, cut off` : "no tokens";
  }

  #append(text) {
    this.answer += text;
    this.text.append(document.createTextNode(text));
  }

  #addStep(step) {
    this.steps.push(step);
    step.tokens.forEach((token, index) => {
      const text = token.text ?? `⟨${token.id}⟩`;
      const span = element("span", {
        class: `token ${styleOf(this.methods, token.method)}`.trimEnd(),
        role: "option", id: `token-${this.number}-${this.tokens.length}`, "aria-selected": "false",
        "aria-label": `${spoken(text)}, ${token.method ? `drafted by ${token.method}` : "target"}, ${probability(token.prob)}`,
      }, text);
      span.dataset.place = String(this.tokens.length);
      this.tokens.push({ span, step, index });
      this.text.append(span);
      this.answer += text;
    });
    this.#count(step);
    if (!this.scheduled) {
      this.scheduled = true;
      requestAnimationFrame(() => this.#show());
    }
  }

  #count(step) {
    const totals = this.totals;
    const now = performance.now();
    if (this.firstAt === null) {
      this.firstAt = now;
      totals.first = step.tokens.length;
    }
    this.lastAt = now;
    totals.tokens += step.tokens.length;
    if (step.draft) {
      totals.drafts += 1;
      totals.committed += 1 + step.draft.nodes.filter((node) => node.accepted).length;
    }
    if (step.num_prompt_tokens) return; // the prompt's step takes the same with and without speculation
    totals.steps += 1;
    totals.seconds += step.seconds;
    if (step.plain_seconds !== null) {
      totals.timed += step.seconds;
      totals.timedTokens += step.tokens.length;
      totals.plain += step.plain_seconds;
    }
  }

  #show() {
    this.scheduled = false;
    const totals = this.totals;
    const isNearEnd = this.text.scrollHeight - this.text.scrollTop - this.text.clientHeight < 80;
    this.length.textContent = totals.drafts ? (totals.committed / totals.drafts).toFixed(2) : "no drafts";
    const seconds = (this.lastAt - this.firstAt) / 1000;
    if (seconds > 0) this.speed.textContent = ((totals.tokens - totals.first) / seconds).toFixed(0);
    if (totals.steps) this.stepTime.textContent = milliseconds(totals.seconds / totals.steps);
    const isKnown = totals.drafts && totals.plain > 0;
    if (isKnown) {
      this.plainTime.textContent = milliseconds((totals.plain / totals.timed) * (totals.seconds / totals.steps));
      this.gain.textContent = `× ${(totals.plain / totals.timed).toFixed(2)}`;
    }
    const each = totals.timedTokens ? totals.timed / totals.timedTokens : 0;
    const plain = isKnown ? totals.plain / totals.timedTokens : 0;
    const longest = Math.max(each, plain);
    if (longest) {
      this.own.fill.style.width = `${(100 * each) / longest}%`;
      this.own.value.textContent = milliseconds(each);
      this.plain.fill.style.width = `${(100 * plain) / longest}%`;
      this.plain.value.textContent = isKnown ? milliseconds(plain) : "–";
    }
    this.whole.textContent = this.answer;
    if (isNearEnd) this.text.scrollTop = this.text.scrollHeight;
  }

  #point(event) {
    const place = event.target.dataset?.place;
    if (place !== undefined) this.select(Number(place));
  }

  #move(event) {
    const last = this.tokens.length - 1;
    if (last < 0) return;
    const { step } = this.tokens[Math.max(this.active, 0)];
    const moves = {
      ArrowRight: () => this.active + 1,
      ArrowLeft: () => this.active - 1,
      ArrowDown: () => this.tokens.findIndex((token) => token.step.step > step.step),
      ArrowUp: () => this.tokens.findIndex((token) => token.step.step >= step.step - 1),
      Home: () => 0,
      End: () => last,
    };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const wanted = moves[event.key]();
    this.select(wanted < 0 && event.key === "ArrowDown" ? last : Math.min(Math.max(wanted, 0), last));
    this.tokens[this.active].span.scrollIntoView({ block: "nearest" });
  }

  select(place) {
    if (place === this.active) return;
    for (const span of this.text.querySelectorAll(".same, .active")) span.classList.remove("same", "active");
    this.tokens[this.active]?.span.setAttribute("aria-selected", "false");
    this.active = place;
    const { span, step, index } = this.tokens[place];
    for (const token of this.tokens) if (token.step === step) token.span.classList.add("same");
    span.classList.add("active");
    span.setAttribute("aria-selected", "true");
    this.text.setAttribute("aria-activedescendant", span.id);
    const first = place - index;
    const before = first > 0 ? this.tokens[first - 1].step.tokens.at(-1).text : this.prompt.slice(-8) || "prompt";
    showStep(this.step, step, index, before);
  }
}
