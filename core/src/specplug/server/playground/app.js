// The form: settings, chat, running and stopping, and the theme.

import { element } from "./format.js";
import { Pane, styleOf } from "./pane.js";
import { info, ServerError, trace } from "./run.js";

const $ = (id) => document.getElementById(id);
const THEMES = ["system", "light", "dark"];
const RETRY_MS = 1000;
let running = null;
let conversation = [];
let server = null;

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

// ---- the server -----------------------------------------------------------------------------------------------------

async function ask() {
  try {
    server = await info($("key").value);
  } catch (error) {
    if (error instanceof ServerError && error.status === 401) {
      $("key-row").hidden = false;
      $("about").textContent = $("key").value ? "The server refuses this API key." : "The server needs an API key.";
      return;
    }
    $("about").textContent = error instanceof ServerError ? error.message : "The server does not answer.";
    setTimeout(ask, RETRY_MS);
    return;
  }
  const methods = server.methods.length ? server.methods.join(", then ") : "no speculator";
  $("about").textContent = `${server.model} with ${methods}`;
  $("draft-a").placeholder = server.methods.length ? String(server.num_speculative_tokens) : "0";
  if (server.defaults.temperature !== undefined) $("temperature").value = server.defaults.temperature;
  const chat = document.querySelector("[value=chat]");
  chat.disabled = !server.has_chat_template;
  $("mode-note").textContent = server.has_chat_template ? "" : "The model has no chat template; start the server with --chat-template.";
  showLegend(server.methods);
}

function showLegend(methods) {
  const entry = (style, text) => element("span", {}, element("span", { class: `token ${style}` }, "token"), ` ${text}`);
  $("legend").replaceChildren(
    entry("", "chosen by the target"),
    ...methods.map((method) => entry(styleOf(methods, method), `drafted by ${method}, accepted`)),
  );
}

// ---- the form -------------------------------------------------------------------------------------------------------

const isChat = () => document.querySelector("[name=mode]:checked").value === "chat";

function showMode() {
  $("chat-part").hidden = !isChat();
  $("text-label").textContent = isChat() ? "Your message" : "Prompt";
}

function showConversation() {
  $("conversation-part").hidden = conversation.length === 0;
  $("conversation").replaceChildren(
    ...conversation.map((message) => element("li", {}, element("b", {}, `${message.role}: `), message.content)),
  );
}

function number(id) {
  const text = $(id).value.trim();
  return text === "" ? undefined : Number(text);
}

function request() {
  const body = { temperature: number("temperature"), max_tokens: number("max-tokens"), seed: number("seed") };
  if (!isChat()) return { ...body, prompt: $("text").value };
  const system = $("system").value.trim();
  const messages = system ? [{ role: "system", content: system }] : [];
  return { ...body, messages: [...messages, ...conversation, { role: "user", content: $("text").value }] };
}

function titleOf(drafts) {
  if (drafts === 0 || server?.methods.length === 0) return "Plain decoding";
  return drafts === undefined ? "Speculative" : `Speculative, up to ${drafts} draft tokens`;
}

// ---- running --------------------------------------------------------------------------------------------------------

async function run() {
  if (running) return;
  const asked = isChat() ? $("text").value : null;
  const body = request();
  const drafts = [number("draft-a")];
  if ($("compare").checked) drafts.push(number("draft-b"));
  const made = drafts.map((each) => new Pane(titleOf(each)));
  $("panes").replaceChildren(...made.map((pane) => pane.root));
  running = new AbortController();
  $("run").disabled = true;
  $("stop").disabled = false;
  $("results").setAttribute("aria-busy", "true");
  try {
    for (const [place, pane] of made.entries()) { // one after the other: together they would slow each other down
      say(made.length > 1 ? `Run ${place + 1} of ${made.length}…` : "Running…");
      const own = drafts[place] === undefined ? body : { ...body, num_speculative_tokens: drafts[place] };
      await trace(own, $("key").value, running.signal, (event) => pane.receive(event));
    }
    say(made.length > 1 ? comparison(made) : `Done: ${made[0].totals.tokens} tokens.`);
  } catch (error) {
    const stopped = error.name === "AbortError";
    say(stopped ? "Stopped." : error.message, !stopped);
    for (const pane of made) pane.cut();
    if (error instanceof ServerError && error.status === 401) $("key-row").hidden = false;
  } finally {
    running = null;
    $("run").disabled = false;
    $("stop").disabled = true;
    $("results").removeAttribute("aria-busy");
  }
  if (asked !== null && made[0].answer) {
    conversation.push({ role: "user", content: asked }, { role: "assistant", content: made[0].answer });
    $("text").value = "";
    showConversation();
  }
}

function comparison([first, second]) {
  const speeds = [first, second].map((pane) => (pane.totals.tokens - pane.totals.first) / (pane.lastAt - pane.firstAt));
  const same = first.answer === second.answer ? "the same text" : "different texts";
  return Number.isFinite(speeds[0] / speeds[1])
    ? `Done: ${same}; the first run made ${(speeds[0] / speeds[1]).toFixed(2)} times as many tokens per second.`
    : `Done: ${same}.`;
}

// ---- the theme ------------------------------------------------------------------------------------------------------

function stored() {
  try {
    const theme = localStorage.getItem("specplug-theme");
    return THEMES.includes(theme) ? theme : "system";
  } catch {
    return "system"; // storage is forbidden
  }
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = `Theme: ${theme}`;
  try {
    localStorage.setItem("specplug-theme", theme);
  } catch {
    // it lasts until the page is left
  }
}

// ---- the beginning --------------------------------------------------------------------------------------------------

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && $("form").reportValidity()) run();
  if (event.key === "Escape") running?.abort();
});
$("stop").addEventListener("click", () => running?.abort());
$("key-use").addEventListener("click", ask);
$("key").addEventListener("keydown", (event) => {
  if (event.key === "Enter") {
    event.preventDefault();
    ask();
  }
});
$("compare").addEventListener("change", () => { $("draft-b-part").hidden = !$("compare").checked; });
$("clear").addEventListener("click", () => {
  conversation = [];
  showConversation();
});
for (const mode of document.querySelectorAll("[name=mode]")) mode.addEventListener("change", showMode);
$("theme").addEventListener("click", () => setTheme(THEMES[(THEMES.indexOf(stored()) + 1) % THEMES.length]));
setTheme(stored());
showMode();
ask();
