// Puts the page's parts together.

import { ClonePanel } from "./clone.js";
import { LiveText } from "./live.js";
import { fillList, ServerPoll, summary } from "./server_state.js";
import { SNIPPETS } from "./snippets.js";
import { RATE, Speaker } from "./speaker.js";
import { wavFile } from "./wav.js";
import { Waveform } from "./waveform.js";

const LIVE_NOTE = "Speech follows your keyboard. Words that were sent stay as they are; Enter ends a sentence.";
const PREVIEW = "This is how I sound.";
const IDLE_MS = 20_000; // without typing, after which a live utterance ends

const $ = (id) => document.getElementById(id);
let limit = Infinity; // characters
let needsToken = false;
let loaded = false; // the lists of voices and languages
let idleTimer = 0;
let tab = Object.keys(SNIPPETS)[0];

const waveform = new Waveform($("waveform"));
const speaker = new Speaker({
  onChange: render,
  onReady: fillChoices,
  onError: (text) => showError(text),
});
const live = new LiveText($("text"), sendLive, () => speaker.speaking && !speaker.utterance.textEnded && speaker.flush(), () =>
  note("What was sent cannot be taken back. Clear the text to begin again."),
);
const poll = new ServerPoll(showState);
const clone = new ClonePanel({
  headers: () => poll.headers,
  onVoices: reloadVoices,
  onTry: (name) => {
    $("voice").value = name;
    speak(PREVIEW);
  },
});

// --- speaking ---------------------------------------------------------------------------------------

function options() {
  const number = (id) => ($(id).value === "" ? null : Number($(id).value));
  return {
    voice: $("voice").value || null,
    language: $("language").value || null,
    instruct: $("instruct").value.trim() || null,
    temperature: number("temperature"),
    top_k: number("top-k"),
    seed: number("seed"),
  };
}

async function speak(text) {
  showError("");
  if (!text.trim()) return note("There is nothing to say yet.");
  const utterance = await speaker.begin(options());
  if (!utterance) return;
  speaker.append(text);
  speaker.end();
  render(utterance);
}

let opening = null; // of a live utterance: text that comes meanwhile waits for it
async function sendLive(text) {
  showError("");
  if (!speaker.speaking || speaker.utterance.textEnded) opening = speaker.begin(options());
  const utterance = await opening;
  if (!utterance || utterance !== speaker.utterance) return;
  speaker.append(text);
  if (text.includes("\n")) speaker.flush();
  clearTimeout(idleTimer);
  idleTimer = setTimeout(endLive, IDLE_MS);
  render(utterance);
}

function endLive() {
  clearTimeout(idleTimer);
  if (speaker.speaking && speaker.utterance.sentAt !== null && !speaker.utterance.textEnded) speaker.end();
}

function stop() {
  clearTimeout(idleTimer);
  speaker.stop();
  live.restart();
}

function setLive(on) {
  endLive();
  $("speak").hidden = on;
  note(on ? LIVE_NOTE : "");
  if (on) {
    live.start();
    $("text").focus();
    $("text").setSelectionRange($("text").value.length, $("text").value.length);
  } else {
    live.stop();
  }
}

// --- what is shown ----------------------------------------------------------------------------------

function render(utterance) {
  if (waveform.utterance !== utterance) waveform.show(utterance);
  waveform.draw();
  const { done } = utterance;
  const milliseconds = (value) => (value == null ? "–" : `${Math.round(value)} ms`);
  $("ttfa").textContent = milliseconds(utterance.ttfa);
  $("ttfc").textContent = milliseconds(done?.ttfc_ms);
  $("rtf").textContent = done?.rtf == null ? "–" : done.rtf.toFixed(3);
  $("underruns").textContent = utterance.underruns;
  $("length").textContent = `${utterance.lengthS.toFixed(2)} s`;
  $("finish").textContent = done?.finish_reason ?? (utterance.stopped ? "cancelled" : "–");
  $("stop").disabled = !speaker.speaking;
  const save = utterance.settled && utterance.received > 0;
  $("download").setAttribute("aria-disabled", String(!save));
  if (save && !utterance.url) offerDownload(utterance);
  if (!save) $("download").removeAttribute("href");
}

function offerDownload(utterance) {
  URL.revokeObjectURL($("download").href);
  const file = wavFile(utterance.pieces, RATE, "Synthetic speech, made with Qwen3-TTS");
  utterance.url = URL.createObjectURL(file);
  Object.assign($("download"), { href: utterance.url, download: "speech.wav" });
}

