"""What a long rollout carries from update to update, as the flat tensors [B, ...] that a checkpoint keeps.

One stream per micro-step, shared by the phases: the critic sees the same ages as the student. Keys and values of the
references are not kept: they are made again, with the weights of the day, as those of a saved session are.

`Carried` <-> roles.carried: {"0.identity": [B], "0.refs": [B, R, C, H, W], ...
                             "0.sink.<step>.<chunk>.<layer>.k": [B, K*n, D], ...}
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distill.contracts import Roles
from distill.data.batch import Batch
from student.causal_dit import CausalDiT
from student.kv_cache import ChunkKV, KVCache
from teacher.attention import KV

PLACES = ("sink", "window")
WHO = ("identity", "refs", "ref_mask", "speak", "listen", "first")


@dataclass(frozen=True)
class Carried:
    """A stream between two updates."""

    cache: KVCache
    identity: Tensor  # [B]
    refs: Tensor  # of its character, [B, R, C, H, W]
    ref_mask: Tensor
    speak: Tensor | None  # the last audio features heard, [B, A, M]; None before any
    listen: Tensor | None
    first: Tensor | None  # its first chunk, [B, K, C, H, W]


def keep(roles: Roles, stream: Carried) -> None:
    """Put a stream where the next update, and the checkpoint, find it."""
    prefix = _prefix(roles)
    for name in [name for name in roles.carried if name.startswith(prefix)]:
        del roles.carried[name]
    rows = len(stream.refs)
    found = {name: getattr(stream, name) for name in WHO}
    found["seen"] = torch.full((rows,), stream.cache.seen, dtype=torch.int64)
    for step, cache in enumerate((stream.cache, *stream.cache.later)):
        for place in PLACES:
            for number, chunk in enumerate(getattr(cache, place)):
                for layer, (k, v) in enumerate(chunk):
                    found |= {f"{place}.{step}.{number}.{layer}.{what}": x for what, x in (("k", k), ("v", v))}
    roles.carried.update({prefix + name: tensor.detach() for name, tensor in found.items()})


def take(roles: Roles, batch: Batch, student: CausalDiT, oldest: int) -> Carried | None:
    """This micro-step's stream; None where there is none of this size, it has seen more than `oldest` chunks,
    or an older checkpoint did not keep all of it."""
    prefix = _prefix(roles)
    stored = {n.removeprefix(prefix): t for n, t in roles.carried.items() if n.startswith(prefix)}
    if not {"seen", *WHO} <= stored.keys() or len(stored["seen"]) != len(batch) or int(stored["seen"][0]) > oldest:
        return None
    cond = replace(batch.cond, refs=stored["refs"], ref_mask=stored["ref_mask"])
    blank, seen = student.start(cond), int(stored["seen"][0])
    caches = []
    for step, cache in enumerate((blank, *blank.later)):
        parts: dict[str, Any] = {place: _chunks(stored, f"{place}.{step}.") for place in PLACES}
        caches.append(replace(cache, seen=seen, later=(), **parts))
    who: dict[str, Any] = {name: stored[name] for name in WHO}
    return Carried(replace(caches[0], later=tuple(caches[1:])), **who)


def with_refs(cache: KVCache, refs: list[list[KV]]) -> KVCache:
    """The same memory with references of another making."""
    return replace(cache, refs=refs, later=tuple(replace(one, refs=refs) for one in cache.later))


def _chunks(stored: dict[str, Tensor], prefix: str) -> tuple[ChunkKV, ...]:
    places = {tuple(map(int, name.removeprefix(prefix).split(".")[:2])) for name in stored if name.startswith(prefix)}
    chunks: list[ChunkKV] = [[] for _ in range(1 + max((number for number, _ in places), default=-1))]
    for number, layer in sorted(places):
        chunks[number].append((stored[f"{prefix}{number}.{layer}.k"], stored[f"{prefix}{number}.{layer}.v"]))
    return tuple(chunks)


def _prefix(roles: Roles) -> str:
    return f"{roles.key[3]}." if len(roles.key) > 3 else "0."
