// The tiles under the picture: one value per checkpoint, and the latest minute as a line.
const POINTS = 120, FEWEST = 24; // the line fills its tile once there are that many
const SVG = "http://www.w3.org/2000/svg";

class Meter {
  constructor(id, format, unit) {
    this.tile = document.getElementById(id);
    this.values = this.tile.querySelector(".values");
    this.chart = this.tile.querySelector("svg");
    this.note = this.tile.querySelector("p");
    this.format = format;
    this.unit = unit;
    this.mark = null; // a level drawn as a dashed line
    this.clear(1);
  }
  clear(count) {
    this.history = Array.from({ length: count }, () => []);
    this.values.replaceChildren(Object.assign(document.createElement("b"), { textContent: "–" }));
    this.chart.replaceChildren();
  }
  add(pane, value) {
    if (value === null || !Number.isFinite(value)) return;
    this.history[pane].push(value);
    if (this.history[pane].length > POINTS) this.history[pane].shift();
    this.paint();
  }
  paint() {
    const parts = this.history.flatMap((points, pane) => {
      const value = document.createElement("b");
      value.className = pane ? "of-b" : "of-a";
      value.textContent = points.length ? this.format(points[points.length - 1]) : "–";
      return [value];
    });
    parts.push(Object.assign(document.createElement("small"), { textContent: this.unit }));
    this.values.replaceChildren(...parts);
    const top = 1.15 * Math.max(1e-9, this.mark ?? 0, ...this.history.flat());
    const height = (value) => (27 - (26 * value) / top).toFixed(2);
    const lines = this.history.map((points, pane) => {
      const line = document.createElementNS(SVG, "polyline");
      line.setAttribute("class", pane ? "of-b" : "of-a");
      line.setAttribute("points", points.map((value, i) => `${((120 * i) / (Math.max(FEWEST, points.length) - 1)).toFixed(2)},${height(value)}`).join(" "));
      return line;
    });
    if (this.mark !== null) {
      const line = document.createElementNS(SVG, "line");
      const y = height(this.mark);
      Object.entries({ x1: 0, x2: 120, y1: y, y2: y }).forEach(([name, value]) => line.setAttribute(name, value));
      lines.unshift(line);
    }
    this.chart.replaceChildren(...lines);
  }
}

export class Meters {
  constructor(models) {
    this.latency = new Meter("latency", (seconds) => Math.round(1000 * seconds).toString(), "ms");
    this.load = new Meter("load", (factor) => factor.toFixed(factor < 0.095 ? 3 : 2), "×");
    this.drift = new Meter("drift", (distance) => distance.toFixed(3), "");
    this.memory = new Meter("memory", (mib) => Math.round(mib).toString(), "MiB");
    const natural = models[0].natural;
    this.drift.mark = natural;
    this.drift.note.textContent =
      natural === null
        ? "not measured: this export comes without an identity embedder"
        : `identity distance to the references, 0 to 2; two clips of one real character: ${natural.toFixed(3)}`;
  }
  start(count) {
    [this.latency, this.load, this.drift].forEach((meter) => meter.clear(count));
    this.memory.clear(1);
  }
  // header of a chunk; `latency` null while the other pane is not there yet
  add(pane, header, latency) {
    this.load.add(pane, header.load);
    this.load.tile.classList.toggle("over", this.load.history.some((points) => points[points.length - 1] > 1)); // cannot keep up
    this.drift.add(pane, header.drift);
    if (pane === 0) this.memory.add(0, header.memory_mib);
    if (latency === null) return;
    this.latency.history.length = 1; // all panes are shown at one time
    this.latency.add(0, latency);
    const parts = [header.seconds, header.server_seconds].map((seconds) => Math.round(1000 * seconds));
    const rest = Math.max(0, Math.round(1000 * latency) - parts[0] - parts[1]);
    this.latency.note.textContent = `from a sound to its picture: ${parts[0]} chunk, ${parts[1]} server, ${rest} network and buffer`;
  }
}
