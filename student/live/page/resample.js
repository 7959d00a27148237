// Any sample rate -> 16 kHz, piece by piece: a windowed sinc below the lower Nyquist frequency, so that nothing folds back.
export const RATE = 16000;
const ZEROS = 16; // zero crossings of the sinc on each side

export class Resampler {
  constructor(from) {
    this.step = from / RATE; // input samples per output sample
    const cut = Math.min(1, RATE / from) * 0.94; // of the input's Nyquist frequency
    this.half = Math.ceil(ZEROS / cut);
    this.kernel = (x) => {
      if (Math.abs(x) >= this.half) return 0;
      const window = 0.5 + 0.5 * Math.cos((Math.PI * x) / this.half);
      return window * (x === 0 ? cut : Math.sin(Math.PI * cut * x) / (Math.PI * x));
    };
    this.kept = new Float32Array(this.half); // silence before the first sample
    this.at = this.half; // where the next output sample lies in [kept, new]
  }

  // Float32Array at the input's rate -> Float32Array at 16 kHz; it lags `half` input samples behind.
  push(input) {
    if (this.step === 1) return input;
    const all = new Float32Array(this.kept.length + input.length);
    all.set(this.kept);
    all.set(input, this.kept.length);
    const out = [];
    for (; this.at + this.half < all.length; this.at += this.step) {
      const middle = Math.floor(this.at);
      let sum = 0;
      for (let i = middle - this.half + 1; i <= middle + this.half; i++) sum += all[i] * this.kernel(i - this.at);
      out.push(sum);
    }
    const drop = Math.max(0, Math.floor(this.at) - this.half);
    this.kept = all.slice(drop);
    this.at -= drop;
    return Float32Array.from(out);
  }
}
