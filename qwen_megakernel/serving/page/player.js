// The loudspeaker: an AudioContext at the wire's rate, and a worklet that holds what is buffered.

import { PlayerProcessor } from "./player-worklet.js";

const BLOCK = 1024; // samples, where there are no worklets

export class Player {
  constructor(rate) {
    this.rate = rate;
    this.listener = () => {}; // takes the worklet's messages
    this.started = null;
  }

  // Must first be called from a click or a key press: browsers allow sound only then.
  prepare() {
    this.started ??= this.start();
    this.context.resume();
    return this.started;
  }

  async start() {
    this.context = new AudioContext({ sampleRate: this.rate, latencyHint: "interactive" });
    this.node = this.context.audioWorklet ? await this.makeWorklet() : this.makeProcessor();
    this.port.onmessage = ({ data }) => this.listener(data);
    this.node.connect(this.context.destination);
  }

  async makeWorklet() {
    await this.context.audioWorklet.addModule(new URL("player-worklet.js", import.meta.url));
    const node = new AudioWorkletNode(this.context, "player", { numberOfInputs: 0, outputChannelCount: [1] });
    this.port = node.port;
    return node;
  }

  makeProcessor() {
    const { port1, port2 } = new MessageChannel();
    const { context } = this;
    const processor = new PlayerProcessor({ port: port2, rate: this.rate, now: () => context.currentTime });
    const node = context.createScriptProcessor(BLOCK, 0, 1);
    node.onaudioprocess = ({ outputBuffer }) => {
      const out = outputBuffer.getChannelData(0);
      out.fill(0);
      processor.process(null, [[out]]);
    };
    this.port = port1;
    return node;
  }

  begin(id) {
    this.port.postMessage({ type: "begin", id });
  }

  // The samples go to the worklet's thread and are empty here afterwards.
  push(id, samples) {
    this.port.postMessage({ type: "audio", id, samples }, [samples.buffer]);
  }

  end(id) {
    this.port.postMessage({ type: "end", id });
  }

  stop(id) {
    this.port.postMessage({ type: "stop", id });
  }

  // When a sample leaves the loudspeaker, in the time of performance.now().
  wallTime(contextTime) {
    const latency = this.context.outputLatency || this.context.baseLatency || 0;
    return performance.now() + 1000 * (contextTime - this.context.currentTime + latency);
  }
}
