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
from functools import partialmethod
from pathlib import Path

import torch
from conftest import SIDE, batch_of, conditions, latents, normal, randomize, small_codec, small_dit, small_student
from torch import Tensor, nn

from distill.config import Recipe, load
from distill.contracts import Roles
from distill.data.batch import Batch
from distill.engine import Engine, load_engine, make_engine
from distill.engine.process import told
from distill.errors import UserError
from distill.heads import term_heads
from distill.launch import leave
from distill.roles import Origin
from distill.runs import StageRun
from distill.trainer import Trainer
from student.causal_dit import CausalDiT
from teacher.adapted import AdaptedDiT
from teacher.blocks import Block
from teacher.dit import DiT
from teacher.embedder import IdentityEmbedder

# Adam's eps is that of the recipes (1e-8) and the rates are those of recipes/tiny and above.
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
optimizer: {{lr: 1.0e-4, betas: [0.0, 0.999], warmup_steps: 2, schedule: cosine, student: {{lr: 2.0e-4}}}}
train: {{steps: 10, batch_size: 4, clip: 0.5, ema: 0.8, save_every: 6, sample_every: 5, log_every: 1, keep: 9}}
"""
STAGES = {
    "stage2": {"rollout": "{kind: renoised}", "term": "perceptual: {weight: 2.0, levels: 2, frames: 1}"},
    "stage3": {"rollout": "{kind: self, chunks: 4, grad_chunks: 2}", "term": "identity_drift: {weight: 2.0}"},
}
ADAPTED = "lora={student: {rank: 2, alpha: 3.0}, critic: {rank: 2, alpha: 3.0}}"
AGAIN = "model.checkpoint_blocks=true"
JUDGED = (  # a GAN beside DMD
    "phases.0.terms={flow_matching: {role: critic}, adversarial: {role: critic, weight: 0.5}}",
    "phases.1.terms={dmd: {cfg: {text: 2.0, audio: 3.0}}, adversarial: {role: student, weight: 0.5}}",
)
# what a case changes: overrides of the recipe, and of the source of batches
VARIANTS: dict[str, tuple[list[str], dict[str, int]]] = {
    "": ([], {}),
    "accumulate": (["train.steps=2", "train.grad_accumulation=2"], {}),
    "poison": (["train.steps=4"], {"poison": 3}),  # the student's first update
    "bf16": (["train.steps=2", "train.precision=bf16"], {}),
    "lora": ([ADAPTED, AGAIN], {}),
    "large": ([ADAPTED, AGAIN, "train.steps=2", "train.precision=bf16", "train.grad_accumulation=2"], {}),
    "two": (["train.steps=2"], {}),
    "compiled": (["train.steps=2", "train.compile=true"], {}),
    "long": (["rollout={kind: long, chunks: 4, grad_chunks: 2, max_chunks: 8}", "train.steps=4"], {}),
    "gan": ([*JUDGED, AGAIN, "train.steps=2"], {}),
    "resumed": ([], {}),  # its folder holds the checkpoint of step 6 of another engine
    "kill": ([], {"kill": 4}),
    "stop": ([], {"stop": 4}),  # in step 3: the second has two phases
}
SIZES = {"dim": 32, "heads": 2, "ffn_dim": 24, "dtype": torch.float32}
FRAMES = 3
ENGINES = Path(__file__).resolve().parents[1] / "recipes" / "accelerate"


class Source:
    """Random clips; `poison` makes the audio of one clip in the second half NaN at one call, `kill` and `stop` send
    the second process a signal at one."""

    fingerprint = made_by = "none"

    def __init__(self, poison: int = 0, kill: int = 0, stop: int = 0):
        self.poison, self.calls = poison, 0
        self.signals = {kill: signal.SIGKILL, stop: signal.SIGTERM}

    def sample(self, batch_size: int, generator: torch.Generator) -> Batch:
        self.calls += 1
        if self.calls in self.signals and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), self.signals[self.calls])
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
    return {"gauge/v": float(v.square().mean())}, {}  # health/ is not compared


def recipe(folder: Path, stage: str, *changes: str) -> Recipe:
    path = folder / f"{stage}.yaml"
    if not path.is_file():
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(RECIPE.format(stage=stage, **STAGES[stage]))
        os.replace(temporary, path)
    return load(path, changes)


def models_of(checked: Recipe, seed: int = 0) -> dict[str, nn.Module]:
    """Whole networks of all roles, as the recipe has them but for adapters."""
    sizes = {**SIZES, "checkpoint_blocks": checked.model.checkpoint_blocks}
    critic = small_dit(seed + 2, **sizes)
    if heads := term_heads(checked):
        randomize(heads, 8)
        critic.add_module("heads", heads)
    student = small_student(checked.student, seed + 3, **sizes)
    return {"teacher": small_dit(1, **sizes), "critic": critic, "student": student}


def empty_models(folder: Path, checked: Recipe, engine: Engine) -> tuple[dict[str, nn.Module], dict[str, Origin]]:
    """The same, made as `build_roles` makes them: empty where the engine wants it, to be filled from the disk."""
    models, origins = models_of(checked), {}
    for role in models:
        context = engine.empty(role != "teacher")
        if context is not None:
            own = {name: t for name, t in models[role].state_dict().items() if name.startswith("heads.")}
            with context:
                dit = DiT(checked.model)
                if own:
                    dit.add_module("heads", term_heads(checked))
            models[role] = CausalDiT(dit, checked.student) if role == "student" else dit
            origins[role] = Origin(folder / "start" / role, own)
    return models, origins


def adapt(checked: Recipe, models: dict[str, nn.Module], origins: dict[str, Origin], seed: int) -> None:
    """Put views on the teacher, with adapters that have learned something, in the place of student and critic."""
    for number, role in enumerate(("student", "critic")):
        if checked.lora is not None:
            origins.pop(role, None)
            teacher = models["teacher"]
            assert isinstance(teacher, DiT)
            view = AdaptedDiT(teacher, checked.lora.of(role))
            randomize(view, seed + number)
            models[role] = CausalDiT(view, checked.student) if role == "student" else view


def trainer(folder: Path, case: str, seed: int = 0) -> Trainer:
    """The trainer of a case; `seed` changes the weights that student and critic start from."""
    stage, kind, *what = case.split("-")
    changes, source = VARIANTS[what[0] if what else ""]
    checked = recipe(folder, stage, *changes)
    run = StageRun(folder / case, done=False)
    run.folder.mkdir(exist_ok=True)
    engine = make_engine(checked.train.precision, load_engine(ENGINES / f"{kind}.yaml"))
    models, origins = empty_models(folder, checked, engine) if stage == "stage3" else (models_of(checked, seed), {})
    adapt(checked, models, origins, seed + 5)
    torch.manual_seed(0)
    embedder = IdentityEmbedder(4, SIDE, SIDE, width=8, dim=8).requires_grad_(False)
    roles = Roles(models, checked.student, small_codec(), embedder, trajectories=Paths(), origins=origins)
    return Trainer(checked, run, roles, Source(**source), engine, parent=None)


def main(folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    # Traced and differentiated ahead of time, not made into C++: that takes minutes, tests/test_engine.py does it once.
    Block.compile = partialmethod(nn.Module.compile, backend="aot_eager")  # type: ignore[method-assign, assignment]
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
        leave(int(error.code))
    leave(0)
