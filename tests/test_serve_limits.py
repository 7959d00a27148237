"""What the live server does not put up with, over real sockets: a bad client is told why, and harms nobody else."""

import socket
import threading
import time
from pathlib import Path

import pytest
from live import FRAMES, SECONDS, Client, PretendedModel, one, running, small_demo, tone, wait_until
from websockets.exceptions import ConnectionClosed

from student import serve
from student.live.studio import Limits, Shown
from student.live.wire import Close, pack_audio


@pytest.fixture
def demo(tmp_path: Path):
    return small_demo(tmp_path)


def bad_client(port: int, *messages: str | bytes) -> tuple[int, str]:
    with Client(port) as client:
        for message in messages:
            client.send(message)
        return client.ended()


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


def test_interrupted_sound_no_longer_waits(demo):
    with running(one(), demo, Limits(backlog_seconds=2 * SECONDS)) as port, Client(port) as client:
        client.start()
        for _ in range(6):
            client.push(tone(0.9 * SECONDS))  # no chunk
            client.tell("interrupt")
            client.tell("text", text="a " * 20)  # answered once the interruption is through
            assert client.read() == "problem"


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
    monkeypatch.setattr("student.live.connection.jpeg", lambda frame: bytes(2_000_000))
    monkeypatch.setattr(serve, "CUT_SECONDS", 0.2)
    limits = Limits(sessions=1, send_seconds=0.3, close_seconds=0.1)
    lost, original = [], serve.CutOff.connection_lost

    def noted(self, error):
        lost.append(self)
        original(self, error)

    monkeypatch.setattr(serve.CutOff, "connection_lost", noted)
    with running(one(), demo, limits) as port, Client(port, max_queue=1) as deaf:
        deaf.start()
        deaf.push(tone(1.0))
        deaf.tell("finish")  # its last message: nothing but the time limits can end it now
        wait_until(lambda: lost != [])  # though not a byte more was read
        assert admitted(port)
        with pytest.raises(ConnectionClosed):
            while True:
                deaf.read()
    assert len(deaf.chunks) < 8


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
