// Draws an utterance: sound above, and below how far ahead of the play head each chunk arrived.

const BAR = 3; // CSS pixels, with a gap of 1
const MIN_S = 4; // of the whole width
const LEAD_HEIGHT = 34;
const FULL_LEAD_S = 2;

export class Waveform {
  constructor(canvas) {
    this.canvas = canvas;
    this.utterance = null;
    this.peaks = []; // of 10 ms each
    this.counted = 0; // pieces
    this.pending = false;
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  show(utterance) {
    this.utterance = utterance;
    this.peaks = [];
    this.counted = 0;
    this.draw();
  }

  draw() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => {
      this.pending = false;
      this.paint();
    });
  }

  readPeaks() {
    const { pieces, rate } = this.utterance;
    const step = rate / 100;
    for (; this.counted < pieces.length; this.counted++) {
      const piece = pieces[this.counted];
      for (let at = 0; at < piece.length; at += step) {
        let peak = 0;
        for (let i = at; i < Math.min(at + step, piece.length); i++) peak = Math.max(peak, Math.abs(piece[i]));
        this.peaks.push(peak / 32768);
      }
    }
  }

  paint() {
    const { canvas } = this;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    canvas.width = width * devicePixelRatio;
    canvas.height = height * devicePixelRatio;
    const pen = canvas.getContext("2d");
    pen.scale(devicePixelRatio, devicePixelRatio);
    const style = getComputedStyle(canvas);
    const colour = (name) => style.getPropertyValue(name);
    const middle = (height - LEAD_HEIGHT) / 2;
    pen.fillStyle = colour("--line");
    pen.fillRect(0, middle, width, 1);
    pen.fillRect(0, height - 1, width, 1);
    if (!this.utterance) return;
    this.readPeaks();
    const { rate, played, arrivals } = this.utterance;
    const seconds = Math.max(MIN_S, this.utterance.lengthS);
    const x = (samples) => (samples / rate / seconds) * width;

    const perBar = (100 * seconds * BAR) / width;
    for (let bar = 0; bar * perBar < this.peaks.length; bar++) {
      const part = this.peaks.slice(Math.floor(bar * perBar), Math.max(Math.floor((bar + 1) * perBar), Math.floor(bar * perBar) + 1));
      const size = Math.max(1, Math.sqrt(Math.max(...part)) * (middle - 4));
      pen.fillStyle = colour(bar * BAR < x(played) ? "--accent" : "--accent-soft");
      pen.fillRect(bar * BAR, middle - size, BAR - 1, 2 * size);
    }
    arrivals.forEach(({ start, count, lead }, index) => {
      const late = index > 0 && lead <= 0;
      const size = late ? 6 : 3 + Math.min(1, lead / rate / FULL_LEAD_S) * (LEAD_HEIGHT - 8);
      pen.fillStyle = colour(late ? "--bad" : "--accent-soft");
      pen.fillRect(x(start), height - 1 - size, Math.max(1, x(count) - 1), size);
    });
    pen.fillStyle = colour("--ink");
    pen.fillRect(Math.min(width - 2, Math.max(0, x(played) - 1)), 0, 2, height);
  }
}
