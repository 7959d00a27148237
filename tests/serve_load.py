"""Many clients at once on a real Online LPM: `python tests/serve_load.py FOLDER [clients] [seconds]`.

Each speaks noise of its own in real time, with its own character and seed. Prints what matters of a server: is
everything played, is it fair, does each get the pictures of its solo run, how long does it wait, what does it cost.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from live import Client

from student.demo import read_demo
from student.live.wire import SPEAK, jpeg, pack_audio, parse_audio
from student.online import OnlineLPM

RATE, PIECE = 16_000, 1_600


def sound(number: int, seconds: float) -> np.ndarray:
    generator = np.random.default_rng(number)
    envelope = np.repeat(generator.uniform(0, 0.4, int(seconds * 8) + 1), RATE // 8)[: int(seconds * RATE)]
    return envelope * generator.standard_normal(len(envelope)).clip(-2, 2) / 2


def talk(client: Client, number: int, seconds: float) -> None:
    began = time.monotonic()
    for i, piece in enumerate(np.split(sound(number, seconds), range(PIECE, int(seconds * RATE), PIECE))):
        time.sleep(max(0.0, began + (i + 1) * PIECE / RATE - time.monotonic()))
        client.push(piece)
    client.tell("finish")


def main(folder: Path, clients: int = 20, seconds: float = 4.0) -> None:
    told = [sys.executable, "-m", "distill", "serve", "--port", "0", "--model", str(folder)]
    server = subprocess.Popen(told, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        port = int(re.findall(r":(\d+)", line)[0])
        names = list(read_demo(folder).characters)
        process, order, lock = psutil.Process(server.pid), [], threading.Lock()
        opened = [Client(port) for _ in range(clients)]
        for number, client in enumerate(opened):
            client.start(names[number % len(names)], seed=number)
        before, began, results = process.cpu_times(), time.monotonic(), {}

        def listen(number: int, client: Client) -> None:
            seen = client.read

            def read(timeout: float = 120.0) -> str:
                kind = seen(timeout)
                if kind == "chunk":
                    with lock:
                        order.append(number)
                return kind

            client.read = read  # type: ignore[method-assign]
            results[number] = client.ended(120)

        threads = [threading.Thread(target=listen, args=pair) for pair in enumerate(opened)]
        threads += [threading.Thread(target=talk, args=(client, i, seconds)) for i, client in enumerate(opened)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wall, after, memory = time.monotonic() - began, process.cpu_times(), process.memory_info().rss / 2**20
    finally:
        server.terminate()
        server.wait(20)
    model, equal = OnlineLPM.from_pretrained(folder), 0
    for number, client in enumerate(opened):
        references = read_demo(folder).references(names[number % len(names)])
        session = model.stream(references, seed=number, look_ahead=0)
        session.push(*parse_audio(pack_audio(SPEAK, sound(number, seconds))))
        session.finish()
        equal += [p for _, p in client.chunks] == [[jpeg(f) for f in c.frames.numpy()] for c in session]
    played = [client.chunks[-1][0]["sound"][1] / RATE for client in opened]
    waits = np.array([h["server_seconds"] for client in opened for h, _ in client.chunks])
    spread = max(
        max(counts) - min(counts)
        for cut in range(1, len(order) + 1)
        for counts in [[order[:cut].count(number) for number in range(clients)]]
    )
    cpu = after.user + after.system - before.user - before.system
    video = sum(played)
    print(f"{clients} clients x {seconds:g} s; ended {set(results.values())}; wall {wall:.1f} s")
    print(f"played {min(played):g} to {max(played):g} s each; chunk counts apart by at most {spread}")
    print(f"pictures equal to the solo run: {equal} of {clients}")
    print(f"server: {cpu / video:.3f} CPU-s per s of video, memory {memory:.0f} MiB")
    print(
        f"from a chunk's last sample to its pictures: p50 {np.median(waits):.2f}, p95 {np.quantile(waits, 0.95):.2f} s"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(word) for word in sys.argv[2:3]), *(float(word) for word in sys.argv[3:4]))
