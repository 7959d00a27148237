"""The live server over real sockets: its messages, its limits, and that a bad client harms nobody else."""

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from live import CHUNK, FRAMES, SECONDS, Client, PretendedModel, running, small_demo, tone
from websockets.exceptions import ConnectionClosed, InvalidStatus

from student import serve
from student.demo import read_demo
from student.live.scheduler import Made, Scheduler
from student.live.studio import Limits, Shown
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


def one(**changes):
    return [Shown("a", "first", PretendedModel(**changes))]


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
    order = [header["model"] for header, _ in client.chunks]
    assert abs(order[:8].count("a") - 4) <= 1  # in turns, not one after the other


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


# ---- limits ---------------------------------------------------------------------------------------------------


def bad_client(port: int, *messages: str | bytes) -> tuple[int, str]:
    with Client(port) as client:
        for message in messages:
            client.socket.send(message)
        return client.ended()


def wait_until(true: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


def admitted(port: int) -> bool:
    """Whether the server has a place."""
    with Client(port) as client:
        client.tell("start", character="ann")
        try:
            return client.read() == "started"
        except ConnectionClosed:
            return False


def test_every_bad_client_is_told_why_and_a_good_one_beside_it_goes_on(demo):
    start = '{"type": "start", "character": "ann"}'
    cases = [
        (("nonsense",), Close.MALFORMED, "JSON"),
        ((pack_audio(1, tone(0.1)),), Close.MALFORMED, "first message"),
        ((start.replace("ann", "../ann"),), Close.MALFORMED, "character"),
        ((start[:-1] + ', "models": ["c"]}',), Close.MALFORMED, "no model 'c'"),
        ((start[:-1] + ', "sample_rate": 48000}',), Close.WRONG_FORMAT, "48000 Hz"),
        ((start[:-1] + f', "text": "{"a " * 20}"}}',), Close.MALFORMED, "16"),
        ((start, start), Close.MALFORMED, "started already"),
        ((start, b"\1\0\0\0odd"), Close.WRONG_FORMAT, "int16"),
        ((start, '{"type": "finish"}', pack_audio(1, tone(0.1))), Close.MALFORMED, "finish"),
        ((start, bytes(70_000)), Close.TOO_LARGE, ""),
        ((start, *[pack_audio(1, tone(1.0))] * 6), Close.TOO_FAST, "ahead of real time"),
    ]
    with running(one(), demo) as port, Client(port) as good:
        good.start()
        for messages, code, words in cases:
            got, reason = bad_client(port, *messages)
            assert (got, words in reason) == (code, True), (messages[-1][:60], got, reason)
            good.push(tone(SECONDS))
            good.read_chunks(len(good.chunks) + 1)
        good.tell("finish")
        assert good.ended() == (1000, "finished") and len(good.chunks) == len(cases)


def test_a_full_server_says_so_and_takes_the_next_one_when_a_client_vanishes(demo):
    with running(one(), demo, Limits(sessions=2)) as port, Client(port) as first:
        first.start()
        second = Client(port)
        second.start()
        with Client(port) as third:
            third.tell("start", character="ann")
            assert third.ended() == (Close.FULL, "The server is full: 2 of 2 places are taken.")
        second.socket.socket.shutdown(socket.SHUT_RDWR)  # no goodbye
        wait_until(lambda: admitted(port))
        first.push(tone(SECONDS))
        first.read_chunks(1)


def test_a_comparison_takes_two_places(demo):
    shown = [*one(), Shown("b", "second", PretendedModel())]
    with running(shown, demo, Limits(sessions=1)) as port, Client(port) as client:
        client.tell("start", character="ann", models=["a", "b"])
        assert client.ended()[0] == Close.FULL


def test_connections_that_never_start_are_bounded_and_ended(demo):
    limits = Limits(sessions=1, start_seconds=0.5)
    with running(one(), demo, limits) as port, Client(port) as first, Client(port) as second:
        with Client(port) as third:
            assert third.ended()[0] == Close.FULL
        assert first.ended() == (Close.IDLE, "No start message came for 0.5 s.")
        assert second.ended()[0] == Close.IDLE
        with Client(port) as fourth:
            fourth.start()


def test_a_silent_client_is_ended(demo):
    with running(one(), demo, Limits(idle_seconds=0.3)) as port, Client(port) as client:
        client.start()
        assert client.ended() == (Close.IDLE, "No message came for 0.3 s.")


def test_sound_that_the_server_cannot_play_in_time_does_not_pile_up(demo):
    stuck = threading.Event()
    with running(one(before=lambda: stuck.wait(10) and None), demo, Limits(backlog_seconds=1)) as port:
        with Client(port) as client:
            client.start()
            for _ in range(15):
                client.push(tone(0.1))
            code, reason = client.ended()
            stuck.set()
    assert code == Close.BEHIND and "wait for the server" in reason


def test_a_flood_of_tiny_messages_is_ended(demo):
    busy, stuck = threading.Event(), threading.Event()
    model = one(before=lambda: busy.set() or stuck.wait(10) and None)
    with running(model, demo, Limits(commands_waiting=50)) as port:
        with Client(port) as client:
            client.start()
            client.push(tone(SECONDS))
            assert busy.wait(10)
            for _ in range(60):
                client.push(tone(1 / 16000))
            code, reason = client.ended()
            stuck.set()
    assert code == Close.TOO_FAST and "small messages" in reason


def test_a_slow_client_loses_pictures_first_then_its_place_and_memory_stays(demo, monkeypatch):
    """The pictures are made large and the client does not read: buffers of the system fill, then the server's queue."""
    picture = 400_000
    monkeypatch.setattr("student.live.connection.jpeg", lambda frame: bytes(picture))
    limits = Limits(frames_waiting=4, messages_waiting=30, close_seconds=5, ahead_seconds=100, backlog_seconds=100)
    waiting = []
    original = serve.Connection._send

    def watched(self, message):
        original(self, message)
        waiting.append((self.broken.done(), sum(len(part) for part in self.outgoing)))

    monkeypatch.setattr(serve.Connection, "_send", watched)
    with running(one(), demo, limits) as port, Client(port) as good:
        good.start()
        with Client(port, max_queue=1) as slow:
            slow.start()
            for _ in range(800):
                if any(dropped for dropped, _ in waiting):
                    break
                slow.push(tone(SECONDS))
                time.sleep(0.002)
            good.push(tone(SECONDS))
            good.read_chunks(1)
            assert slow.ended() == (Close.TOO_SLOW, "This client takes the video too slowly.")
    assert [kept for dropped, kept in waiting if dropped][0] == 0
    assert 3 * FRAMES * picture < max(kept for _, kept in waiting) < 4 * FRAMES * picture + 30 * 2_000
    assert [header["index"] for header, _ in slow.chunks] == list(range(len(slow.chunks)))  # up to its end


def test_a_client_that_was_slow_for_a_moment_misses_pictures_but_no_chunk(demo, monkeypatch):
    monkeypatch.setattr("student.live.connection.jpeg", lambda frame: bytes(400_000))
    limits = Limits(frames_waiting=3, messages_waiting=200, ahead_seconds=100, backlog_seconds=100)
    with running(one(), demo, limits) as port, Client(port, max_queue=1) as client:
        client.start()
        for _ in range(40):
            client.push(tone(SECONDS))
        time.sleep(0.5)  # not reading
        client.read_chunks(40)
        client.push(tone(SECONDS))
        client.read_chunks(41)
    missed = [header["dropped_frames"] for header, _ in client.chunks]
    assert [header["index"] for header, _ in client.chunks] == list(range(41))
    assert missed[0] == 0 and FRAMES in missed and missed[-1] == 0  # it gets pictures again
    for header, pictures in client.chunks:
        assert len(pictures) == len(header["times"]) == FRAMES - header["dropped_frames"]


def test_a_client_that_never_reads_is_cut_off(demo, monkeypatch):
    monkeypatch.setattr("student.live.connection.jpeg", lambda frame: bytes(400_000))
    monkeypatch.setattr(serve, "CUT_SECONDS", 0.2)
    limits = Limits(sessions=1, send_seconds=0.3, close_seconds=0.1)
    with running(one(), demo, limits) as port, Client(port, max_queue=1) as deaf:
        deaf.start()
        deaf.push(tone(1.0))
        deaf.tell("finish")  # its last message: nothing but the time limits can end it now
        wait_until(lambda: admitted(port))
        with pytest.raises(ConnectionClosed) as caught:
            while True:
                deaf.read()
        assert caught.value.rcvd is None


def test_a_session_that_breaks_is_ended_and_the_others_go_on(demo):
    broken = threading.Event()

    def before():
        if broken.is_set():
            broken.clear()
            raise ZeroDivisionError("a bug")

    with running(one(before=before), demo) as port, Client(port) as good, Client(port) as bad:
        good.start()
        bad.start()
        broken.set()
        bad.push(tone(SECONDS))
        assert bad.ended() == (Close.FAILED, "The server failed at this session; the others go on.")
        good.push(tone(SECONDS))
        good.read_chunks(1)


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
