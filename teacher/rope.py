"""Rotary positions in time, row, column (RoFormer; the 3-D split of Wan2.1). No parameters.

Keys are stored *before* rotation and rotated at every use, so one stored chunk can stand at any place of a window.
References are told apart by negative times: one range per kind, one step per image.

positions [N, 3] float (time, row, column)  ->  angles [N, head_dim / 2]
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

REFERENCE_TIME = {"global": -10, "body": -20, "expression": -40}


@lru_cache(maxsize=64)
def grid_positions(frames: int, rows: int, columns: int) -> Tensor:
    """Token positions of a latent block, frame by frame: [frames*rows*columns, 3]."""
    axes = (torch.arange(frames), torch.arange(rows), torch.arange(columns))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3).double()


def moved(positions: Tensor, frames: int) -> Tensor:
    """The same tokens `frames` latent frames later."""
    return positions + torch.tensor([frames, 0, 0], dtype=positions.dtype, device=positions.device)


def reference_times(kinds: tuple[str, ...]) -> list[int]:
    """Time of each reference slot: its kind's range, minus its number within the kind."""
    seen: dict[str, int] = {}
    times = []
    for kind in kinds:
        if kind not in REFERENCE_TIME:
            raise ValueError(f"Unknown reference kind {kind!r}; known kinds are {', '.join(REFERENCE_TIME)}.")
        times.append(REFERENCE_TIME[kind] - seen.get(kind, 0))
        seen[kind] = seen.get(kind, 0) + 1
    return times


def rope_angles(positions: Tensor, head_dim: int, theta: float = 10000.0) -> Tensor:
    """Angles of every rotated pair, float64: time gets d - 4(d//6) channels, row and column 2(d//6) each."""
    side = 2 * (head_dim // 6)
    angles = []
    for axis, width in enumerate((head_dim - 2 * side, side, side)):
        frequencies = theta ** -(torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width)
        angles.append(positions[:, axis : axis + 1].double() * frequencies)
    return torch.cat(angles, -1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate pairs of neighbouring channels: x [B, N, heads, head_dim], angles [N, head_dim / 2]."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    pairs = x.to(dtype).unflatten(-1, (-1, 2))
    cos, sin = angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]
    even, odd = pairs.unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)
