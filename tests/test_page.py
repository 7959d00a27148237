"""The page in headless Chromium with a pretended microphone: what a user does, what it says when things go wrong."""

import os
import shutil
import time
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from live import RATE, PretendedModel, running, small_demo, tone

from student.live.studio import Limits, Shown

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt install chromium)")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--use-fake-device-for-media-stream",
)
PIXELS = """id => { const c = document.querySelector(`#pane-${id} canvas`);
  return Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data) }"""
SECONDS = 30  # to wait for anything, on a busy machine


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    from playwright.sync_api import sync_playwright

    spoken = tmp_path_factory.mktemp("microphone") / "spoken.wav"
    with wave.open(str(spoken), "wb") as file:
        file.setparams((1, 2, 48_000, 0, "NONE", "not compressed"))
        times = np.arange(48_000 * 5) / 48_000
        file.writeframes((20_000 * np.sin(2 * np.pi * 440 * times)).astype("<i2").tobytes())
    with sync_playwright() as play:
        flags = [*FLAGS, f"--use-file-for-fake-audio-capture={spoken}"]
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=flags, env={**os.environ, "HOME": "/tmp"})
        yield chromium
        chromium.close()


class Page:
    """One open page; its errors are collected."""

    def __init__(self, browser, port: int, allow: bool = True):
        self.context = browser.new_context(permissions=["microphone"] if allow else [])
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.set_default_timeout(1000 * SECONDS)
        self.page.goto(f"http://127.0.0.1:{port}/")
        self.wait("() => !document.getElementById('start').disabled")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()

    def choose(self, name: str, value: str) -> None:
        self.page.click(f'input[name="{name}"][value="{value}"]', force=True)

    def text(self, place: str) -> str:
        return self.page.inner_text(place)

    def wait(self, true: str, argument=None) -> None:
        """Asks from outside: the page's own policy forbids what Playwright's waiting does inside."""
        deadline = time.monotonic() + SECONDS
        while not self.page.evaluate(true, argument):
            assert time.monotonic() < deadline, f"never true: {true} {str(argument)[:80]}\n{self.text('main')}"
            time.sleep(0.03)

    def until(self, place: str, words: str) -> None:
        self.wait("([p, w]) => document.querySelector(p).innerText.includes(w)", [place, words])

    def pixels(self, pane: str = "a") -> list[int]:
        return self.page.evaluate(PIXELS, pane)

    def changing(self, pane: str = "a") -> None:
        before = self.pixels(pane)
        deadline = time.monotonic() + SECONDS
        while self.pixels(pane) == before:
            assert time.monotonic() < deadline, "the picture stands still"


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    return small_demo(tmp_path)


def model(name: str = "a") -> Shown:
    return Shown(name, f"checkpoint {name}", PretendedModel())


def test_a_user_speaks_plays_a_recording_changes_the_text_and_stops(browser, demo):
    with running([model()], demo) as port, Page(browser, port) as page:
        assert not page.page.is_visible("#compare")  # one model: nothing to compare
        page.choose("character", "ben")
        page.choose("source", "microphone")
        page.page.click("#start")
        page.until("#status", "live")
        page.until("#pane-a .state", "speaking")  # the pretended microphone is heard
        page.changing()
        page.changing()
        assert max(page.pixels()[:3]) > 50  # not black
        assert page.text("#mute") == "Sound off"  # a loudspeaker would feed the microphone
        for meter in ("latency", "load", "memory"):
            page.wait("id => /[0-9]/.test(document.querySelector(`#${id} .values`).innerText)", meter)
        assert "not measured" in page.text("#drift")
        assert 0 < int(page.text("#latency b")) < 5000
        page.choose("role", "listen")
        page.until("#pane-a .state", "listening")
        page.choose("source", "silence")
        page.until("#pane-a .state", "silent")
        page.choose("role", "speak")
        page.choose("source", "recording")
        page.until("#pane-a .state", "speaking")
        page.choose("expression", "happy")
        page.choose("gaze", "looking left")
        assert page.page.input_value("#text") == "a happy person, looking left, head straight"
        page.page.click("#interrupt")
        page.until("#pane-a .state", "silent")
        page.page.fill("#text", "word " * 20)
        page.page.press("#text", "Tab")
        page.until("#text-hint", "keeps the text before")
        page.page.keyboard.press("s")
        page.until("#status", "ready")
        assert page.errors == []


