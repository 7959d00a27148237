"""Every tiny recipe with small networks on random clips: `train` does a few steps, the script measures their bands.

    python tests/shrunk.py        writes tests/bands/shrunk.json: four seeds of every recipe, eight steps

The bands say what the first steps of each recipe's rollout, losses and optimizers give; they depend on no data and no
teacher, so that the tests can hold one seed of every recipe against them in seconds.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import torch
from conftest import latents, small_codec, small_dit, small_student
from test_trainer import SIZES, FakeSource
from torch import nn

from distill import config
from distill.config import Recipe
from distill.contracts import Roles
from distill.engine import Engine
from distill.errors import UserError
from distill.heads import term_heads
from distill.reference import Band, Origin, as_json, measured, settings
from distill.runs import StageRun, write_text
from distill.trainer import Trainer
from teacher.embedder import IdentityEmbedder

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "tests" / "bands" / "shrunk.json"
STEPS, SEEDS = 8, 4
MODEL = {"dim": 16, "depth": 2, "heads": 1, "ffn_dim": 16, "channels": 4, "text_dim": 6, "mels": 4}
SMALL = [
    *(f"model.{name}={value}" for name, value in MODEL.items()),
    "model.references=[global, expression]",
    *(f"student.{name}=1" for name in ("chunk_frames", "sink_chunks", "window_chunks")),
    "train.batch_size=2",
    "train.precision=fp32",
    "health.stop=never",  # random networks are not healthy
    "optimizer.eps=1e-4",  # else a first step of Adam makes whole steps out of the rounding of another CPU
]
SHIPPED = [path for path in sorted((ROOT / "recipes" / "tiny").rglob("*.yaml")) if "base" not in path.stem]
BANDED = [path for path in SHIPPED if not path.stem.startswith("trajectories")]
TRAINED = [path for path in BANDED if path.stem != "teacher"]


def trainer_of(recipe: Recipe, folder: Path) -> Trainer:
    """A trainer over small networks, the same for every seed of the recipe."""
    stream, trained = recipe.student, {phase.update for phase in recipe.phases}
    models: dict[str, nn.Module] = {"teacher": small_dit(1, **SIZES)}
    if "critic" in trained:
        models["critic"] = small_dit(2, **SIZES)
        models["critic"].add_module("heads", term_heads(recipe))
    for role in {"student", "refiner"} & trained | ({"backbone"} if "refiner" in trained else set()):
        models[role] = small_student(stream, 3, **SIZES, flow_map=recipe.model.flow_map)
    # Recovering takes a true chunk, two of the student's own, and the next true one.
    frames = 4 if "recover" in [term.name for phase in recipe.phases for term in phase.terms] else 2
    states = [latents(frames, recipe.train.batch_size, seed=seed).float() for seed in range(len(stream.steps) + 1)]
    paths = SimpleNamespace(states=lambda index: torch.stack(states, 1))
    with torch.random.fork_rng():
        torch.manual_seed(4)
        embedder = IdentityEmbedder(4, 4, 4).requires_grad_(False)
    roles = Roles(models, stream, small_codec().float(), embedder, trajectories=paths)
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(recipe, StageRun(folder, done=False), roles, FakeSource(frames=frames), Engine(), parent=None)


def shrunk(path: Path, seed: int = 0) -> Recipe:
    """The recipe with small networks; its schedule is that of the whole recipe."""
    return config.load(path, [*SMALL, "train.batch_size=8", "train.log_every=2", f"seed={seed}"])


def band(path: Path, folder: Path) -> Band:
    """The band of a recipe's first steps."""
    runs = [folder / f"{path.stem}-{seed}" for seed in range(SEEDS)]
    for seed, run in enumerate(runs):
        with suppress(UserError):  # stopped after STEPS, as asked
            trainer_of(shrunk(path, seed), run).fit(until=STEPS)
    origin = Origin(settings(shrunk(path).resolved), FakeSource.made_by)
    return measured(
        origin, [run / "metrics.jsonl" for run in runs], STEPS, {"recipe": path.stem, "seeds": list(range(SEEDS))}
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        bands = [band(path, Path(temporary)) for path in BANDED]
    write_text(KEPT, as_json(bands))
    print(f"Wrote {KEPT}: {len(bands)} recipes.", file=sys.stderr)
