"""Resume is bitwise: every stage killed with SIGKILL, several times, against the same stages never stopped.

This file is also the script that trains: `python tests/test_resume.py FOLDER` prepares small data and trains the chain
teacher, stage 1 to 4 twice, in FOLDER/whole and in FOLDER/parts. Every attempt is a process of its own, forked from one
that has imported torch and done nothing else; where its kill says so it sends itself SIGKILL, from which nothing can
recover: no handler, no `finally`, no flush.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from test_data import murmur
from torch import Tensor

from distill import pipeline
from distill.contracts import Roles
from distill.data import speech
from distill.data.prepare import PrepareConfig, prepare
from distill.options import Options
from distill.state import checkpoint, lineage
from distill.tracking import Tracker
from distill.trainer import Trainer
from teacher.embedder import IdentityEmbedder

pytestmark = pytest.mark.timeout(900)  # half a minute by itself, many beside a training that has the cores

DATA = PrepareConfig(
    train_identities=6, train_clips=2, validation_identities=1, test_identities=4, clip_frames=24, size=32, channels=8
)
RECIPES = {
    "base": """
scale: tiny
data: {path: ../data}
model: {dim: 16, depth: 2, heads: 1, ffn_dim: 16, channels: 8}
student: {chunk_frames: 2, sink_chunks: 1, window_chunks: 1}
optimizer: {lr: 1.0e-3, betas: [0.5, 0.9], warmup_steps: 3, schedule: cosine}
train: {steps: 10, batch_size: 3, ema: 0.9, save_every: 3, sample_every: 5, log_every: 2}
""",
    "teacher": """
rollout: {kind: data}
phases: [{update: teacher, terms: {flow_matching: {role: teacher, drop_text: 0.3, drop_audio: 0.3}}}]
train: {precision: bf16}
""",
    "trajectories": """
parent: teacher
trajectories: {count: 8, steps: 4, batch_size: 8}
""",
    "stage1": """
parent: teacher
rollout: {kind: teacher}
phases: [{update: student, terms: {ode_regression: {}}}]
train: {grad_accumulation: 2}
""",
    "stage2": """
parent: stage1
rollout: {kind: renoised}
phases:
  - {update: critic, terms: {flow_matching: {role: critic}}}
  - {update: student, every: 2, terms: {dmd: {cfg: {text: 2.0, audio: 2.0}}, perceptual: {ramp_steps: 6}}}
train: {precision: bf16}
""",
    "stage3": """
parent: stage2
rollout: {kind: self, chunks: 6, grad_chunks: 2}
phases:
  - {update: critic, terms: {flow_matching: {role: critic}}}
  - {update: student, every: 2, terms: {dmd: {cfg: {text: 2.0, audio: 2.0}}, identity_drift: {ramp_steps: 6}}}
train: {grad_accumulation: 2}
""",
    "stage4": """
parent: stage3
rollout: {kind: refine, chunks: 5, grad_chunks: 2}
phases:
  - {update: critic, terms: {flow_matching: {role: critic}}}
  - {update: refiner, every: 2, terms: {dmd: {cfg: {text: 2.0, audio: 2.0}}}}
