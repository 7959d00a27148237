"""`make serve`: one line with the address, one sentence when it cannot be, a clean end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_codec, small_student
from live import Client, small_demo, tone

from distill import cli
from distill.data import motion
from distill.demo import captions
from distill.errors import ExitCode
from student import serve
from student.causal_dit import StreamConfig
from student.online import OnlineLPM
from teacher.embedder import IdentityEmbedder


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """A folder as `make export` writes it, in small."""
    folder = tmp_path / "runs" / "mine" / "online-lpm"
    nets = [small_student(StreamConfig(chunk_frames=3), seed, torch.float32, text_dim=64, mels=32) for seed in (1, 2)]
    OnlineLPM(*nets, small_codec().float()).save_pretrained(folder)
    small_demo(folder, side=32)
    IdentityEmbedder(4, 4, 4, width=8, dim=6).save(folder)
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = cli.main(["serve", *arguments])
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    return status, said.err.strip()


def test_what_cannot_be_served_is_one_sentence(export, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, words = refused(capsys)
    assert status == ExitCode.USAGE
    assert words == "There is no Online LPM at runs/tiny/online-lpm: run `make export`, or give MODEL=folder."
    status, words = refused(capsys, "--model", str(export), "--compare", "nowhere")
    assert status == ExitCode.USAGE and "no Online LPM at nowhere" in words and "COMPARE=folder" in words
    status, words = refused(capsys, "--model", str(export), "--port", "80000")
    assert status == ExitCode.USAGE and "'80000'" in words
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, words = refused(capsys, "--run", "mine", "--port", str(port))
        assert status == ExitCode.USAGE
        assert words == f"Port {port} of 127.0.0.1 is taken: give another one with PORT=."
    status, words = refused(capsys, "--run", "mine", "--port", "0", "--host", "no.such.host.invalid")
    assert status == ExitCode.USAGE and "cannot be used" in words
    (export / "demo.json").unlink()
    status, words = refused(capsys, "--run", "mine", "--port", "0")
    assert status == ExitCode.CHECKPOINT and "without characters" in words
    (export / "refiner.safetensors").write_bytes(b"?")
    status, words = refused(capsys, "--run", "mine", "--port", "0")
    assert status == ExitCode.CHECKPOINT and "refiner.safetensors" in words


def test_it_prints_its_address_listens_on_this_machine_alone_plays_and_ends_with_ctrl_c(export):
    command = [
        sys.executable,
        "-m",
        "distill",
        "serve",
        "--port",
        "0",
        "--model",
        str(export),
        "--compare",
        str(export),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            found = re.fullmatch(r"Online LPM is at http://127\.0\.0\.1:(\d+) \(ctrl-C ends it\)\n", line)
            assert found, line + (process.stderr.read() if process.stderr and process.poll() is not None else "")
            port = int(found[1])
            with pytest.raises(OSError):  # every other address of this machine is closed
                socket.create_connection(("127.0.0.2", port), timeout=5)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/about", timeout=20) as answer:
                about = json.loads(answer.read())
            assert [model["label"] for model in about["models"]] == ["mine", "mine"]
            with Client(port) as client:
                client.start(models=["a", "b"], text="a happy person")
                client.push(tone(1.0))
                client.tell("finish")
                assert client.ended(60) == (1000, "finished")
                assert [header["index"] for header, _ in client.chunks] == [0, 0, 1, 1]
                assert all(0 <= header["drift"] <= 2 for header, _ in client.chunks)
            with Client(port) as client:  # still there when the server goes
                client.start()
                os.kill(process.pid, signal.SIGINT)
                code, _ = client.ended(20)
                assert code == 1012
            out, err = process.communicate(timeout=20)
            assert (process.returncode, out, err) == (0, "", "")
        finally:
            process.kill()


def test_two_checkpoints_of_one_run_can_be_told_apart(tmp_path):
    folders = [tmp_path / "a" / "online-lpm", tmp_path / "b" / "online-lpm", tmp_path / "other"]
    assert [serve.label(folder) for folder in folders] == ["a", "b", "other"]


def test_every_caption_of_the_page_is_one_that_the_model_was_trained_on():
    told = captions()
    form, choices = str(told["form"]), {name: told[name] for name in motion.LABELS}
    for indices in np.ndindex(*(len(words) for words in choices.values())):
        picked = {name: words[i] for (name, words), i in zip(choices.items(), indices, strict=True)}
        generator = np.random.default_rng(indices)
        known = {motion.caption(motion.Attributes(*indices), generator) for _ in range(1200)}
        assert form.format(**picked) in known
