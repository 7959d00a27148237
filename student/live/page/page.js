// The page: what the user chooses goes to the server, what comes back is shown; every trouble is said in words.
import { Meters } from "/page/meters.js";
import { Player, show } from "/page/player.js";
import { Microphone, Pump, Recording, Silence } from "/page/sound.js";
import { Stream } from "/page/stream.js";
import { RATE } from "/page/resample.js";

const $ = (id) => document.getElementById(id);
const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`)?.value;
const STATES = { speak: "speaking", listen: "listening", silence: "silent", wait: "starting", off: "not started" };
const FIRST_WAIT = 1, LONGEST_WAIT = 8; // seconds before connecting again
const BORN = { expression: "Expression", gaze: "Gaze", pose: "Head" }; // titles of what the text may say

let about; // what the server offers
let meters;
let live = null; // {context, stream, pump, player}, filled in this order; while a session runs
let waiting = 0; // timer of the next attempt
let wait = FIRST_WAIT;
let sounding = true;
let both = false;

// ---- words -------------------------------------------------------------------------------------------------------

function status(text, tone = "quiet") {
  $("status").textContent = text;
  $("status").dataset.tone = tone;
}

function notice(text, tone = "warn", retry = false) {
  $("notice").hidden = !text;
  $("notice").dataset.tone = tone;
  $("notice").firstElementChild.textContent = text;
  $("retry").hidden = !retry;
}

function describeState(pane, state) {
  const place = document.querySelector(`#pane-${"ab"[pane]} .state`);
  place.textContent = STATES[state];
  place.dataset.state = state;
}

function buttons() {
  const on = live !== null || waiting !== 0;
  $("start").textContent = on ? "Stop" : "Start";
  $("start").disabled = !about;
  $("interrupt").disabled = !live?.stream?.open;
  $("again").disabled = !live?.stream?.open;
}

// ---- a session -----------------------------------------------------------------------------------------------------

function models() {
  return both ? about.models.map(({ name }) => name) : [about.models[0].name];
}

async function start() {
  cancelWaiting();
  notice("");
  status("connecting");
  const session = { context: live?.context ?? new AudioContext({ sampleRate: RATE }) };
  shut(live);
  live = session;
  const panes = models();
  meters.start(panes.length);
  panes.forEach((_, pane) => describeState(pane, "wait"));
  buttons();
  await session.context.resume();
  if (live !== session) return; // stopped or started again meanwhile
  const canvases = panes.map((_, pane) => document.querySelector(`#pane-${"ab"[pane]} canvas`));
  const told = { character: chosen("character"), text: $("text").value, seed: 0, sample_rate: RATE, models: panes };
  session.stream = new Stream(told, {
    started: () => {
      wait = FIRST_WAIT;
      status("live", "good");
      session.pump = new Pump(session.context, (first, samples) => give(session, first, samples));
      session.player = new Player(session.context, canvases, (sample) => session.pump.soundedAt(sample));
      session.player.volume.gain.value = sounding ? 1 : 0;
      buttons();
      useSource();
      if ($("text").value !== told.text) sendText();
    },
    chunk: (header, images) => {
      const pane = panes.indexOf(header.model);
      meters.add(pane, header, session.player.add(pane, header, images));
      describeState(pane, header.state);
    },
    problem: (reason) => textProblem(reason),
    ended: (reason, again) => lost(reason, again),
  });
}

function give(session, first, samples) {
  if (!session.stream.push(chosen("role"), samples)) return lost("The network is slower than the sound.", true);
  session.player.remember(first, samples);
  let loudest = 0;
  for (const value of samples) loudest = Math.max(loudest, Math.abs(value));
  document.querySelector(".level i").style.transform = `scaleX(${Math.min(1, 1.3 * Math.sqrt(loudest)).toFixed(3)})`;
}

function shut(session) {
  session?.stream?.close();
  session?.pump?.close();
  session?.player?.close();
}

function end() {
  if (!live) return;
  shut(live);
  live.context.close();
  live = null;
  document.querySelector(".level i").style.transform = "scaleX(0)";
}

function stop() {
  cancelWaiting();
  end();
  status("ready");
  [0, 1].forEach((pane) => describeState(pane, "off"));
  buttons();
}

function cancelWaiting() {
  clearInterval(waiting);
  waiting = 0;
}

// The session is over without the user's wish: say why, and try again where that can help.
function lost(reason, again) {
  end();
  [0, 1].forEach((pane) => describeState(pane, "off"));
  cancelWaiting();
  if (!again) {
    status("stopped", "bad");
    notice(reason, "bad", true);
  } else {
    let left = wait;
    wait = Math.min(LONGEST_WAIT, 2 * wait);
    status("not connected", "bad");
    const tell = () => notice(`${reason} Trying again in ${left} s; the character will start afresh.`, "warn", true);
    tell();
    waiting = setInterval(() => (--left > 0 ? tell() : start()), 1000);
  }
  buttons();
}

// ---- sound -----------------------------------------------------------------------------------------------------------

async function useSource() {
  const session = live;
  if (!session?.pump) return;
  const source = chosen("source");
  try {
    let next = new Silence();
    if (source === "recording" && $("voice").value) next = await Recording.fetch($("voice").value, () => ($("again").textContent = "Play again"));
    if (source === "microphone") next = await Microphone.open(() => trouble("The microphone was unplugged or taken away."));
    if (live !== session || chosen("source") !== source) return next.close(); // changed meanwhile
    session.pump.use(next);
    if ($("notice").dataset.about === "sound") notice("");
    if (source === "recording") $("again").textContent = "Play again";
  } catch (error) {
    trouble(error.message);
  }
}

