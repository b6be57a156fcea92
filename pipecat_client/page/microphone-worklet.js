// The microphone at 16 kHz in pieces of 20 ms, whatever rate it has: each sample is a mean of those it replaces.

const RATE = 16000;
const PIECE = RATE / 50;

class Microphone extends AudioWorkletProcessor {
  constructor() {
    super();
    this.piece = new Int16Array(PIECE);
    this.count = 0; // in the piece
    this.sum = this.weight = 0; // of the sample that is being made
  }

  process([[samples]]) {
    for (const sample of samples ?? []) this.add(sample);
    return true;
  }

  add(sample) {
    let left = RATE / sampleRate; // how much of a sample this one is
    while (this.weight + left >= 1) {
      const part = 1 - this.weight;
      this.put(this.sum + part * sample);
      left -= part;
      this.sum = this.weight = 0;
    }
    this.sum += left * sample;
    this.weight += left;
  }

  put(value) {
    this.piece[this.count++] = Math.max(-32768, Math.min(32767, Math.round(32767 * value)));
    if (this.count < PIECE) return;
    this.port.postMessage(this.piece);
    this.piece = new Int16Array(PIECE);
    this.count = 0;
  }
}

registerProcessor("microphone", Microphone);
