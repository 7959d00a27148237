// The WebSocket: what goes out, what comes in, and what its end means. docs/SERVING.md describes the messages.
const CHANNELS = { speak: 1, listen: 2 };
const CROWDED = 1 << 18; // bytes that wait in the browser: the network is slower than the sound
// What may be mended by itself; every other end is told and waits for the user.
const AGAIN = new Set([1001, 1005, 1006, 1011, 1012, 1013, 4408, 4429, 4431]);
const MEANING = {
  1006: "The connection was lost.",
  1011: "The connection did not answer any more.",
  1012: "The server was stopped.",
};

export class Stream {
  // told: the fields of the start message; on: {started, chunk(header, images), problem(reason), ended(reason, again)}
  constructor(told, on) {
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    this.socket = new WebSocket(`${scheme}://${location.host}/stream`);
    this.socket.binaryType = "arraybuffer";
    this.on = on;
    this.open = false;
    this.decoding = Promise.resolve(); // one after the other, so that chunks stay in order
    this.socket.onopen = () => this.tell("start", told);
    this.socket.onmessage = ({ data }) => this.hear(data);
    this.socket.onclose = ({ code, reason }) => {
      this.open = false;
      if (code !== 1000) on.ended(reason || MEANING[code] || `The connection ended (${code}).`, AGAIN.has(code), code);
    };
  }

  tell(type, fields = {}) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify({ type, ...fields }));
  }

  // Float32Array in [-1, 1] at 16 kHz; false when the network is too slow for it.
  push(role, samples) {
    if (this.socket.readyState !== WebSocket.OPEN) return true; // its end is told by itself
    if (this.socket.bufferedAmount > CROWDED) return false;
    const message = new ArrayBuffer(4 + 2 * samples.length);
    const view = new DataView(message);
    view.setUint32(0, CHANNELS[role], true);
    for (let i = 0; i < samples.length; i++)
      view.setInt16(4 + 2 * i, Math.max(-32768, Math.min(32767, Math.round(samples[i] * 32768))), true);
    this.socket.send(message);
    return true;
  }

  hear(data) {
    if (typeof data === "string") {
      const { type, reason } = JSON.parse(data);
      if (type === "started") {
        this.open = true;
        this.on.started();
      } else if (type === "problem") this.on.problem(reason);
      return;
    }
    this.decoding = this.decoding.then(() => this.decode(data));
  }

  async decode(data) {
    const length = new DataView(data).getUint32(0, true);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
    let at = 4 + length;
    const pictures = header.sizes.map((size) => new Blob([new Uint8Array(data, at, size, (at += size))], { type: "image/jpeg" }));
    const images = await Promise.all(pictures.map((picture) => createImageBitmap(picture)));
    if (this.socket.readyState === WebSocket.OPEN) this.on.chunk(header, images);
    else images.forEach((image) => image.close());
  }

  close() {
    this.socket.onclose = this.socket.onmessage = null;
    this.socket.close(1000);
    this.open = false;
  }
}
