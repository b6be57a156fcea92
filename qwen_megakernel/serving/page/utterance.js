// One utterance: what was sent for it, what came, what was heard, and the figures of that.

let made = 0;

export class Utterance {
  constructor(rate) {
    this.id = `u${++made}`;
    this.rate = rate;
    this.sentAt = null; // of the first text, performance.now()
    this.textEnded = false;
    this.stream = null;
    this.pieces = []; // Int16Array
    this.arrivals = []; // {start, count, lead}: samples
    this.received = 0; // samples
    this.played = 0; // samples
    this.underruns = 0;
    this.ttfa = null; // ms
    this.done = null; // the server's message
    this.settled = false; // nothing more is heard
    this.segmentEnded = true;
  }

  get lengthS() {
    return this.received / this.rate;
  }

  add(samples) {
    const lead = this.received - this.played; // what could still be played when this came
    this.arrivals.push({ start: this.received, count: samples.length, lead });
    this.pieces.push(samples);
    this.received += samples.length;
    this.segmentEnded = false;
  }

  // The loudspeaker ran dry. That is our fault unless the text was the one to be late.
  starved() {
    if (this.textEnded ? !this.done : !this.segmentEnded && performance.now() - this.lastTextAt > 1000) this.underruns++;
  }
}