""",
}
CHAINS = ("whole", "parts")
# stage -> the moments at which one attempt after the other dies: in this step, at that call of a function
KILLS: dict[str, list[tuple[int, str, int]]] = {
    "teacher": [(3, "distill.engine:Engine.backward", 1), (7, "distill.state.ema:EMA.update", 1)],
    "stage1": [(6, "distill.engine:Engine.backward", 2), (9, "distill.state.checkpoint:write_tensors", 2)],
    "stage2": [(6, "distill.engine:Engine.clip", 2), (9, "distill.state.checkpoint:prune", 1)],
    "stage3": [(5, "recipes.self_forcing:denoise_chunk", 3), (8, "recipes.self_forcing:remember_chunk", 12)],
    "stage4": [(6, "recipes.self_forcing:denoise_chunk", 4), (10, "distill.runs:write_status", 1)],
}
STAGES = tuple(KILLS)


# ---- the script -------------------------------------------------------------------------------------------


def main(root: Path) -> None:
    """Prepare, then train both chains, attempt by attempt."""
    make_data(root)
    for module in ("torch._dynamo", "torch.utils.tensorboard"):  # what every trainer imports at its start, once for all
        importlib.import_module(module)
    lineage.code_version()  # read once: sources that are edited meanwhile would make the manifests differ
    for stage in STAGES:
        attempt(root / "whole", stage, None)
        for kill in KILLS[stage]:
            attempt(root / "parts", stage, kill)
        attempt(root / "parts", stage, None)


def make_data(root: Path) -> None:
    """Two folders with the same recipes, beside one small data set whose speech is a murmur."""
    cases = [(role, split) for role in ("speak", "listen") for split in ("train", "validation", "test")]
    cache = speech.cache_folder(root / "speech")
    cache.mkdir(parents=True)
    said = [speech.Utterance(murmur(2.5, i), "murmur", *case, f"{case}") for i, case in enumerate(cases)]
    speech.save(said, cache)
    prepare(DATA, root / "data")
    IdentityEmbedder(DATA.channels, 4, 4).requires_grad_(False).save(root / "data" / "embedder")
    for chain in ("whole", "parts"):
        folder = root / chain / "recipes" / "tiny"
        folder.mkdir(parents=True)
        for stage, text in RECIPES.items():
            head = "" if stage == "base" else f"extends: base.yaml\nname: {stage}\nstage: {stage}\n"
            (folder / f"{stage}.yaml").write_text(head + text)


def attempt(folder: Path, stage: str, kill: tuple[int, str, int] | None) -> None:
    """Run one stage in a process of its own and see that it ended as it was meant to."""
    process = os.fork()
    if not process:
        try:
            train(folder, stage, kill)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status != (0 if kill is None else -signal.SIGKILL):
        raise SystemExit(f"{folder.name} {stage} {kill} ended with {status}")


def train(folder: Path, stage: str, kill: tuple[int, str, int] | None) -> None:
    """What `make distill-...` does, in `folder`, with a cheap gauge in the place of the samples."""
    os.chdir(folder)
    setattr(pipeline, "SampleHook", lambda *_: gauge)  # noqa: B010
    if kill is not None:
        arm(*kill)
    pipeline.train_stage(Options(), stage)


def gauge(step: int, roles: Roles) -> tuple[dict[str, float], dict[str, Tensor]]:
    weights = [p.detach().double().abs().sum() for model in roles.models.values() for p in model.parameters()]
    return {"health/weights": float(torch.stack(weights).sum())}, {}


def arm(step: int, target: str, call: int) -> None:
    """Send SIGKILL to this process when `target` is called for the `call`-th time in training step `step`."""
    module, _, name = target.partition(":")
    *path, leaf = name.split(".")
    owner: Any = importlib.import_module(module)
    for part in path:
        owner = getattr(owner, part)
    original, update, count = getattr(owner, leaf), Trainer.update, 0
    current = 0

    def updating(self: Trainer, now: int, *rest: Any) -> Any:
        nonlocal current
        current = now
        return update(self, now, *rest)

    def dying(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += current == step
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)

    setattr(Trainer, "update", updating)  # noqa: B010
    setattr(owner, leaf, dying)


# ---- the tests --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, root], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return root


def records(stage: Path) -> list[dict[str, float]]:
    """metrics.jsonl without the one thing that may differ, the time taken."""
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "perf/step_s"} for row in rows]


PARTS = {
    "teacher": ["teacher"],
    "stage1": ["student"],
    "stage2": ["critic", "student"],
    "stage3": ["critic", "student"],
    "stage4": ["critic", "refiner"],
}


@pytest.mark.parametrize("stage", STAGES)
def test_resume_after_sigkill_is_bitwise(root: Path, stage: str) -> None:
    """Weights, optimizer, average, progress; and the manifest, which holds the hashes of them all and of the parent."""
    whole, parts = (checkpoint.newest(root / chain / "runs" / "tiny" / stage / "checkpoints") for chain in CHAINS)
    assert whole is not None and parts is not None and whole.name == parts.name == "step_00000010"
    roles = PARTS[stage]
    assert {path.name for path in whole.iterdir() if path.is_dir()} == {
        "ema",
        *roles,
        *(f"optimizer_{r}" for r in roles),
    }
    for name in (path.name for path in whole.iterdir() if path.is_dir()):
        a, b = checkpoint.load(whole, name), checkpoint.load(parts, name)
        assert a.keys() == b.keys() and [key for key in a if not torch.equal(a[key], b[key])] == [], name
    for file in ("state.json", "manifest.json"):
        assert (whole / file).read_bytes() == (parts / file).read_bytes()


@pytest.mark.parametrize("stage", STAGES)
def test_curves_after_sigkill_are_those_of_an_unbroken_run(root: Path, stage: str) -> None:
    whole, parts = (records(root / chain / "runs" / "tiny" / stage) for chain in CHAINS)
    assert whole == parts
    curves, gauges = list(range(2, 11, 2)), [0, 5, 10]
    verdicts = sorted({*curves, *gauges})
    assert sorted(row["step"] for row in whole) == sorted([*curves, *gauges, *verdicts])


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_was_killed_and_went_on(root: Path, stage: str) -> None:
    said = (root / "parts" / "runs" / "tiny" / stage / "log.txt").read_text()
    resumed = said.count("resuming from")
    begun = len(KILLS[stage]) + 1
    assert resumed == begun - (1 + (stage == "teacher"))  # the first attempt, and after a death in step 3, start at 0
    assert "resuming" not in (root / "whole" / "runs" / "tiny" / stage / "log.txt").read_text()


def test_an_interval_of_the_curves_that_a_checkpoint_cuts_is_averaged_as_a_whole(tmp_path: Path) -> None:
    """Stopped after step 5 of intervals of 3: the record of step 6 is the mean of 4, 5 and 6, and none is cut short."""
    values = [0.1 * step + 1e-8 for step in range(10)]

    def log(folder: Path, first: int, last: int, pending: dict[str, Any] | None = None) -> dict[str, Any]:
        with Tracker(folder, 9, "x", first - 1, log_every=3, say=lambda text: None, pending=pending) as tracker:
            for step in range(first, last + 1):
                tracker.log(step, {"a": values[step], **({"b": torch.tensor(values[step])} if step % 2 else {})})
            return json.loads(json.dumps(tracker.pending()))

    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    log(tmp_path / "whole", 1, 9)
    log(tmp_path / "parts", 6, 8, pending=log(tmp_path / "parts", 1, 5))
    log(tmp_path / "parts", 6, 9, pending=log(tmp_path / "parts", 1, 5))
    assert records(tmp_path / "whole") == records(tmp_path / "parts")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
