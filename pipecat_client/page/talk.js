// The page of pipeline_demo.py: a conversation, and what was said in it.

import { Conversation } from "./conversation.js";
import { whyNoMicrophone } from "./shared/recorder.js";

const $ = (id) => document.getElementById(id);
let conversation = null;
let line = null; // of the agent, which grows
let interruptions = 0;

const HANDLERS = {
  "bot-ready": () => show("good", "listening"),
  "bot-started-speaking": () => show("good", "speaking"),
  "bot-stopped-speaking": () => {
    show("good", "listening");
    line = null;
  },
  "user-started-speaking": () => show("good", "hears you"),
  "bot-tts-text": ({ text }) => {
    line ??= add("agent", "");
    line.textContent += (line.textContent ? " " : "") + text;
  },
  "bot-interrupted": () => {
    line?.classList.add("cut");
    line = null;
    $("interruptions").textContent = `interrupted ${++interruptions} times`.replace(" 1 times", " once");
  },
  "user-transcription": ({ text, final }) => final && add("me", text),
  error: ({ error, message }) => fail(error ?? message),
};

function add(who, text) {
  const item = Object.assign(document.createElement("li"), { className: who, textContent: text });
  $("said").append(item);
  item.scrollIntoView({ block: "nearest" });
  return item;
}

function show(kind, text) {
  $("state").dataset.is = kind;
  $("state-text").textContent = text;
}

function fail(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

function setConnected(on) {
  $("talk").textContent = on ? "Hang up" : "Talk";
  $("talk").classList.toggle("danger", on);
  $("typed").disabled = $("send").disabled = !on;
  if (!on) $("level").value = 0;
}

async function start() {
  fail("");
  show("busy", "connecting");
  line = null;
  conversation = new Conversation({
    onMessage: ({ type, data }) => HANDLERS[type]?.(data ?? {}),
    onLevel: (peak) => ($("level").value = peak),
    onEnd: end,
  });
  conversation.muted = $("mute").checked;
  setConnected(true);
  try {
    await conversation.start();
  } catch (error) {
    const refused = error.name === "NotAllowedError";
    conversation?.leave(refused ? "the browser was told not to give the microphone" : error.message);
  }
}

function end(reason) {
  conversation = null;
  setConnected(false);
  show("bad", "not connected");
  fail(reason);
}

$("talk").onclick = () => (conversation ? conversation.leave() : start());
$("mute").onchange = ({ target }) => conversation && (conversation.muted = target.checked);
$("type").onsubmit = (event) => {
  event.preventDefault();
  const text = $("typed").value.trim();
  if (!text || !conversation) return;
  add("me", text);
  conversation.say("send-text", { content: text });
  $("typed").value = "";
};
$("why").textContent = whyNoMicrophone();
$("why").hidden = !whyNoMicrophone();
$("talk").disabled = Boolean(whyNoMicrophone());
