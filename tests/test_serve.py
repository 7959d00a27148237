"""The live server over real sockets: its messages, its sessions, who may come in, and whose turn it is."""

import json
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from live import CHUNK, FRAMES, SECONDS, Client, PretendedModel, one, running, small_demo, tone, wait_until
from websockets.exceptions import InvalidStatus

from student.demo import read_demo
from student.live.scheduler import Made, Scheduler
from student.live.studio import Shown
from student.live.wire import (
    BOTH,
    LISTEN,
    SPEAK,
    Close,
    Refusal,
    Start,
    jpeg,
    pack_audio,
    parse_audio,
    parse_control,
)


@pytest.fixture
def demo(tmp_path: Path):
    return small_demo(tmp_path)


def get(port: int, path: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(), dict(error.headers)


# ---- messages -----------------------------------------------------------------------------------------------


def test_sound_arrives_as_sent_on_its_channel():
    wave = np.array([-1.0, -0.5, 0.0, 0.25, 32767 / 32768], np.float32)
    silence = np.zeros(5, np.float32)
    for channel, expected in ((SPEAK, (wave, silence)), (LISTEN, (silence, wave))):
        for got, wanted in zip(parse_audio(pack_audio(channel, wave)), expected, strict=True):
            np.testing.assert_array_equal(got, wanted)
    speak, listen = parse_audio(pack_audio(BOTH, np.stack([wave, -wave / 2], 1)))
    np.testing.assert_array_equal(speak, wave)
    np.testing.assert_allclose(listen, -wave / 2, atol=1 / 32768)


def test_a_start_message_has_defaults_and_keeps_what_it_says():
    assert parse_control('{"type": "start", "character": "ann"}') == Start("ann", "", 0, 16000, ("a",))
    told = {"type": "start", "character": "b", "text": "t", "seed": 3, "sample_rate": 16000, "models": ["b", "a"]}
    assert parse_control(json.dumps(told)) == Start("b", "t", 3, 16000, ("b", "a"))


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("", Close.MALFORMED),
        ("[1]", Close.MALFORMED),
        ("[" * 100_000, Close.MALFORMED),
        ("{}", Close.MALFORMED),
        ('{"type": ["start"]}', Close.MALFORMED),
        ('{"type": "stop"}', Close.MALFORMED),
        ('{"type": "start"}', Close.MALFORMED),
        ('{"type": "text"}', Close.MALFORMED),
        ('{"type": "start", "character": 3}', Close.MALFORMED),
        ('{"type": "start", "character": "a", "seed": true}', Close.MALFORMED),
        ('{"type": "start", "character": "a", "seed": -1}', Close.MALFORMED),
        ('{"type": "start", "character": "a", "models": []}', Close.MALFORMED),
        ('{"type": "start", "character": "a", "models": ["a", "a"]}', Close.MALFORMED),
        ('{"type": "start", "character": "a", "colour": 1}', Close.MALFORMED),
        ('{"type": "start", "character": "a", "sample_rate": 44100}', Close.WRONG_FORMAT),
        (json.dumps({"type": "text", "text": "x" * 201}), Close.MALFORMED),
        (b"", Close.MALFORMED),
        (b"\1\0\0\0", Close.MALFORMED),
        (b"\4\0\0\0\0\0", Close.WRONG_FORMAT),
        (b"\1\0\0\0\0\0\0", Close.WRONG_FORMAT),
        (b"\3\0\0\0\0\0", Close.WRONG_FORMAT),
    ],
)
def test_a_message_that_breaks_a_rule_is_refused_in_one_sentence(message, code):
    with pytest.raises(Refusal) as caught:
        parse_control(message) if isinstance(message, str) else parse_audio(message)
    assert caught.value.code == code
    assert caught.value.reason.endswith(".") and len(caught.value.reason.encode()) <= 123


# ---- a session ------------------------------------------------------------------------------------------------