function showError(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

function note(text) {
  $("text-note").textContent = text;
}

function countText() {
  const { length } = $("text").value;
  $("count").textContent = Number.isFinite(limit) ? `${length.toLocaleString("en")} of ${limit.toLocaleString("en")}` : "";
  if (length > limit && !$("live").checked) note("The text is too long for one go.");
  showSnippet();
}

function fill(select, names, first) {
  const before = select.value;
  const entries = [...first, ...names.map((name) => [name, name])];
  select.replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
  if (entries.some(([value]) => value === before)) select.value = before;
}

function fillChoices(ready) {
  limit = ready.limits.max_text_chars;
  fill($("voice"), ready.voices, ready.default_voice ? [] : [["", "the model's choice"]]);
  if (!loaded) $("voice").value = ready.default_voice ?? "";
  fill($("language"), ready.languages, []);
  $("temperature").placeholder = ready.sampling?.temperature ?? "";
  $("top-k").placeholder = ready.sampling?.top_k ?? "";
  loaded = true;
  countText();
}

// The names come with a connection's first message.
async function reloadVoices(chosen) {
  if (!speaker.speaking) speaker.connection.close();
  await speaker.connection.open();
  const { body } = await poll.ask();
  if (body.voices) fill($("voice"), body.voices, []);
  if (chosen) $("voice").value = chosen;
  showSnippet();
}

function showSnippet() {
  const base = new URL("./", location.href).href.replace(/\/$/, "");
  $("snippet").textContent = SNIPPETS[tab]({
    http: base,
    ws: base.replace(/^http/, "ws"),
    text: $("text").value.trim().slice(0, 200) || "Hello.",
    voice: $("voice").value || null,
    language: $("language").value || null,
    needsToken,
  });
}

async function showState(state) {
  const [kind, text] = summary(state);
  $("state").dataset.is = kind;
  $("state-text").textContent = text;
  needsToken ||= state.status === 401;
  $("token-form").hidden = state.status !== 401;
  if (state.status === 401 && poll.token) $("token-note").textContent = "The server does not take this token.";
  $("speak").disabled = state.status !== 200;
  if (!state.body.mode) return;
  fillList($("server"), state);
  const { mode } = state.body;
  $("instruct").disabled = mode === "base";
  $("instruct").placeholder = mode === "base" ? "not with this checkpoint" : "warm, slow, smiling";
  clone.show(state.body);
  if (state.status === 200 && !loaded) await speaker.connection.open().catch(() => {});
}

// --- wiring -----------------------------------------------------------------------------------------

$("speak").onclick = () => speak($("text").value);
$("stop").onclick = stop;
$("live").onchange = ({ target }) => setLive(target.checked);
$("text").addEventListener("input", countText);
for (const id of ["voice", "language"]) $(id).addEventListener("change", showSnippet);
$("clone").addEventListener("toggle", () => $("clone").open && clone.list());
$("token-form").onsubmit = (event) => {
  event.preventDefault();
  poll.token = speaker.connection.token = $("token").value.trim();
  poll.ask();
};
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("speak").disabled && !$("live").checked) speak($("text").value);
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden && !speaker.speaking) speaker.connection.close();
});
$("copy").onclick = async () => {
  try {
    await navigator.clipboard.writeText($("snippet").textContent);
    $("copy").textContent = "Copied";
  } catch {
    getSelection().selectAllChildren($("snippet")); // no clipboard without https
    $("copy").textContent = "Selected";
  }
  setTimeout(() => ($("copy").textContent = "Copy"), 1500);
};

const tabs = document.querySelector(".tabs");
function chooseTab(name) {
  tab = name;
  for (const button of tabs.children) {
    const chosen = button.textContent === name;
    button.setAttribute("aria-selected", String(chosen));
    button.tabIndex = chosen ? 0 : -1;
    if (chosen) $("snippet").setAttribute("aria-label", name);
  }
  showSnippet();
}
for (const name of Object.keys(SNIPPETS)) {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: name });
  button.setAttribute("role", "tab");
  button.setAttribute("aria-controls", "snippet");
  button.onclick = () => chooseTab(name);
  tabs.append(button);
}
tabs.onkeydown = ({ key }) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[key];
  if (!step) return;
  const names = Object.keys(SNIPPETS);
  chooseTab(names[(names.indexOf(tab) + step + names.length) % names.length]);
  tabs.children[names.indexOf(tab)].focus();
};

chooseTab(tab);
countText();
poll.ask();
