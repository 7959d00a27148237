"""`make import-wan`: stage 0 at scale. Wan2.1's weights become a run's `teacher`, tensor by tensor, with a manifest.

WEIGHTS (a safetensors file, an index, a folder, a diffusers pipeline) -> runs/<run>/teacher/checkpoints/step_*/ema
The audio branches are new and silent: what is imported draws what Wan draws, and still has to learn to hear.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from distill.config import fingerprint, load
from distill.errors import UserError
from distill.options import Options
from distill.runs import run_folder, write_status
from distill.state import checkpoint
from distill.state.lineage import code_version, environment
from teacher.wan_stream import stream_wan, write_stream


def import_wan(options: Options) -> str:
    """Import options.own["weights"] as the teacher of the run; UserError when they do not fit the scale."""
    weights = options.own.get("weights")
    if not weights:
        raise UserError("Nothing to import: give WEIGHTS=folder with Wan2.1's safetensors.")
    path = options.recipe or Path("recipes") / options.scale / "base.yaml"
    recipe = load(path, ("name=import", "stage=teacher", "parent=null", *options.overrides))
    folder = run_folder(options.run) / "teacher"
    target = folder / "checkpoints" / "step_00000000"
    if (target / checkpoint.MANIFEST).is_file():
        raise UserError(f"{target} is there already: give RUN=other, or use it.")
    torch.manual_seed(recipe.seed)  # newly made parts
    try:
        shapes, tensors = stream_wan(weights, recipe.model)
    except ValueError as error:
        raise UserError(str(error)) from None
    size = sum(4 * torch.Size(shape).numel() for shape in shapes.values())
    meta = {
        "name": f"{recipe.scale}-teacher-import",
        "stage": "teacher",
        "scale": recipe.scale,
        "step": 0,
        "recipe": recipe.resolved,
        "recipe_sha256": fingerprint(recipe),
        "parent": None,
        "data_fingerprint": None,
        "imported": {"from": str(weights), "seed": recipe.seed, "model": asdict(recipe.model)},
        "code": code_version(),
        "metrics": {},
        "environment": environment(),
    }
    with checkpoint.committed(target, meta, size) as temporary:
        (temporary / "ema").mkdir()
        write_stream(temporary / "ema" / checkpoint.TENSORS, shapes, tensors)
        (temporary / checkpoint.PROGRESS).write_text(json.dumps({}))
    write_status(folder, "done", {"step": 0})
    return f"Wrote {target} ({size / 1e9:.1f} GB); next: make trajectories, or make distill-stage1."
