// Live typing: words go out as they are finished, and what has gone out stays as it is.

const PAUSE_MS = 1500; // after which the rest is spoken, a half word too

export class LiveText {
  // `send(text)` appends to the speech; `pause()` says that what was sent is to be spoken now.
  constructor(area, send, pause, refuse) {
    this.area = area;
    this.send = send;
    this.pause = pause;
    this.refuse = refuse;
    this.sent = "";
    this.timer = 0;
    area.addEventListener("input", (event) => this.active && !event.isComposing && this.follow());
    area.addEventListener("compositionend", () => this.active && this.follow());
  }

  start() {
    this.active = true;
    this.restart();
  }

  stop() {
    this.active = false;
    clearTimeout(this.timer);
  }

  restart() {
    this.sent = this.area.value;
  }

  follow() {
    if (!this.area.value) this.sent = ""; // cleared to begin again
    if (!this.area.value.startsWith(this.sent)) {
      this.area.value = this.sent;
      this.refuse();
      return;
    }
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.finish(), PAUSE_MS);
    const whole = this.area.value.slice(this.sent.length).match(/^[\s\S]*[\s.,;:!?…。，！？]/);
    if (whole) this.hand(whole[0]);
  }

  // All that is there, now.
  finish() {
    clearTimeout(this.timer);
    const rest = this.area.value.slice(this.sent.length);
    if (rest) this.hand(rest);
    this.pause();
  }

  hand(text) {
    this.sent += text;
    this.send(text);
  }
}
