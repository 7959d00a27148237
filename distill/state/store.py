"""Checkpoints of an engine: whole where every process holds everything, in shards where networks lie in pieces.

Both follow the commit rule of distill/state/checkpoint.py and carry the same manifest; rank 0 makes the temporary
folder, every process writes, syncs and hashes its own files into it, and rank 0 alone seals and renames it. What either
wrote, either reads, on any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.engine import Engine
from distill.errors import ExitCode, UserError
from distill.state import checkpoint
from distill.state.checkpoint import Checkpoint
from distill.state.ema import EMA
from distill.state.shards import Flat, Part, write_pieces

CARRIED = "carried"


def save(
    engine: Engine,
    root: Path,
    step: int,
    trained: list[str],
    product: str,
    ema: EMA,
    meta: dict[str, Any],
    keep: int,
    progress: dict[str, Any],
    carried: dict[str, Tensor] | None = None,
    best: int | None = None,
) -> Path:
    """Commit a checkpoint of every trained network, its optimizer, the average of the product, and what the rollout
    carries from step to step; that of the step `best` is never pruned."""
    engine.barrier()
    if engine.sharded:
        parts = _pieces(engine, trained, product, ema)
        if carried:
            parts[CARRIED] = [_rows(engine, name, tensor) for name, tensor in carried.items()]
        target = _save_pieces(engine, root, step, parts, meta, progress)
        if engine.is_main:
            checkpoint.prune(root, keep, best)
    else:
        target = root / f"step_{step:08d}"
        everyone = engine.gather({name: tensor.cpu() for name, tensor in (carried or {}).items()})
        if engine.is_main:
            state = {role: dict(engine.models[role].state_dict()) for role in trained}
            for role in trained:
                named = engine.models[role].named_parameters()
                state[f"optimizer_{role}"] = checkpoint.pack_optimizer(engine.optimizers[role], named)
            state["ema"] = ema.state()
            if carried:
                state[CARRIED] = {name: torch.cat([rows[name] for rows in everyone]) for name in carried}
            target = checkpoint.save(root, step, state, meta, keep, progress, best)
    engine.barrier()
    return target


def load(
    engine: Engine, root: Path, trained: list[str], product: str, ema: EMA, say: Callable[[str], None]
) -> Checkpoint | None:
    """Take up the newest whole checkpoint, if there is one. Rank 0 looks and verifies, all read."""
    found = engine.from_main(_latest(root, say) if engine.is_main else None)
    if isinstance(found, UserError):
        raise found
    if found is None:
        return None
    for role in trained:
        if engine.sharded:
            fill(engine, role, Part(found.path / role))
            moments = Part(found.path / f"optimizer_{role}")
            engine.restore_moments(role, _reader(moments))
        else:
            model = engine.models[role]
            model.load_state_dict(checkpoint.load(found.path, role))
            packed = checkpoint.load(found.path, f"optimizer_{role}")
            checkpoint.unpack_optimizer(engine.optimizers[role], model.named_parameters(), packed)
    if engine.sharded:
        averages = Part(found.path / "ema")
        for piece in engine.pieces(product):
            ema.average[piece.name].copy_(averages.read(piece.name, piece.start, piece.start + len(piece.tensor)))
    else:
        ema.load(checkpoint.load(found.path, "ema"))
    return found


@torch.no_grad()
def fill(engine: Engine, role: str, part: Part, own: dict[str, Tensor] | None = None) -> None:
    """Put the weights of a part of a checkpoint into the pieces that lie here. Names may differ by the prefix "dit.";
    `own` holds what the part need not have."""
    there = {name.removeprefix("dit."): name for name in part.names}
    for piece in engine.pieces(role):
        name, stop = piece.name.removeprefix("dit."), piece.start + len(piece.tensor)
        if name in there and part.names[there[name]] == piece.shape:
            piece.tensor.copy_(part.read(there[name], piece.start, stop))
        elif own is not None and name in own:
            piece.tensor.copy_(own[name].flatten()[piece.start : stop])
        else:
            raise UserError(f"The weights {part.folder} do not fit the recipe's model: {name}.", ExitCode.CHECKPOINT)
    engine.refresh(role)


def carried(engine: Engine, found: Checkpoint) -> dict[str, Tensor]:
    """This process's rows of what the rollout carried; nothing where they cannot be shared out evenly."""
    if not (found.path / CARRIED).is_dir():
        return {}
    part, mine = Part(found.path / CARRIED), {}
    for name, (rows, *rest) in part.names.items():
        if rows % engine.processes:
            return {}
        size = rows // engine.processes * prod(rest)
        mine[name] = part.read(name, engine.rank * size, (engine.rank + 1) * size).reshape(-1, *rest).to(engine.device)
    return mine


