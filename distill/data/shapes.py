"""Soft-edged signed-distance shapes painted back to front on a batch of images.

Alpha of a shape with signed distance d (inside negative) is clamp(1/2 - d / (RIM px), 0, 1): RIM pixels of soft edge at
any resolution (I. Quilez, "2D distance functions", for the ellipse). World units: the image spans [-1, 1], y down.
Canvas.image [B, 3, S, S] float in [0, 1]; every alpha is a plane [B, h, w] of a window that bounds the shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIM = 1.8  # soft edge in pixels: wider than anti-aliasing needs, because a codec of few channels cannot keep hard edges


@dataclass(frozen=True)
class Window:
    """A rectangle of pixels and the frame-local coordinates of its pixels."""

    rows: slice
    cols: slice
    x: Tensor  # [B, h, w]
    y: Tensor  # [B, h, w]

    def moved(self, dx: Tensor | float, dy: Tensor | float) -> Window:
        """The same pixels seen from an origin shifted by (dx, dy)."""
        return Window(self.rows, self.cols, self.x - _plane(dx), self.y - _plane(dy))


@dataclass(frozen=True)
class Pose:
    """Rigid placement of a part: world = rotate(local, roll) + (x, y); all [B]."""

    x: Tensor
    y: Tensor
    roll: Tensor


def _plane(value: Tensor | float) -> Tensor | float:
    return value[:, None, None] if isinstance(value, Tensor) else value


class Canvas:
    """A batch of images that shapes are painted on."""

    def __init__(self, batch: int, size: int) -> None:
        self.size = size
        self.px = 2.0 / size
        self.grid = (torch.arange(size, dtype=torch.float32) + 0.5) * self.px - 1.0  # [S] pixel centers
        self.image = torch.zeros(batch, 3, size, size)

    def window(self, pose: Pose, x: tuple[float, float], y: tuple[float, float]) -> Window:
        """Pixels that the local box x by y can touch under any pose of the batch, with their local coordinates."""
        cos, sin = torch.cos(pose.roll), torch.sin(pose.roll)
        corners_x = torch.stack([cos * a - sin * b + pose.x for a in x for b in y])
        corners_y = torch.stack([sin * a + cos * b + pose.y for a in x for b in y])
        rows, cols = self._span(corners_y), self._span(corners_x)
        world_x = self.grid[cols][None, None, :] - pose.x[:, None, None]  # [B, 1, w]
        world_y = self.grid[rows][None, :, None] - pose.y[:, None, None]  # [B, h, 1]
        c, s = cos[:, None, None], sin[:, None, None]
        return Window(rows, cols, c * world_x + s * world_y, c * world_y - s * world_x)

    def _span(self, corners: Tensor) -> slice:
        low = int(((float(corners.min()) + 1.0) / self.px) - 1.0)
        high = int(((float(corners.max()) + 1.0) / self.px) + 2.0)
        return slice(min(max(low, 0), self.size - 1), min(max(high, 1), self.size))

    def soft(self, distance: Tensor, edge: float = 0.0) -> Tensor:
        """Coverage of a pixel at this signed distance; `edge` (world units) blurs the rim further."""
        return (0.5 - distance * (1.0 / (RIM * self.px + edge))).clamp_(0.0, 1.0)

    def paint(self, window: Window, alpha: Tensor, color: Tensor) -> None:
        """Lay color ([B, 3] or a shaded [B, 3, h, w]) over the window with coverage alpha [B, h, w]."""
        target = self.image[:, :, window.rows, window.cols]
        source = color[:, :, None, None] if color.ndim == 2 else color
        target += alpha[:, None] * (source - target)


def ellipse(x: Tensor, y: Tensor, rx: Tensor | float, ry: Tensor | float) -> Tensor:
    """First-order signed distance to an axis-aligned ellipse, k (k - 1) / |grad| with k = |(x / rx, y / ry)|."""
    rx, ry = _plane(rx), _plane(ry)
    sx, sy = x / rx, y / ry
    k0 = torch.sqrt(sx * sx + sy * sy)
    gx, gy = sx / rx, sy / ry
    k1 = torch.sqrt(gx * gx + gy * gy).clamp_(min=1e-6)
    return k0 * (k0 - 1.0) / k1


def palette(position: Tensor, colors: tuple[tuple[float, float, float], ...]) -> Tensor:
    """Piecewise-linear path through colors: position [B] in [0, 1] -> [B, 3]."""
    table = torch.tensor(colors, dtype=torch.float32)
    scaled = position.clamp(0.0, 1.0) * (len(colors) - 1)
    low = scaled.floor().clamp(max=len(colors) - 2)
    weight = (scaled - low)[:, None]
    index = low.long()
    return table[index] * (1.0 - weight) + table[index + 1] * weight
