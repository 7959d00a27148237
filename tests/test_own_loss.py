"""A loss from outside the repository: exactly two files in a folder of the user's, through `ablate` and `compare`.

The two files are those of the README. Networks and data are small, every process is a real one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_data import murmur

from distill import config
from distill.data import speech
from distill.data.prepare import PrepareConfig, prepare, read_fingerprint
from distill.state import checkpoint, lineage
from student.causal_dit import CausalDiT
from teacher.dit import DiT
from teacher.embedder import IdentityEmbedder

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DATA = PrepareConfig(
    train_identities=4, train_clips=1, validation_identities=3, test_identities=4, clip_frames=24, size=32, channels=8
)
SMALL = """
scale: tiny
teacher: teacher
data: {path: data}
model: {dim: 16, depth: 2, heads: 1, ffn_dim: 16, channels: 8}
student: {chunk_frames: 3, sink_chunks: 1, window_chunks: 1, steps: [1.0, 0.5]}
evaluation: {clips: 4, batch_size: 4, stream_seconds: 10, stream_characters: 2}
name: small
stage: stage3
parent: stage2
rollout: {kind: self, chunks: 2, grad_chunks: 1}
phases:
  - {update: critic, terms: {flow_matching: {role: critic}}}
  - {update: student, every: 2, terms: {dmd: {}}}
optimizer: {lr: 1.0e-3}
train: {steps: 4, batch_size: 2, log_every: 1, save_every: 2, sample_every: 4}
"""


def block(language: str, word: str) -> str:
    return next(text for text in re.findall(rf"```{language}\n(.*?)```", README, re.S) if word in text)


def two_files(folder: Path) -> Path:
    """The README's loss and recipe, word for word but for the path of the recipe it extends."""
    folder.mkdir()
    (folder / "latent_mean.py").write_text(block("python", "def term"))
    recipe = block("yaml", "latent_mean")
    assert "extends: ../recipes/tiny/stage3_self_forcing.yaml" in recipe
    path = folder / "stage3_latent_mean.yaml"
    path.write_text(recipe.replace("../recipes/tiny/stage3_self_forcing.yaml", "../recipes/small/stage3_small.yaml"))
    return path


def world(here: Path) -> None:
    """What a user has before: data, a teacher, a stage 2, and the shipped recipes (here: a small one)."""
    cache = speech.cache_folder(here / "speech")
    cache.mkdir(parents=True)
    roles = [(i, s, r) for i, s in enumerate(("train", "validation", "test")) for r in ("speak", "listen")]
    said = [speech.Utterance(murmur(1.5, 10 * i + len(r)), "murmur", r, s, f"{r} {s}") for i, s, r in roles]
    speech.save(said, cache)
    prepare(DATA, here / "data")
    torch.manual_seed(0)
    IdentityEmbedder(8, 4, 4).save(here / "data" / "embedder")
    (here / "recipes" / "small").mkdir(parents=True)
    path = here / "recipes" / "small" / "stage3_small.yaml"
    path.write_text(SMALL)
    recipe = config.load(path)
    net, critic = DiT(recipe.model), DiT(recipe.model)
    torch.nn.init.normal_(net.head.head.weight, std=0.1)
    ema = dict(net.state_dict())
    fingerprint = read_fingerprint(here / "data")["fingerprint"]
    facts = {"scale": "tiny", "step": 1, "recipe": {}, "parent": None, "data_fingerprint": fingerprint}
    with checkpoint.committed(here / "teacher", {**facts, "stage": "teacher"}) as folder:
        (folder / "ema").mkdir()
        checkpoint.write_tensors(folder / "ema", ema)
    student = dict(CausalDiT(net, recipe.student).state_dict())
    parts = {"student": student, "ema": student, "critic": dict(critic.state_dict())}
    checkpoint.save(here / "stage2" / "checkpoints", 1, parts, {**facts, "stage": "stage2"}, 2)


def distill(*words: str) -> str:
    """A command as a user gives it, in this folder; returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "distill", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(900)  # half a minute by itself, many beside a training that has the cores
def test_the_two_files_of_the_readme_run_through_ablate_and_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    world(tmp_path)
    path = two_files(tmp_path / "mine")
    assert {file.name for file in path.parent.iterdir()} == {"latent_mean.py", "stage3_latent_mean.yaml"}
    grid = str(path.relative_to(tmp_path))
    told = distill("ablate", "--grid", grid, "--parent", "stage2", "--seeds", "0")
    assert "2 of 2 cells are done" in told
    cell = Path("runs/stage3_latent_mean/stage3_latent_mean-seed0")
    records = [json.loads(line) for line in (cell / "stage3" / "metrics.jsonl").read_text().splitlines()]
    assert any("train/latent_mean" in record for record in records)
    assert (cell / "stage3" / "latent_mean.py").read_text() == (path.parent / "latent_mean.py").read_text()
    manifest = lineage.read(cell / "stage3")
    assert manifest.parent_hash == lineage.read("stage2").hash and "latent_mean.py" in manifest.data["code"]
    assert distill("ablate", "--grid", grid, "--parent", "stage2", "--seeds", "0").count("started") == 0
    assert "Wrote" in distill("compare", "--runs", "stage3_latent_mean", "--out", "page")
    facts = json.loads(Path("page/compare.json").read_text())
    assert facts["baseline"] == "stage3_small" and list(facts["arms"]) == ["stage3_small", "stage3_latent_mean"]
    assert facts["recipes"]["stage3.phases.1.terms.latent_mean.weight"]["stage3_latent_mean"] == 0.05
    assert "motion_ratio" in facts["differences"]["stage3_latent_mean"]
    assert facts["arms"]["stage3_small"]["cost"]["steps"] == 4 and Path("page/index.html").stat().st_size > 100_000
