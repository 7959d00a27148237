"""What two processes do in tests/test_spread.py: small networks through the trainer, under every engine.

    tests/spread.py FOLDER case [case ...]          (in every process, started by distill.launch)

A case is `<stage>-<engine>[-<what>]` in the run folder FOLDER/<case>; the reference is the engine `plain`. Under FSDP2
and ZeRO-3 the networks of stage 3 are made empty and filled from a checkpoint, as large ones are.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import warnings
from pathlib import Path

import torch
from conftest import SIDE, batch_of, conditions, latents, normal, small_codec, small_dit, small_student
from torch import Tensor, nn

from distill.config import Recipe, load
from distill.contracts import Roles
from distill.data.batch import Batch
from distill.engine import EngineConfig, make_engine
from distill.engine.process import told
from distill.errors import UserError
from distill.roles import Origin
from distill.runs import StageRun
from distill.trainer import Trainer
from student.causal_dit import CausalDiT
from teacher.dit import DiT
from teacher.embedder import IdentityEmbedder

# eps is large, because Adam makes a step of lr out of the rounding of a gradient that is almost zero.
RECIPE = """
name: r
scale: tiny
stage: {stage}
model: {{dim: 32, depth: 2, heads: 2, ffn_dim: 24, channels: 4, text_dim: 6, mels: 4, references: [global, expression]}}
student: {{chunk_frames: 1, sink_chunks: 1, window_chunks: 1, steps: [1.0, 0.5]}}
rollout: {rollout}
phases:
  - {{update: critic, terms: {{flow_matching: {{role: critic, drop_text: 0.4, drop_audio: 0.4}}}}}}
  - {{update: student, every: 2, terms: {{dmd: {{cfg: {{text: 2.0, audio: 3.0}}}}, {term}}}}}
optimizer: {{lr: 1.0e-3, betas: [0.0, 0.999], eps: 1.0e-5, warmup_steps: 2, schedule: cosine, student: {{lr: 2.0e-3}}}}
train: {{steps: 10, batch_size: 4, clip: 0.5, ema: 0.8, save_every: 6, sample_every: 5, log_every: 1, keep: 9}}
"""
STAGES = {
    "stage2": {"rollout": "{kind: renoised}", "term": "perceptual: {weight: 2.0, levels: 2, frames: 1}"},
    "stage3": {"rollout": "{kind: self, chunks: 4, grad_chunks: 2}", "term": "identity_drift: {weight: 2.0}"},
}
# what a case changes: overrides of the recipe, and of the source of batches
VARIANTS: dict[str, tuple[list[str], dict[str, int]]] = {
    "": ([], {}),
    "accumulate": (["train.steps=2", "train.grad_accumulation=2"], {}),
    "poison": (["train.steps=4"], {"poison": 3}),  # the student's first update
    "bf16": (["train.steps=2", "train.precision=bf16"], {}),
    "resumed": ([], {}),  # its folder holds the checkpoint of step 6 of another engine
    "kill": ([], {"kill": 4}),
}
SIZES = {"dim": 32, "heads": 2, "ffn_dim": 24, "dtype": torch.float32}
FRAMES = 3


class Source:
    """Random clips; `poison` makes the audio of one clip in the second half NaN at one call."""

    fingerprint = "none"

    def __init__(self, poison: int = 0, kill: int = 0):
        self.poison, self.kill, self.calls = poison, kill, 0

    def sample(self, batch_size: int, generator: torch.Generator) -> Batch:
        self.calls += 1
        if self.calls == self.kill and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        seed = int(torch.randint(2**30, (), generator=generator))
        cond = conditions(FRAMES, batch_size, seed=seed, dtype=torch.float32)
        if self.calls == self.poison:
            cond.speak[-1] = math.nan
        return batch_of(cond, latents(FRAMES, batch_size, seed=seed, dtype=torch.float32))


class Paths:
    """Stands in for stored trajectories."""

    def states(self, index: Tensor) -> Tensor:
        known = normal(4, 3, FRAMES, 4, SIDE, SIDE, seed=9, dtype=torch.float32)
        return known[index.cpu()].to(index.device)


def gauge(step: int, roles: Roles) -> tuple[dict[str, float], dict[str, Tensor]]:
    """One evaluation of the averaged student."""
    cond, x0 = conditions(FRAMES, 2, dtype=torch.float32), latents(FRAMES, 2, dtype=torch.float32)
    with torch.no_grad():
        v = roles.causal("student")(x0, torch.full((2,), 0.5, dtype=torch.float64), cond)
    return {"health/v": float(v.square().mean())}, {}


def recipe(folder: Path, stage: str, *changes: str) -> Recipe:
    path = folder / f"{stage}.yaml"
    if not path.is_file():
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(RECIPE.format(stage=stage, **STAGES[stage]))
        os.replace(temporary, path)
    return load(path, changes)


def models_of(checked: Recipe, seed: int = 0) -> dict[str, nn.Module]:
    return {
        "teacher": small_dit(1, **SIZES),
        "critic": small_dit(seed + 2, **SIZES),
        "student": small_student(checked.student, seed + 3, **SIZES),
    }


def trainer(folder: Path, case: str, seed: int = 0) -> Trainer:
    """The trainer of a case; `seed` changes the weights that student and critic start from."""
    stage, kind, *what = case.split("-")
    changes, source = VARIANTS[what[0] if what else ""]
    checked = recipe(folder, stage, *changes)
    run = StageRun(folder / case, done=False)
    run.folder.mkdir(exist_ok=True)
    engine = make_engine(checked.train.precision, EngineConfig(kind=kind))
    models, origins = models_of(checked, seed), {}
    if stage == "stage3":
        for role in models:
            context = engine.empty(role != "teacher")
            if context is not None:
                with context:
                    dit = DiT(checked.model)
                models[role] = CausalDiT(dit, checked.student) if role == "student" else dit
                origins[role] = Origin(folder / "start" / role, {})
    torch.manual_seed(0)
    embedder = IdentityEmbedder(4, SIDE, SIDE, width=8, dim=8).requires_grad_(False)
    roles = Roles(models, checked.student, small_codec(), embedder, trajectories=Paths(), origins=origins)
    return Trainer(checked, run, roles, Source(**source), engine, parent=None)


def main(folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    for case in cases:
        made = trainer(folder, case)
        made.fit(gauge)
        (folder / case / f"skipped-{made.engine.rank}").write_text(str(made.skipped))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    try:
        with told():
            main(Path(sys.argv[1]), sys.argv[2:])
    except UserError as error:
        print(error.message, file=sys.stderr)
        sys.exit(int(error.code))
