// In the audio thread: the microphone, resampled to 16 kHz, handed to the page in pieces of about 20 ms.
import { Resampler } from "/page/resample.js";

class Recorder extends AudioWorkletProcessor {
  constructor() {
    super();
    this.resampler = new Resampler(sampleRate);
    this.pieces = [];
    this.length = 0;
  }

  process([input]) {
    if (!input.length) return true; // not connected yet
    const mono = new Float32Array(input[0].length);
    for (const channel of input) for (let i = 0; i < mono.length; i++) mono[i] += channel[i] / input.length;
    const piece = this.resampler.push(mono);
    this.pieces.push(piece);
    this.length += piece.length;
    if (this.length >= 320) {
      const all = new Float32Array(this.length);
      let at = 0;
      for (const part of this.pieces) all.set(part, at), (at += part.length);
      this.port.postMessage(all, [all.buffer]);
      this.pieces = [];
      this.length = 0;
    }
    return true;
  }
}

registerProcessor("recorder", Recorder);
