"""Checkpoints that are either whole or absent: safetensors and JSON in a folder that appears by one rename.

Commit rule: write into a temporary folder on the same file system, fsync every file, write manifest.json last
(path, bytes, sha256 of each file), fsync it and the folder, rename, fsync the parent, and only then prune.
Resume scans downward, verifies, sets bad folders aside as *.bad, and never starts silently at 0.
step_00000500/{student,critic,ema,optimizer_student,...}/model.safetensors + state.json + manifest.json
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.errors import ExitCode, UserError
from distill.state.shards import TENSORS, Part

MANIFEST, PROGRESS = "manifest.json", "state.json"
SPARE_BYTES = 16 * 2**20  # left free on the disk beside the checkpoint itself, for logs


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint; `progress` is what the trainer put into state.json."""

    path: Path
    step: int
    manifest: dict[str, Any]
    progress: dict[str, Any] = field(default_factory=dict)


# ---- writing ----------------------------------------------------------------------------------------------


def save(
    root: Path,
    step: int,
    state: dict[str, dict[str, Tensor]],
    meta: dict[str, Any],
    keep: int = 2,
    progress: dict[str, Any] | None = None,
    best: int | None = None,
) -> Path:
    """Commit one checkpoint to root/step_<step> and prune the older ones; call it on rank 0, between barriers.

    state: sub-folder name -> flat tensors. meta: goes into the manifest. progress: goes into state.json.
    keep: how many of the newest stay (2 at least). best: the step of a checkpoint that is never pruned.
    """
    target = Path(root) / f"step_{step:08d}"
    needed = sum(tensor.numel() * tensor.element_size() for part in state.values() for tensor in part.values())
    with committed(target, {"step": step, **meta}, needed) as folder:
        for name, tensors in state.items():
            write_tensors(folder / name, tensors)
        write_progress(folder, progress or {})
    prune(Path(root), keep, best)
    return target


def write_progress(folder: Path, progress: dict[str, Any]) -> None:
    """What the trainer wants back beside tensors."""
    (folder / PROGRESS).write_text(json.dumps(progress, indent=1))


@contextmanager
def committed(
    target: Path, meta: dict[str, Any], bytes_needed: int = 0, known: dict[str, dict[str, Any]] | None = None
) -> Iterator[Path]:
    """Yield a temporary folder; when the block ends well it becomes `target`, whole and with a manifest.

    known: manifest entries by path, of files that whoever wrote them has synced and hashed; read when the block ends.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    require_space(target.parent, bytes_needed)
    temporary = target.parent / f".{target.name}.{os.getpid()}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        _seal(temporary, meta, known or {})
        replaced = _move_away(target)
        os.rename(temporary, target)
        _sync_folder(target.parent)
        if replaced is not None:
            shutil.rmtree(replaced)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """folder/model.safetensors; tensors go to the CPU, contiguous, without shared memory."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, folder / TENSORS)


def require_space(folder: Path, bytes_needed: int) -> None:
    """UserError (code 2) when the disk under `folder` cannot hold that many bytes more."""
    free = shutil.disk_usage(folder).free
    if free < bytes_needed + SPARE_BYTES:
        raise UserError(
            f"The disk under {folder} has {free:,} bytes free and {bytes_needed + SPARE_BYTES:,} are needed: "
            "free some space and run the same command again."
        )


def sealed(folder: Path, path: Path) -> dict[str, dict[str, Any]]:
    """fsync a file below `folder`; its manifest entry under its path there."""
    _sync(path)
    name = path.relative_to(folder).as_posix()
    return {name: {"path": name, "bytes": path.stat().st_size, "sha256": file_hash(path)}}


def _seal(folder: Path, meta: dict[str, Any], known: dict[str, dict[str, Any]]) -> None:
    """fsync all files, then write the manifest that lists them, then fsync that and every folder."""
    entries = dict(known)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.relative_to(folder).as_posix() not in known:
            entries |= sealed(folder, path)
    files = [entries[name] for name in sorted(entries)]
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({**meta, "files": files}, indent=1, sort_keys=True))
    _sync(manifest)
    for path in [*(p for p in folder.rglob("*") if p.is_dir()), folder]:
        _sync_folder(path)


def replace_text(folder: Path, name: str, text: str) -> None:
    """Replace one text file of a sealed folder, and its entry in the manifest."""
    temporary = folder / f".{name}.{os.getpid()}.partial"
    temporary.write_text(text, encoding="utf-8")
    entry = {"path": name, "bytes": temporary.stat().st_size, "sha256": file_hash(temporary)}
    manifest = read_manifest(folder)
    manifest["files"] = sorted([f for f in manifest["files"] if f["path"] != name] + [entry], key=lambda f: f["path"])
    beside = folder / f".{MANIFEST}.{os.getpid()}.partial"
    beside.write_text(json.dumps(manifest, indent=1, sort_keys=True))
    for path in (temporary, beside):
        _sync(path)
    os.replace(temporary, folder / name)
    os.replace(beside, folder / MANIFEST)
    _sync_folder(folder)


