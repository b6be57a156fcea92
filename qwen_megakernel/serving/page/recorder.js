// The microphone: raw samples, without the browser's processing, which would change the voice.

import { toInt16, wavFile } from "./wav.js";

export const MAX_S = 30;

// Why this page gets no microphone; empty if it may ask for one.
export function whyNoMicrophone() {
  if (!isSecureContext) {
    return (
      "This browser gives pages the microphone only over https or from localhost. Open the page through a tunnel " +
      `(ssh -L ${location.port || 80}:127.0.0.1:${location.port || 80} user@host, then http://localhost:${location.port || 80}), ` +
      "or put TLS in front of the server."
    );
  }
  if (!navigator.mediaDevices?.getUserMedia) return "This browser has no microphone for pages.";
  return "";
}

export class Recorder {
  // `onLevel(peak, seconds)` is called for every block.
  constructor(onLevel) {
    this.onLevel = onLevel;
  }

  async start() {
    this.stream = await navigator.mediaDevices.getUserMedia({
      audio: { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false },
    });
    this.context = new AudioContext();
    await this.context.audioWorklet.addModule(new URL("recorder-worklet.js", import.meta.url));
    this.node = new AudioWorkletNode(this.context, "recorder", { numberOfOutputs: 0 });
    this.pieces = [];
    this.count = 0;
    this.node.port.onmessage = ({ data }) => this.take(data);
    this.context.createMediaStreamSource(this.stream).connect(this.node);
  }

  take(samples) {
    this.pieces.push(toInt16(samples));
    this.count += samples.length;
    const peak = samples.reduce((max, x) => Math.max(max, Math.abs(x)), 0);
    this.onLevel(peak, this.count / this.context.sampleRate);
  }

  // A WAV file of what was said.
  async stop() {
    this.node.port.onmessage = null;
    for (const track of this.stream.getTracks()) track.stop();
    const rate = this.context.sampleRate;
    await this.context.close();
    return wavFile(this.pieces, rate);
  }
}