// A recording was made for one role; the user may still choose the other.
function voiceChanged() {
  const voice = about.voices[$("voice").selectedIndex];
  $("words").textContent = voice?.text ?? "";
  if (voice) document.querySelector(`input[name="role"][value="${voice.role}"]`).checked = true;
}

function trouble(text) {
  notice(text, "bad");
  $("notice").dataset.about = "sound";
  live?.pump?.use(new Silence());
  document.querySelector('input[name="source"][value="silence"]').checked = true;
  sourceChanged(false);
}

function sourceChanged(fresh = true) {
  const source = chosen("source");
  $("recording").hidden = $("words").hidden = source !== "recording";
  if (source === "microphone" && fresh) hear(false); // the loudspeaker would feed the microphone
  if (source === "recording" && fresh) hear(true);
  if (fresh) useSource();
}

function hear(on) {
  sounding = on;
  $("mute").textContent = on ? "Sound on" : "Sound off";
  $("mute").setAttribute("aria-pressed", String(!on));
  if (live?.player) live.player.volume.gain.value = on ? 1 : 0;
}

// ---- text -----------------------------------------------------------------------------------------------------------

function compose() {
  const { form = "", ...choices } = about.captions;
  return form.replace(/\{(\w+)\}/g, (_, name) => (choices[name] ? chosen(name) : ""));
}

function sendText() {
  $("text-hint").textContent = "What the character is told; it holds from the next chunk on.";
  $("text-hint").classList.remove("bad");
  live?.stream?.tell("text", { text: $("text").value });
}

function textProblem(reason) {
  $("text-hint").textContent = `${reason} The character keeps the text before.`;
  $("text-hint").classList.add("bad");
}

// ---- building the page ------------------------------------------------------------------------------------------------

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function radio(name, value, text, checked) {
  return element("label", {}, element("input", { type: "radio", name, value, checked }), element("span", { textContent: text }));
}

function build() {
  const faces = about.characters.map(({ name, image }, i) =>
    element("label", { title: name }, element("input", { type: "radio", name: "character", value: name, checked: i === 0 }),
      element("img", { src: `/${image}`, alt: "" }), element("span", { textContent: name })));
  document.querySelector(".faces").replaceChildren(...faces);
  $("voice").replaceChildren(...about.voices.map(({ name, file }) => element("option", { value: `/${file}`, textContent: name.replace("-", " ") })));
  const { form, ...choices } = about.captions;
  const groups = Object.entries(choices).map(([name, words]) =>
    element("fieldset", {}, element("legend", { textContent: BORN[name] ?? name }),
      element("div", { className: "choice" }, ...words.map((word, i) => radio(name, word, short(name, word), i === 0)))));
  $("captions").replaceChildren(...groups);
  if (form) $("text").value = compose();
  about.models.forEach(({ label }, i) => (document.querySelector(`#pane-${"ab"[i]} .label`).textContent = label));
  $("compare").hidden = about.models.length < 2;
  voiceChanged();
  poster();
}

// "looking left" under the title Gaze needs only "left".
function short(name, word) {
  const words = word.split(" ");
  return words.length > 1 && name !== "expression" ? words.slice(1).join(" ") : word;
}

function poster() {
  const { image } = about.characters.find(({ name }) => name === chosen("character"));
  const picture = new Image();
  picture.onload = () => {
    if (live) return;
    document.querySelectorAll(".pane canvas").forEach((canvas) => show(canvas, canvas.getContext("2d"), picture));
  };
  picture.src = `/${image}`;
}

function compare() {
  both = !both;
  $("compare").setAttribute("aria-pressed", String(both));
  $("pane-b").hidden = !both;
  document.body.classList.toggle("two", both);
  if (live || waiting) start();
}

function wire() {
  $("start").onclick = () => (live || waiting ? stop() : start());
  $("retry").onclick = () => start();
  $("interrupt").onclick = () => {
    live?.stream?.tell("interrupt");
    live?.player?.interrupt(live.pump.sent);
    if (chosen("source") === "recording") live?.pump?.use(new Silence());
    $("again").textContent = "Play";
  };
  $("mute").onclick = () => hear(!sounding);
  $("compare").onclick = compare;
  $("again").onclick = useSource;
  $("voice").onchange = () => {
    voiceChanged();
    useSource();
  };
  $("source").onchange = () => sourceChanged();
  $("characters").onchange = () => (live ? start() : poster());
  $("captions").onchange = () => {
    $("text").value = compose();
    sendText();
  };
  $("text").onchange = sendText;
  $("controls").onsubmit = (event) => event.preventDefault();
  const keys = { s: "start", i: "interrupt", p: "again", m: "mute", c: "compare" };
  document.onkeydown = (event) => {
    const typing = event.target.matches('input[type="text"], select');
    const id = keys[event.key.toLowerCase()];
    if (!id || typing || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    if (!$(id).disabled && !$(id).hidden) $(id).click();
  };
  addEventListener("pagehide", stop);
}

async function begin() {
  try {
    const answer = await fetch("/about");
    if (!answer.ok) throw new Error(await answer.text());
    about = await answer.json();
  } catch (error) {
    status("not connected", "bad");
    notice("The server cannot be reached. Trying again.", "bad");
    return setTimeout(begin, 2000);
  }
  notice("");
  meters = new Meters(about.models);
  build();
  status("ready");
  buttons();
}

wire();
begin();
