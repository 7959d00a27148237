"""Every cell of every shipped grid begins: small networks, its gauge and a clip at step 0 and after two steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import batch_of, conditions, latents
from shrunk import ROOT, SMALL, trainer_of
from torch import Tensor

from distill import config
from distill.contracts import Roles
from distill.errors import ExitCode, UserError
from distill.grid import TRAINED, Job, plan
from distill.samples import one_step_error
from evaluation.bench import BenchConfig, make_clips, student_sampler

GRIDS = [path for path in sorted((ROOT / "recipes" / "ablations").glob("*.yaml")) if "base" not in path.stem]
STEPS = 2


def trained(path: Path) -> dict[str, Job]:
    """What a grid trains with its first seed, by the folder it trains in: cells and shared stages."""
    found = plan(path)
    first = f"seed={found.grid.seeds[0]}"
    return {job.run: job for job in found.jobs.values() if job.stage in TRAINED and first in job.overrides}


def sampled(step: int, roles: Roles) -> tuple[dict[str, float], dict[str, Tensor]]:
    """What the trainer is given to look with, on a clip that is longer than what a stream has in sight."""
    cond = conditions(6, dtype=torch.float32)
    student = student_sampler(roles.causal("student"), None)
    clips, _ = make_clips(student, cond, BenchConfig())
    assert clips.isfinite().all()
    return {"health/one_step": one_step_error(roles, batch_of(cond, latents(6, dtype=torch.float32)))}, {}


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_cell_of_a_shipped_grid_begins(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    begun = trained(path)
    assert begun
    for name, job in begun.items():
        small = config.load(job.recipe, [*SMALL, *job.overrides, "train.batch_size=2", f"train.sample_every={STEPS}"])
        trainer = trainer_of(small, tmp_path / name)
        with pytest.raises(UserError) as stopped:
            trainer.fit(sampled, until=STEPS)
        assert stopped.value.code == ExitCode.STOPPED and trainer.step == STEPS, f"{name}: {stopped.value.message}"
