// Speech from text to loudspeaker: one utterance at a time, over one connection.

import { Connection } from "./connection.js";
import { Player } from "./player.js";
import { Utterance } from "./utterance.js";

export const RATE = 24000;

export class Speaker {
  // `onChange(utterance)` after every event; `onReady(message)`; `onError(text)`.
  constructor({ onChange, onReady, onError }) {
    this.onChange = onChange;
    this.onError = onError;
    this.utterance = null;
    this.player = new Player(RATE);
    this.player.listener = (message) => this.hear(message);
    this.connection = new Connection(
      (message) => (message.type === "ready" ? onReady(message) : this.follow(message)),
      (reason) => this.lose(reason),
    );
  }

  get speaking() {
    return Boolean(this.utterance && !this.utterance.settled);
  }

  // Opens an utterance whose text is still to come; `options` are fields of `speak`.
  async begin(options) {
    this.stop();
    const utterance = new Utterance(RATE);
    this.utterance = utterance;
    this.options = options;
    try {
      await Promise.all([this.player.prepare(), this.connection.open()]);
    } catch (error) {
      this.fail(error.message);
      return null;
    }
    if (this.utterance !== utterance || utterance.settled) return null; // stopped meanwhile
    this.player.begin(utterance.id);
    this.onChange(utterance);
    return utterance;
  }

  append(text) {
    const { utterance } = this;
    utterance.lastTextAt = performance.now();
    utterance.sentAt ??= utterance.lastTextAt;
    this.connection.send({ type: "speak", context_id: utterance.id, text, ...this.options });
  }

  flush() {
    this.connection.send({ type: "flush", context_id: this.utterance.id });
  }

  end() {
    this.utterance.textEnded = true;
    this.connection.send({ type: "end", context_id: this.utterance.id });
  }

  stop() {
    if (!this.speaking) return;
    const { utterance } = this;
    if (!utterance.done && utterance.sentAt !== null) this.connection.send({ type: "cancel", context_id: utterance.id });
    if (this.player.port) this.player.stop(utterance.id);
    utterance.settled = utterance.stopped = true;
    this.onChange(utterance);
  }

  follow(message) {
    const { utterance } = this;
    if (!utterance) return;
    if (message.type === "error" && !utterance.settled && [null, utterance.id].includes(message.context_id)) {
      this.onError(message.message);
      // A context that was not opened gets no `done`.
      if (!utterance.stream) this.settle(utterance);
    }
    if (message.type === "started" && message.context_id === utterance.id) utterance.stream = message.stream;
    if (message.type === "audio" && message.stream === utterance.stream && !utterance.stopped) this.take(message.samples);
    if (message.context_id !== utterance.id) return;
    if (message.type === "segment") utterance.segmentEnded = true;
    if (message.type === "done") {
      utterance.done = message;
      this.player.end(utterance.id);
      if (!utterance.received) this.settle(utterance);
    }
    this.onChange(utterance);
  }

  take(samples) {
    this.utterance.add(samples);
    this.player.push(this.utterance.id, Float32Array.from(samples, (x) => x / 32768));
    this.onChange(this.utterance);
  }

  hear({ type, id, played, at }) {
    const { utterance } = this;
    if (!utterance || id !== utterance.id) return;
    utterance.played = played;
    if (type === "audible") utterance.ttfa = this.player.wallTime(at) - utterance.sentAt;
    if (type === "starved") utterance.starved();
    if (type === "finished") this.settle(utterance);
    this.onChange(utterance);
  }

  lose(reason) {
    if (this.speaking) this.fail(`The speech broke off: ${reason}.`);
  }

  fail(text) {
    this.onError(text);
    if (this.utterance && this.player.port) this.player.end(this.utterance.id);
    if (this.utterance) this.settle(this.utterance);
  }

  settle(utterance) {
    utterance.settled = true;
    this.onChange(utterance);
  }
}