def _rows(engine: Engine, name: str, tensor: Tensor) -> Flat:
    """The rows of this process in a tensor of those of all."""
    shape = (len(tensor) * engine.processes, *tensor.shape[1:])
    return name, shape, engine.rank * tensor.numel(), tensor.flatten()


def _latest(root: Path, say: Callable[[str], None]) -> Checkpoint | UserError | None:
    try:
        return checkpoint.latest(root, say)
    except UserError as error:
        return error


def _reader(part: Part) -> Callable[[str, int, int], Tensor | None]:
    return lambda name, start, stop: part.read(name, start, stop) if name in part.names else None


def _pieces(engine: Engine, trained: list[str], product: str, ema: EMA) -> dict[str, list[Flat]]:
    parts: dict[str, list[Flat]] = {}
    for role in trained:
        parts[role] = [(p.name, p.shape, p.start, p.tensor) for p in engine.pieces(role)]
        moments, counts = engine.moments(role)
        parts[f"optimizer_{role}"] = [
            (f"{p.name}/{key}", p.shape, p.start, p.tensor) for key, pieces in moments.items() for p in pieces
        ]
        if role == product:
            parts["ema"] = [(p.name, p.shape, p.start, ema.average[p.name]) for p in engine.pieces(role)]
        # A count belongs to the parameter as a whole: whoever holds its first element writes it.
        first = {p.name for p in engine.pieces(role) if p.start == 0}
        for name, count in counts.items():
            if name in first:
                parts[f"optimizer_{role}"].append((f"{name}/step", (), 0, count.reshape(1)))
    return parts


def _save_pieces(
    engine: Engine,
    root: Path,
    step: int,
    parts: dict[str, list[Flat]],
    meta: dict[str, Any],
    progress: dict[str, Any],
) -> Path:
    target = root / f"step_{step:08d}"
    here = sum(tensor.numel() * tensor.element_size() for part in parts.values() for *_, tensor in part)
    needed = sum(engine.gather(here))
    if not engine.is_main:
        _write(engine, Path(engine.from_main("")), parts)
        return target
    known: dict[str, dict[str, Any]] = {}
    with checkpoint.committed(target, {"step": step, **meta}, needed, known) as folder:
        engine.from_main(str(folder))
        checkpoint.write_progress(folder, progress)
        known |= _write(engine, folder, parts)
    return target


def _write(engine: Engine, folder: Path, parts: dict[str, list[Flat]]) -> dict[str, dict[str, Any]]:
    """This process's files; returns the manifest entries of all processes', or raises what any of them met."""
    entries: dict[str, dict[str, Any]] = {}
    problem = ""
    try:
        for name, pieces in parts.items():
            path = write_pieces(folder / name, pieces, engine.rank, engine.processes)
            entries |= checkpoint.sealed(folder, path)
    except Exception as error:  # told to all, so that nobody waits for a shard that will not come
        problem = f"process {engine.rank}: {error}"
    everyone = engine.gather((entries, problem))
    problems = [text for _, text in everyone if text]
    if problems:
        raise UserError(f"The checkpoint {folder} could not be written ({problems[0]}).", ExitCode.CHECKPOINT)
    return {path: entry for listed, _ in everyone for path, entry in listed.items()}
