// Where the sound comes from, and the pump that sends it in real time: what the clock says is due is taken from the source.
// A source has take(count) -> Float32Array of at most `count` samples at 16 kHz.
import { RATE } from "/page/resample.js";

const TICK_MS = 40;
const LATE = 1.0; // seconds the page may have slept (a hidden tab) before the time lost is skipped

export class Silence {
  take(count) {
    return new Float32Array(count);
  }
  close() {}
}

export class Recording {
  constructor(samples, ended) {
    this.samples = samples;
    this.ended = ended;
    this.at = 0;
  }
  static async fetch(url, ended) {
    const answer = await fetch(url);
    if (!answer.ok) throw new Error(`The recording could not be loaded (${answer.status}).`);
    const decoder = new OfflineAudioContext(1, 1, RATE); // decodes to its own rate
    const sound = await decoder.decodeAudioData(await answer.arrayBuffer());
    return new Recording(sound.getChannelData(0).slice(), ended);
  }
  take(count) {
    const piece = new Float32Array(count);
    piece.set(this.samples.subarray(this.at, this.at + count));
    const over = this.at < this.samples.length && this.at + count >= this.samples.length;
    this.at += count;
    if (over) this.ended();
    return piece;
  }
  close() {}
}

const MICROPHONE = {
  NotAllowedError: "The microphone was not allowed. Allow it in the browser's address bar, or play a recording.",
  NotFoundError: "No microphone was found. Plug one in, or play a recording.",
  NotReadableError: "The microphone is in use by another program. Close it there, or play a recording.",
};

export class Microphone {
  static async open(lost) {
    if (!navigator.mediaDevices?.getUserMedia || !window.isSecureContext)
      throw new Error("The browser gives the microphone to https and to localhost only. Open the page there, or play a recording.");
    const self = new Microphone();
    try {
      self.stream = await navigator.mediaDevices.getUserMedia({
        audio: { echoCancellation: true, noiseSuppression: true, autoGainControl: true, channelCount: 1 },
      });
    } catch (error) {
      throw new Error(MICROPHONE[error.name] ?? `The microphone cannot be used (${error.message}). Play a recording instead.`);
    }
    self.context = new AudioContext(); // at the microphone's own rate: not every browser connects different ones
    await self.context.audioWorklet.addModule("/page/recorder.js");
    self.input = self.context.createMediaStreamSource(self.stream);
    self.node = new AudioWorkletNode(self.context, "recorder", { numberOfOutputs: 0 });
    self.pieces = [];
    self.length = 0;
    self.node.port.onmessage = ({ data }) => {
      self.pieces.push(data);
      self.length += data.length;
      while (self.length > RATE && self.pieces.length > 1) self.length -= self.pieces.shift().length; // nobody takes it
    };
    self.stream.getAudioTracks()[0].onended = lost;
    self.input.connect(self.node);
    return self;
  }
  take(count) {
    const piece = new Float32Array(Math.min(count, this.length));
    let at = 0;
    while (at < piece.length) {
      const first = this.pieces[0].subarray(0, piece.length - at);
      piece.set(first, at);
      at += first.length;
      if (first.length === this.pieces[0].length) this.pieces.shift();
      else this.pieces[0] = this.pieces[0].subarray(first.length);
    }
    this.length -= piece.length;
    return piece;
  }
  close() {
    this.stream.getAudioTracks()[0].onended = null;
    this.stream.getTracks().forEach((track) => track.stop());
    this.node.port.close();
    this.context.close();
  }
}

export class Pump {
  // give(first, samples) gets every piece with the number of its first sample in the stream.
  constructor(context, give) {
    this.context = context;
    this.give = give;
    this.source = new Silence();
    this.sent = 0;
    this.began = context.currentTime;
    this.timer = setInterval(() => this.tick(), TICK_MS);
  }
  use(source) {
    if (this.source !== source) this.source.close();
    this.source = source;
  }
  // When a sample of the stream was sounding, in the context's time.
  soundedAt(sample) {
    return this.began + sample / RATE;
  }
  tick() {
    let due = Math.floor((this.context.currentTime - this.began) * RATE) - this.sent;
    if (due > LATE * RATE) {
      this.began += (due - RATE * 0.1) / RATE;
      due = Math.floor(RATE * 0.1);
    }
    if (due <= 0) return;
    let piece = this.source.take(due);
    if (piece.length < due && due > 0.3 * RATE) {
      const filled = new Float32Array(due); // a microphone that stalls is silent
      filled.set(piece);
      piece = filled;
    }
    if (!piece.length) return;
    this.give(this.sent, piece);
    this.sent += piece.length;
  }
  close() {
    clearInterval(this.timer);
    this.source.close();
  }
}