def _move_away(target: Path) -> Path | None:
    """A folder cannot be renamed onto a full one: the old one steps aside under a name that no scan reads."""
    if not target.exists():
        return None
    aside = target.parent / f".{target.name}.{os.getpid()}.replaced"
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(target, aside)
    return aside


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune(root: Path, keep: int, best: int | None = None) -> None:
    """Delete old checkpoints; never the newest two that verify, never the best, never what was set aside."""
    good = 0
    for path in reversed(_folders(root)):
        if good < max(keep, 2):
            good += verify(path) is None
        elif best is None or _step(path) != best:
            shutil.rmtree(path)
    for leftover in root.glob(".step_*.partial"):  # of a process that was killed in the middle of a save
        if not _alive(leftover):
            shutil.rmtree(leftover, ignore_errors=True)


def _alive(leftover: Path) -> bool:
    try:
        os.kill(int(leftover.name.split(".")[-2]), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


# ---- reading ----------------------------------------------------------------------------------------------


def latest(root: Path, say: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None where there never was one; UserError (code 6) if all are bad.

    Says what it chose, and what it rejected and why; the rejected are renamed to *.bad, not deleted.
    """
    root = Path(root)
    folders = _folders(root)
    for path in reversed(folders):
        reason = verify(path)
        if reason is None:
            say(f"resuming from {path}")
            progress = json.loads((path / PROGRESS).read_text()) if (path / PROGRESS).is_file() else {}
            return Checkpoint(path, _step(path), read_manifest(path), progress)
        aside = _set_aside(path)
        say(f"{path} is not whole ({reason}), set aside as {aside.name}")
    bad = sorted(root.glob("step_*.bad*"))
    if folders or bad:
        raise UserError(
            f"There are checkpoints in {root} but none is whole: look at {(bad or folders)[-1]}, or delete the "
            "folder to start again from step 0.",
            ExitCode.CHECKPOINT,
        )
    return None


def newest(root: Path) -> Path | None:
    """The newest checkpoint that verifies, for a reader who must not touch the folder (a child, a report)."""
    return next((path for path in reversed(_folders(Path(root))) if verify(path) is None), None)


def verify(path: Path) -> str | None:
    """None when every file of the manifest is there with its bytes and hash; otherwise the reason in a few words."""
    try:
        files = read_manifest(path)["files"]
        for entry in files:
            file = path / entry["path"]
            if not file.is_file():
                return f"{entry['path']} is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"{entry['path']} has {file.stat().st_size} bytes, not {entry['bytes']}"
            if file_hash(file) != entry["sha256"]:
                return f"{entry['path']} has another sha256"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None


def load(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one part of a checkpoint, on the CPU."""
    file = Path(path) / name / TENSORS
    if file.is_file():
        return load_file(file)
    part = Part(Path(path) / name)  # in shards, or in several files
    return {tensor: part.whole(tensor) for tensor in part.names}


def read_manifest(path: Path) -> dict[str, Any]:
    """manifest.json as plain data."""
    return json.loads((path / MANIFEST).read_text())


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
        return digest.hexdigest()


def _folders(root: Path) -> list[Path]:
    found = [p for p in root.glob("step_*") if p.is_dir() and p.name.removeprefix("step_").isdigit()]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _set_aside(path: Path) -> Path:
    target, count = path.with_name(f"{path.name}.bad"), 1
    while target.exists():
        target, count = path.with_name(f"{path.name}.bad{count}"), count + 1
    os.rename(path, target)
    return target


# ---- optimizer state --------------------------------------------------------------------------------------


def pack_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Iterable[tuple[str, nn.Parameter]]
) -> dict[str, Tensor]:
    """AdamW's state by parameter name: `<name>/exp_avg`, `<name>/exp_avg_sq`, `<name>/step`."""
    packed = {}
    for name, parameter in parameters:
        for key, value in optimizer.state.get(parameter, {}).items():
            packed[f"{name}/{key}"] = torch.as_tensor(value)
    return packed


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Iterable[tuple[str, nn.Parameter]], packed: dict[str, Tensor]
) -> None:
    """Give back what `pack_optimizer` took; UserError (code 6) when a tensor fits no parameter."""
    left = dict(packed)
    fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for name, parameter in parameters:
        entries = {key.rpartition("/")[2]: key for key in packed if key.rpartition("/")[0] == name}
        restored = {}
        for key, full in entries.items():
            value = left.pop(full)
            if key != "step" and value.shape != parameter.shape:
                raise UserError(f"The saved optimizer state of {name} has another shape.", ExitCode.CHECKPOINT)
            stays = key == "step" and not fused  # plain AdamW counts its steps on the CPU, fused on the device
            restored[key] = value.clone() if stays else value.to(parameter.device, copy=True)
        if restored:
            optimizer.state[parameter] = restored
    if left:
        raise UserError(f"The saved optimizer state names '{next(iter(left))}', unknown here.", ExitCode.CHECKPOINT)
