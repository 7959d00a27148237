"""The server with real networks (small, every weight random): no cross-talk, fair, nothing lost, the drift meter right.

Twenty clients at once, through real sockets, each with its own character, text, seed, channel and sound.
"""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_codec, small_student
from live import Client, running, small_demo
from torch.nn import functional

from student.causal_dit import StreamConfig
from student.demo import read_demo
from student.live.connection import Connection
from student.live.meters import IdentityMeter, Load
from student.live.scheduler import Scheduler
from student.live.studio import Limits, Shown
from student.live.wire import BOTH, LISTEN, SPEAK, Finish, jpeg, pack_audio, parse_audio
from student.online import OnlineLPM
from student.session import Session
from teacher.embedder import IdentityEmbedder

CLIENTS, SECONDS, RATE = 20, 2.3, 16_000
TEXTS = ("a happy person", "someone sad, head tilted left", "looking right, calm face", "")


@pytest.fixture(scope="module")
def model() -> OnlineLPM:
    stream = StreamConfig(chunk_frames=3, sink_chunks=1, window_chunks=1)
    nets = [small_student(stream, seed, torch.float32, text_dim=64, mels=32) for seed in (1, 2)]
    return OnlineLPM(*nets, small_codec().float())


def sound(number: int) -> tuple[int, np.ndarray]:
    """Each client's own channel and wave."""
    channel = (SPEAK, LISTEN, BOTH)[number % 3]
    shape = (round(SECONDS * RATE) + 37 * number, *([2] if channel == BOTH else []))
    return channel, np.random.default_rng(number).uniform(-0.5, 0.5, shape)


def solo(model: OnlineLPM, demo: Path, number: int) -> list[torch.Tensor]:
    """What a session gives that is alone in the world: chunks of latents."""
    channel, wave = sound(number)
    session = start(model, demo, number)
    session.push(*parse_audio(pack_audio(channel, wave)))
    session.finish()
    return [chunk.frames for chunk in session]


def start(model: OnlineLPM, demo: Path, number: int) -> Session:
    references = read_demo(demo).references(character(number))
    return model.stream(references, text=TEXTS[number % 4], seed=number, look_ahead=0)


def character(number: int) -> str:
    return f"c{number % 5}"


def test_twenty_sessions_at_once_each_equal_their_solo_run_in_turns_with_nothing_lost(model, tmp_path, monkeypatch):
    demo = small_demo(tmp_path, tuple(f"c{i}" for i in range(5)), side=32)
    made: list[tuple[int, torch.Tensor]] = []  # (seed = number of the client, pictures before rounding)
    pictures, next_chunk = OnlineLPM.pictures, Session.next_chunk
    exact: list[torch.Tensor] = []

    def kept(self, latents):
        exact.append(latents)
        return pictures(self, latents)

    def noted(self):
        chunk = next_chunk(self)
        if chunk is not None:
            made.append((self.seed, exact.pop()))
        return chunk

    monkeypatch.setattr(OnlineLPM, "pictures", kept)
    monkeypatch.setattr(Session, "next_chunk", noted)
    for number in range(CLIENTS):
        solo(model, demo, number)
    alone = {number: [latents for seed, latents in made if seed == number] for number in range(CLIENTS)}
    made.clear()

    everything_is_in = threading.Event()  # until then the compute thread rests: from then on all have sound
    turn, obey, finishes = Scheduler._turn, Connection._obey, []

    def held(self, job):
        assert everything_is_in.wait(60)
        return turn(self, job)

    def counted(self, told):
        obey(self, told)
        finishes.append(told)
        if finishes.count(Finish()) == CLIENTS:
            everything_is_in.set()

    monkeypatch.setattr(Scheduler, "_turn", held)
    monkeypatch.setattr(Connection, "_obey", counted)
    clients: dict[int, Client] = {}

    def talk(number: int, client: Client) -> None:
        channel, wave = sound(number)
        for piece in np.array_split(wave, 5 + number):
            client.push(piece, channel)
        client.tell("finish")
        assert client.ended(60) == (1000, "finished")

    limits = Limits(sessions=CLIENTS, backlog_seconds=60)
    with running([Shown("a", "small", model)], demo, limits) as port:
        for number in range(CLIENTS):
            clients[number] = Client(port)
            clients[number].start(character(number), text=TEXTS[number % 4], seed=number)
        threads = [threading.Thread(target=talk, args=pair) for pair in clients.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)

    chunks = round(0.5 * RATE)
    for number, client in clients.items():
        pushed = round(SECONDS * RATE) + 37 * number
        assert [header["sound"] for header, _ in client.chunks] == [
            [i * chunks, (i + 1) * chunks] for i in range(-(-pushed // chunks))
        ]
        together = [latents for seed, latents in made if seed == number]
        for one, other in zip(alone[number], together, strict=True):
            assert (one - other).abs().max() < 1e-5
        shown = [pictures for _, pictures in client.chunks]  # and what arrived is what was made
        assert shown == [[jpeg(frame.numpy()) for frame in model.pictures(x)[0]] for x in alone[number]]
    first = [alone[number][0] for number in range(CLIENTS)]  # the comparison could fail: all differ
    assert min((first[i] - first[j]).abs().max() for i in range(CLIENTS) for j in range(i)) > 1e-2

    for cut in range(1, 4 * CLIENTS):  # each has five chunks of sound
        counts = [sum(seed == number for seed, _ in made[:cut]) for number in range(CLIENTS)]
        assert max(counts) - min(counts) <= 1


def test_the_drift_meter_is_the_cosine_distance_to_the_references(model):
    torch.manual_seed(0)
    embedder = IdentityEmbedder(4, 4, 4, width=8, dim=6)
    for parameter in embedder.parameters():
        parameter.data.normal_()
    embedder.natural = 0.9
    references = torch.rand(2, 3, 32, 32)
    meter = IdentityMeter(model.codec, embedder, references)
    frames = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        a = embedder(model.codec.encode((frames / 255).permute(0, 3, 1, 2)[None]))[0].mean(0)
        b = embedder(model.codec.encode_image(references)[None])[0].mean(0)
    wanted = 1 - float(functional.cosine_similarity(a, b, dim=0))
    assert meter.distance(frames.numpy()) == pytest.approx(wanted, abs=1e-5) and wanted > 0.01
    assert meter.natural == pytest.approx(0.1)
    still = (references[:1] * 255).round().to(torch.uint8).permute(0, 2, 3, 1).expand(4, -1, -1, -1)
    own = IdentityMeter(model.codec, embedder, references[:1])
    assert own.distance(still.numpy()) == pytest.approx(0, abs=1e-3)


def test_the_real_time_factor_is_that_of_the_latest_chunks():
    load = Load()
    assert load.add(0.1, 0.5) == pytest.approx(0.2)
    assert load.add(0.3, 0.5) == pytest.approx(0.4)
    for _ in range(10):
        last = load.add(0.05, 0.5)
    assert last == pytest.approx(0.1)