def test_two_checkpoints_play_side_by_side(browser, demo):
    with running([model("a"), model("b")], demo) as port, Page(browser, port) as page:
        page.page.keyboard.press("c")
        page.page.keyboard.press("s")
        for pane in "ab":
            page.until(f"#pane-{pane} .state", "speaking")
            assert page.text(f"#pane-{pane} .label") == f"checkpoint {pane}"
        page.changing("b")
        page.wait("() => document.querySelectorAll('#load polyline').length === 2")
        page.wait(f"() => String(({PIXELS})('a')) === String(({PIXELS})('b'))")  # same model, same time
        page.page.keyboard.press("c")
        page.wait("() => document.getElementById('pane-b').hidden")
        page.until("#status", "live")
        assert page.errors == []


def test_every_trouble_is_said_in_words(browser, demo):
    with running([model()], demo, Limits(sessions=1)) as port, Page(browser, port, allow=False) as page:
        page.page.evaluate(
            "() => { navigator.mediaDevices.getUserMedia ="
            " async () => { throw new DOMException('', 'NotFoundError') } }"
        )
        page.page.click("#start")
        page.until("#status", "live")
        page.choose("source", "microphone")
        page.until("#notice", "No microphone was found")
        assert page.page.is_checked('input[name="source"][value="silence"]')
        with Page(browser, port) as second:
            second.page.click("#start")
            second.until("#notice", "The server is full")
            second.until("#notice", "Trying again")
            page.page.click("#start")  # stop: the place is free
            second.until("#status", "live")  # by itself
            assert second.page.is_hidden("#notice")
            assert second.errors == page.errors == []


def test_a_lost_connection_is_told_and_found_again(browser, demo):
    with running([model()], demo) as port, Page(browser, port) as page:
        page.page.evaluate(
            "() => { const W = WebSocket; window.WebSocket = class extends W {"
            " constructor(a) { super(a); window.last = this } } }"
        )
        page.page.click("#start")
        page.until("#status", "live")
        page.page.evaluate("last.close(4408, 'Nothing came.')")
        page.until("#notice", "Nothing came. Trying again in")
        page.until("#status", "live")
        page.changing()
        assert page.errors == []


def test_the_microphone_is_resampled_without_folding(browser, demo):
    """A tone below 8 kHz stays as it is, one above vanishes, in pieces as an audio thread gives them."""
    code = """async ([rate, hertz]) => {
      const { Resampler } = await import('/page/resample.js'), resampler = new Resampler(rate), out = [];
      const tone = (i) => Math.sin(2 * Math.PI * hertz * i / rate);
      for (let at = 0; at < rate; at += 128)
        out.push(...resampler.push(Float32Array.from({length: 128}, (_, i) => tone(at + i))));
      return out }"""
    with running([model()], demo) as port, Page(browser, port) as page:
        for rate in (48_000, 44_100, 22_050):
            kept = np.array(page.page.evaluate(code, [rate, 1000]))
            assert abs(len(kept) - RATE) < 200
            middle, wanted = kept[2000:14_000], tone(1.0, 1000, 1.0)
            errors = [np.abs(middle - wanted[s : s + 12_000]).max() for s in range(1900, 2100)]
            assert min(errors) < 0.35  # the delay need not be whole samples
            assert np.abs(middle).max() == pytest.approx(1.0, abs=0.01)
            assert np.sqrt(np.mean(middle**2)) == pytest.approx(0.5**0.5, abs=0.005)
        for rate in (48_000, 44_100):
            folded = np.array(page.page.evaluate(code, [rate, 9000]))[2000:14_000]
            assert np.abs(folded).max() < 0.01
