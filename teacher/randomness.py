"""Random generators by key: no global state, so that a draw can be made again alone, in any order, after any pause."""

from __future__ import annotations

import hashlib

import torch


def keyed_generator(*key: int | str) -> torch.Generator:
    """A generator seeded by its key alone, for example (seed, rank, step, "noise"): resume needs no stored state."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
