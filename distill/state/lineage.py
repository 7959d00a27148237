"""Who descends from whom: every checkpoint's manifest names its parent by the hash of the parent's manifest.

`describe` makes the manifest of a stage, `find_parent` finds the one a stage needs and `require` refuses the
wrong stage, scale or hash in one sentence, `tree` draws the family of any checkpoint.
"""

import hashlib
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from distill.config import Recipe, fingerprint, own_files
from distill.errors import ExitCode, UserError
from distill.state.checkpoint import MANIFEST, file_hash, newest, read_manifest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("teacher", "student", "evaluation", "distill", "recipes")


@dataclass(frozen=True)
class Manifest:
    """A manifest and the folder it describes; `hash` is the sha256 of manifest.json."""

    path: Path
    hash: str
    data: dict[str, Any]

    @property
    def stage(self) -> str:
        return str(self.data.get("stage"))

    @property
    def scale(self) -> str:
        return str(self.data.get("scale"))

    @property
    def step(self) -> int:
        return int(self.data.get("step", 0))

    @property
    def parent_hash(self) -> str | None:
        return (self.data.get("parent") or {}).get("manifest_sha256")

    @property
    def recipe(self) -> dict[str, Any]:
        return self.data.get("recipe") or {}

    @property
    def metrics(self) -> dict[str, Any]:
        return self.data.get("metrics") or {}


def read(path: str | Path) -> Manifest:
    """The manifest at a checkpoint, an export, a stage folder (its newest whole checkpoint) or a manifest.json."""
    path = Path(path)
    folder = path.parent if path.name == MANIFEST else path
    if not (folder / MANIFEST).is_file() and (folder / "checkpoints").is_dir():
        whole = newest(folder / "checkpoints")
        if whole is None:
            raise UserError(f"The stage {folder} has no whole checkpoint: run it to its end first.")
        folder = whole
    if not (folder / MANIFEST).is_file():
        raise UserError(f"There is no checkpoint at {path}: a folder with a {MANIFEST} is needed.")
    try:
        return Manifest(folder, file_hash(folder / MANIFEST), read_manifest(folder))
    except ValueError as error:
        raise UserError(f"{folder / MANIFEST} is damaged ({error}).", ExitCode.CHECKPOINT) from None


def describe(
    recipe: Recipe,
    step: int,
    parent: Manifest | None = None,
    data_fingerprint: str | None = None,
    metrics: dict[str, Any] | None = None,
    notes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What a checkpoint of this recipe says about itself: the `meta` of `checkpoint.save`. notes: further entries, such
    as `forced`, the reason for which the parent was taken though it did not pass the gate."""
    return {
        "name": recipe.name,
        "stage": recipe.stage,
        "scale": recipe.scale,
        "step": step,
        "recipe": recipe.resolved,
        "recipe_sha256": fingerprint(recipe),
        "parent": None if parent is None else {"path": str(parent.path), "manifest_sha256": parent.hash},
        "data_fingerprint": data_fingerprint,
        "code": {**code_version(), **{f"{name}.py": file_hash(path) for name, path in own_files(recipe).items()}},
        "metrics": metrics or {},
        "environment": environment(),
        **(notes or {}),
    }


def find_parent(run_folder: Path, wanted_stage: str, scale: str, override: str | None = None) -> Manifest:
    """The parent in this run, or the one PARENT names; refused when its stage or scale is another."""
    path = Path(override) if override else run_folder / wanted_stage
    if not path.exists():
        remedy = f"run `make {_target(wanted_stage)}` first or give PARENT=path"
        raise UserError(f"The parent {path} does not exist: {remedy if not override else 'check PARENT'}.")
    manifest = read(path)
    require(manifest, stage=wanted_stage, scale=scale)
    return manifest


def require(manifest: Manifest, stage: str | None = None, scale: str | None = None, hash: str | None = None) -> None:
    """UserError when the manifest is of another stage or scale, or its hash is not the expected one."""
    if stage is not None and manifest.stage != stage:
        raise UserError(f"{manifest.path} is a checkpoint of {manifest.stage} but {stage} is needed: give PARENT=path.")
    if scale is not None and manifest.scale != scale:
        raise UserError(
            f"{manifest.path} is of scale {manifest.scale} but the recipe is of scale {scale}: give PARENT=path."
        )
    if hash is not None and manifest.hash != hash:
        raise UserError(
            f"{manifest.path} has changed since its child was trained (manifest {manifest.hash[:12]}, expected "
            f"{hash[:12]}): use RUN=other to train from the new one."
        )


def ancestors(path: str | Path) -> list[tuple[Manifest | None, dict[str, str], str]]:
    """The checkpoint and its line of parents: (manifest, {"path", "manifest_sha256"} as its child names it, remark).

    A parent that is gone ends the line with None; one that was changed since says so in the remark.
    """
    manifest = read(path)
    line: list[tuple[Manifest | None, dict[str, str], str]] = [
        (manifest, {"path": str(manifest.path), "manifest_sha256": manifest.hash}, "")
    ]
    while manifest.data.get("parent"):
        named = manifest.data["parent"]
        try:
            manifest = read(named["path"])
        except UserError:
            return [*line, (None, named, "gone")]
        line.append((manifest, named, "" if manifest.hash == named["manifest_sha256"] else "CHANGED since"))
    return line


def tree(path: str | Path) -> str:
    """One line per generation, the checkpoint first, its ancestors below."""
    lines = []
    for depth, (manifest, named, remark) in enumerate(ancestors(path)):
        prefix = "" if depth == 0 else "   " * (depth - 1) + "└─ "
        if manifest is None:
            lines.append(f"{prefix}{named['path']}  (gone, manifest {named['manifest_sha256'][:12]})")
        else:
            lines.append(prefix + _line(manifest) + (f"  ({remark})" if remark else ""))
    return "\n".join(lines)


def _line(manifest: Manifest) -> str:
    forced = f"  (forced: {manifest.data['forced']})" if manifest.data.get("forced") else ""
    return f"{manifest.stage} {manifest.scale} step {manifest.step}  {manifest.hash[:12]}  {manifest.path}{forced}"


def _target(stage: str) -> str:
    return f"distill-{stage}" if stage.startswith("stage") else stage


@cache
def code_version() -> dict[str, str | None]:
    """sha256 over our own sources, and the commit where there is one."""
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "--verify", "-q", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {"sources": sources(*PACKAGES), "commit": commit}


def sources(*packages: str) -> str:
    """sha256 over the sources of these packages of ours."""
    digest = hashlib.sha256()
    for path in sorted(p for package in packages for p in (ROOT / package).rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def environment() -> dict[str, Any]:
    """The machine and the libraries, as far as they can change a number."""
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
