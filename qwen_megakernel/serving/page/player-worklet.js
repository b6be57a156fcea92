// Plays the chunks of one utterance at a time. It begins once FIRST_FILL_S is buffered. After each
// underrun it waits for twice as much, so that a slow network gives one gap and not many.
//
// Browsers have worklets only over https and from localhost. Elsewhere player.js runs the class itself.

const FIRST_FILL_S = 0.08;
const MAX_FILL_S = 0.4;
const AUDIBLE = 10 ** (-50 / 20); // RMS of a block
const BLOCKS_PER_REPORT = 6;

export class PlayerProcessor extends (globalThis.AudioWorkletProcessor ?? Object) {
  // In a worklet, what is needed is there already.
  constructor({ port, rate, now } = {}) {
    super();
    if (port) this.port = port;
    this.rate = rate ?? sampleRate;
    this.now = now ?? (() => currentTime);
    this.begin(0);
    this.port.onmessage = ({ data }) => this.follow(data);
  }

  begin(id) {
    this.id = id;
    this.chunks = [];
    this.offset = 0; // in the first chunk
    this.buffered = 0; // samples
    this.played = 0; // samples
    this.fill = FIRST_FILL_S * this.rate;
    this.playing = this.ended = this.stopping = this.heard = this.told = false;
    this.blocks = 0;
  }

  follow({ type, id, samples }) {
    if (type === "begin") this.begin(id);
    if (id !== this.id) return;
    if (type === "audio" && !this.stopping) {
      this.chunks.push(samples);
      this.buffered += samples.length;
    }
    if (type === "end") this.ended = true;
    if (type === "stop") this.stopping = this.ended = true;
  }

  tell(type, more) {
    this.port.postMessage({ type, id: this.id, played: this.played, ...more });
  }

  process(_, [[out]]) {
    if (!this.playing && this.buffered && (this.ended || this.buffered >= this.fill)) this.playing = true;
    if (this.playing) this.play(out);
    if (this.ended && !this.buffered && !this.told) {
      this.told = true;
      this.tell("finished");
    }
    return true;
  }

  play(out) {
    const count = this.take(out);
    if (this.stopping) {
      for (let i = 0; i < count; i++) out[i] *= 1 - i / count; // a cut would click
      this.chunks = [];
      this.buffered = 0;
    }
    this.played += count;
    if (!this.heard && Math.sqrt(out.reduce((sum, x) => sum + x * x, 0) / out.length) > AUDIBLE) {
      this.heard = true;
      this.tell("audible", { at: this.now() });
    }
    if (!this.buffered) {
      this.playing = false;
      if (!this.ended) {
        this.fill = Math.min(2 * this.fill, MAX_FILL_S * this.rate);
        this.tell("starved");
      }
    }
    if (this.blocks++ % BLOCKS_PER_REPORT === 0 || !this.playing) this.tell("position");
  }

  take(out) {
    let count = 0;
    while (count < out.length && this.chunks.length) {
      const part = this.chunks[0].subarray(this.offset, this.offset + out.length - count);
      out.set(part, count);
      count += part.length;
      this.offset += part.length;
      if (this.offset === this.chunks[0].length) {
        this.chunks.shift();
        this.offset = 0;
      }
    }
    this.buffered -= count;
    return count;
  }
}

globalThis.registerProcessor?.("player", PlayerProcessor);
