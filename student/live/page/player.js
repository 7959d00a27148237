// Pictures and sound on one clock. A stretch of the stream is planned once all panes have its pictures: its sound is
// scheduled at a time, its pictures are drawn when that time is heard. So lips stay in time whatever the latency is.
// Everything is counted in samples of the sound that was sent.
import { RATE } from "/page/resample.js";

const MARGIN = 0.06; // seconds between planning and playing
const KEEP = 20; // seconds of sent sound that are kept
const HURRY = 1.04; // speed while there is more waiting than needed
const SPARE = 0.22; // seconds that may wait

export class Player {
  constructor(context, panes, soundedAt) {
    this.context = context;
    this.panes = panes.map((canvas) => ({ canvas, paint: canvas.getContext("2d"), frames: [], covered: 0 }));
    this.soundedAt = soundedAt;
    this.volume = context.createGain();
    this.volume.connect(context.destination);
    this.sent = []; // [{first, samples}]
    this.stretches = []; // [{first, last, at, rate}]
    this.playing = new Set();
    this.planned = 0;
    this.next = 0; // when the last planned stretch ends
    this.spare = []; // seconds in hand at the latest plans
    this.drawing = requestAnimationFrame(() => this.draw());
  }

  remember(first, samples) {
    this.sent.push({ first, samples });
    const old = first - KEEP * RATE;
    while (this.sent.length && this.sent[0].first < old) this.sent.shift();
  }

  // Pictures of one chunk: header, ImageBitmaps. Returns the seconds from sound to picture once planned, or null.
  add(pane, header, images) {
    const [first, last] = header.sound;
    if (last <= this.planned) return null; // interrupted meanwhile
    const { frames } = this.panes[pane];
    images.forEach((image, i) => frames.push({ at: first + (header.times[i] - header.start) * RATE, image }));
    this.panes[pane].covered = last;
    return this.plan();
  }

  plan() {
    const covered = Math.min(...this.panes.map((pane) => pane.covered));
    if (covered <= this.planned) return null;
    const now = this.context.currentTime;
    this.spare = [...this.spare.slice(-9), this.next - now];
    const rate = this.spare.length === 10 && Math.min(...this.spare) > SPARE ? HURRY : 1;
    const stretch = { first: this.planned, last: covered, at: Math.max(this.next, now + MARGIN), rate };
    this.planned = covered;
    this.next = stretch.at + (stretch.last - stretch.first) / RATE / rate;
    this.stretches = [...this.stretches.filter((old) => old.at > now - 2), stretch];
    this.play(stretch);
    for (const pane of this.panes) {
      const shown = this.heard(now);
      while (pane.frames.length > 1 && pane.frames[1].at <= shown) pane.frames.shift().image.close(); // also unseen
    }
    return stretch.at - this.soundedAt(stretch.first);
  }

  play({ first, last, at, rate }) {
    const buffer = this.context.createBuffer(1, last - first, RATE);
    const sound = buffer.getChannelData(0);
    for (const piece of this.sent) {
      const start = Math.max(first, piece.first), stop = Math.min(last, piece.first + piece.samples.length);
      if (start < stop) sound.set(piece.samples.subarray(start - piece.first, stop - piece.first), start - first);
    }
    const source = this.context.createBufferSource();
    source.buffer = buffer;
    source.playbackRate.value = rate;
    source.connect(this.volume);
    source.onended = () => this.playing.delete(source);
    this.playing.add(source);
    source.start(at);
  }

  // The sample that is heard at a time of the context's clock.
  heard(time) {
    for (let i = this.stretches.length - 1; i >= 0; i--) {
      const { first, last, at, rate } = this.stretches[i];
      if (time >= at) return Math.min(last, first + (time - at) * RATE * rate);
    }
    return -1;
  }

  draw() {
    const sample = this.heard(this.context.currentTime - (this.context.outputLatency || 0));
    for (const pane of this.panes) {
      let due = null;
      while (pane.frames.length && pane.frames[0].at <= sample) {
        due?.close();
        due = pane.frames.shift().image;
      }
      if (!due) continue;
      show(pane.canvas, pane.paint, due);
      due.close();
    }
    this.drawing = requestAnimationFrame(() => this.draw());
  }

  // Forget everything that belongs to sound before `sample` and is not yet heard.
  interrupt(sample) {
    this.hush();
    for (const pane of this.panes) {
      pane.frames.splice(0).forEach(({ image }) => image.close());
      pane.covered = Math.max(pane.covered, sample);
    }
    this.stretches = [];
    this.planned = sample;
    this.next = 0;
    this.spare = [];
  }

  hush() {
    this.playing.forEach((source) => source.stop());
    this.playing.clear();
  }

  close() {
    cancelAnimationFrame(this.drawing);
    this.interrupt(0);
    this.volume.disconnect();
  }
}

export function show(canvas, paint, image) {
  const width = image.naturalWidth || image.width, height = image.naturalHeight || image.height;
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  paint.drawImage(image, 0, 0);
}