def test_every_pushed_sample_is_played_and_every_chunk_says_which(demo):
    with running(one(), demo) as port, Client(port) as client:
        client.start()
        for piece in np.array_split(tone(2.03), 37):  # no piece fits the chunks
            client.push(piece)
        client.tell("finish")
        assert client.ended() == (1000, "finished")
    pushed = round(2.03 * 16000)
    assert [header["sound"] for header, _ in client.chunks] == [
        [i * CHUNK, (i + 1) * CHUNK] for i in range(-(-pushed // CHUNK))
    ]
    for number, (header, pictures) in enumerate(client.chunks):
        assert header["index"] == number and len(pictures) == FRAMES == len(header["times"])
        assert header["times"] == pytest.approx([(number + i / FRAMES) * SECONDS for i in range(FRAMES)], abs=1e-5)
        assert header["server_seconds"] >= 0 and header["memory_mib"] > 10 and header["load"] > 0


def test_the_channel_decides_who_is_heard(demo):
    with running(one(), demo) as port, Client(port) as client:
        client.start()
        for channel in (SPEAK, LISTEN):
            client.push(tone(SECONDS), channel)
        client.push(np.zeros(CHUNK, np.float32))
        client.read_chunks(3)
    assert [header["state"] for header, _ in client.chunks] == ["speak", "listen", "silence"]


def test_text_changes_the_pictures_and_an_impossible_text_is_told_and_changes_nothing(demo):
    with running(one(), demo) as port, Client(port) as client:
        client.start(text="happy")
        client.push(tone(SECONDS))
        client.read_chunks(1)
        client.tell("text", text="a " * 20)
        assert client.read() == "problem" and "16" in client.said[-1]["reason"]
        client.tell("text", text="sad")
        client.push(tone(SECONDS))
        client.read_chunks(2)
    solo = PretendedModel().stream(read_demo(demo).references("ann"), text="happy", look_ahead=0)
    expected = []
    for text in ("happy", "sad"):
        solo.set_text(text)
        heard = parse_audio(pack_audio(SPEAK, tone(SECONDS)))
        solo.push(*heard)
        expected.append([jpeg(frame) for frame in solo.next_chunk().frames])
    assert [pictures for _, pictures in client.chunks] == expected


def test_an_interruption_drops_the_sound_that_is_no_chunk_yet_and_the_count_goes_on_behind_it(demo):
    with running(one(), demo) as port, Client(port) as client:
        client.start()
        client.push(tone(1.5 * SECONDS))
        client.read_chunks(1)
        client.tell("interrupt")
        client.push(tone(SECONDS))
        client.read_chunks(2)
    assert [header["sound"] for header, _ in client.chunks] == [[0, CHUNK], [3 * CHUNK // 2, 5 * CHUNK // 2]]


def test_two_models_hear_the_same_and_show_what_each_would_alone(demo):
    shown = [*one(), Shown("b", "second", PretendedModel())]
    with running(shown, demo) as port, Client(port) as client:
        client.start(models=["a", "b"], seed=5)
        client.push(tone(1.0))
        client.tell("finish")
        assert client.ended()[0] == 1000
    by_model = {name: [p for h, p in client.chunks if h["model"] == name] for name in "ab"}
    assert len(by_model["a"]) == 8 and by_model["a"] == by_model["b"]


# ---- who may come in ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, True),
        ({"Host": "localhost:9000"}, True),  # a forwarded port
        ({"Host": "[::1]:80"}, True),
        ({"Host": "192.168.1.7"}, True),  # numbers cannot be rebound
        ({"Host": "evil.example"}, False),
        ({"Host": "127.0.0.1.evil.example:8000"}, False),
        ({"Host": "localhost.evil.example"}, False),
        ({"Host": "localhost:port"}, False),
        ({"Host": "localhost", "Origin": "http://localhost"}, True),
        ({"Host": "localhost", "Origin": "http://localhost:1"}, False),
        ({"Host": "localhost", "Origin": "http://evil.example"}, False),
        ({"Host": "localhost", "Origin": "null"}, False),
    ],
)
def test_a_foreign_host_or_origin_is_refused_with_a_sentence(demo, headers, allowed):
    with running(one(), demo) as port:
        status, body, _ = get(port, "/about", **headers)
    assert status == (200 if allowed else 403)
    assert allowed or b"header says otherwise" in body


def test_a_foreign_page_cannot_open_a_stream(demo):
    with running(one(), demo) as port:
        with pytest.raises(InvalidStatus) as caught:
            Client(port, origin="http://evil.example")
        assert caught.value.response.status_code == 403
        with Client(port, origin=f"http://127.0.0.1:{port}") as client:
            client.start()


def test_the_page_needs_nothing_from_outside_and_cannot_be_framed(demo):
    with running(one(), demo) as port:
        status, body, headers = get(port, "/")
        assert status == 200 and b"<canvas" in body
        for name in ("page.js", "page.css", "recorder.js"):
            assert get(port, f"/page/{name}")[0] == 200
        policy = headers["content-security-policy"]
        assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        about = json.loads(get(port, "/about")[1])
        assert get(port, "/" + about["characters"][0]["image"])[0] == 200
        assert get(port, "/" + about["voices"][0]["file"])[1][:4] == b"RIFF"
        assert get(port, "/characters/../demo.json")[0] == 404


# ---- turns ------------------------------------------------------------------------------------------------------


def test_sessions_take_turns_of_one_chunk_whatever_each_has_waiting():
    done: list[int] = []
    gate = threading.Event()

    def deliver(number):
        return lambda event: done.append(number) if isinstance(event, Made) else None

    def sound(seconds):
        wave = tone(seconds)
        return lambda session: session.push(wave, wave)

    model = PretendedModel(before=lambda: gate.wait(10) and None)
    with Scheduler() as ring:
        jobs = [ring.open(lambda: model.stream(np.zeros(1), look_ahead=0), deliver(number)) for number in range(5)]
        for number, job in enumerate(jobs):
            job.tell(sound((3 + number) * SECONDS + 0.001))  # 3, 4, 5, 6, 7 chunks
        gate.set()
        wait_until(lambda: len(done) == 25)
    assert [done.count(number) for number in range(5)] == [3, 4, 5, 6, 7]
    for cut in range(1, 16):  # while all have sound
        counts = [done[:cut].count(number) for number in range(5)]
        assert max(counts) - min(counts) <= 1, done
