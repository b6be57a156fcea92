// A conversation over Pipecat's WebSocket transport: microphone up, speech and RTVI messages down.

import { audioFrame, messageFrame, parseFrame } from "./frames.js";
import { Player } from "./shared/player.js";

const MICROPHONE_RATE = 16000;
const SPEAKER_RATE = 24000;

export class Conversation {
  // `onMessage` takes RTVI's messages; `onLevel` the microphone's peak; `onEnd` a reason, empty if we left.
  constructor({ onMessage, onLevel, onEnd }) {
    Object.assign(this, { onMessage, onLevel, onEnd });
    this.player = new Player(SPEAKER_RATE);
    this.muted = false;
    this.utterance = 0;
    this.sent = 0;
  }

  async start() {
    // With the browser's echo cancellation: the agent must not hear itself.
    [this.stream] = await Promise.all([
      navigator.mediaDevices.getUserMedia({ audio: { echoCancellation: true, noiseSuppression: true, autoGainControl: true } }),
      this.player.prepare(),
    ]);
    this.begin();
    const answer = await fetch("../start", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ transport: "websocket" }),
    });
    if (!answer.ok) throw new Error(`the agent's server answers ${answer.status}`);
    await this.connect((await answer.json()).wsUrl);
    await this.listen();
    this.say("client-ready", { version: "1.0.0", about: { library: "page" } });
  }

  connect(address) {
    // The server may name itself otherwise than this browser reached it, as through a tunnel.
    const url = new URL(address);
    url.host = location.host;
    url.protocol = location.protocol.replace("http", "ws");
    return new Promise((resolve, reject) => {
      this.socket = new WebSocket(url);
      this.socket.binaryType = "arraybuffer";
      this.socket.onopen = resolve;
      this.socket.onmessage = ({ data }) => this.take(parseFrame(data));
      this.socket.onclose = () => {
        reject(new Error("the agent takes no connection"));
        this.leave("the agent has left");
      };
    });
  }

  async listen() {
    this.context = new AudioContext();
    await this.context.audioWorklet.addModule(new URL("microphone-worklet.js", import.meta.url));
    const node = new AudioWorkletNode(this.context, "microphone", { numberOfOutputs: 0 });
    node.port.onmessage = ({ data }) => this.hear(data);
    this.context.createMediaStreamSource(this.stream).connect(node);
  }

  hear(samples) {
    if (this.muted) samples.fill(0); // the voice detector wants to hear silence, not nothing
    this.onLevel(samples.reduce((max, x) => Math.max(max, Math.abs(x)), 0) / 32768);
    this.send(audioFrame(samples, MICROPHONE_RATE));
  }

  take({ audio, message, interruption }) {
    if (audio) this.player.push(this.utterance, Float32Array.from(audio, (x) => x / 32768));
    if (interruption || message?.type === "bot-interrupted") this.begin();
    if (message?.label === "rtvi-ai") this.onMessage(message);
  }

  // What is still to be played is dropped.
  begin() {
    this.player.stop(this.utterance);
    this.player.begin(++this.utterance);
  }

  say(type, data) {
    this.send(messageFrame({ label: "rtvi-ai", type, id: String(++this.sent), data }));
  }

  send(frame) {
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(frame);
  }

  leave(reason = "") {
    if (this.left) return;
    this.left = true;
    for (const track of this.stream?.getTracks() ?? []) track.stop();
    this.context?.close();
    this.player.context?.close();
    this.socket?.close();
    this.onEnd(reason);
  }
}
