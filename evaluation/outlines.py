"""Smile and brow height by fitting the drawn outlines of mouth and brows: correlation with a small family of shapes.

score(theta) = <map, shape(theta)> / |map| |shape(theta)|, read out as sum_theta softmax(BETA score) theta. The maps are
linear in the pixels up to one soft threshold, so codec noise averages out. Nothing is learned: the shapes are formulas.
Patches [B, 3, h, w] aligned with the face and skin [B, 3] -> smile [B], brow [B] in the rig's units.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

MOUTH_Y, OPENING, BROW_Y = 0.27, 0.40, -0.32
BETA_MOUTH, BETA_BROW = 80.0, 30.0


def span(low: float, high: float, step: float) -> Tensor:
    """Centers of equal cells that fill [low, high]."""
    count = round((high - low) / step)
    return low + (torch.arange(count, dtype=torch.float32) + 0.5) * ((high - low) / count)


MOUTH_COLS, MOUTH_ROWS = span(-0.44, 0.44, 0.02), span(0.14, 0.74, 0.02)
BROW_COLS, BROW_ROWS = span(0.08, 0.40, 0.02), span(-0.55, -0.15, 0.02)  # columns count outward from the face's axis
_BROW_USED = slice(2, 19)  # rows between the hair and the eyes


def coolness(patch: Tensor, skin: Tensor) -> Tensor:
    """0 where a pixel is as warm (R - B) as the skin or warmer, 1 where it is neutral: [B, h, w]."""
    warmth = (skin[:, 0] - skin[:, 2]).clamp(min=0.08)[:, None, None]
    return (1.0 - (patch[:, 0] - patch[:, 2]) / warmth).clamp(0.0, 1.0)


def darkness(patch: Tensor, skin: Tensor) -> Tensor:
    """0 where a pixel is at least about as light as the skin, 1 where it is less than half as light: [B, h, w]."""
    reference = skin.mean(dim=1).clamp(min=0.1)[:, None, None]
    return ((0.80 - patch.mean(dim=1) / reference) / 0.35).clamp(0.0, 1.0)


def hanging(mask: Tensor, dim: int) -> Tensor:
    """What is connected to the window's first row (dim 1) or column (dim 2), seen along that direction."""
    return mask.cummin(dim=dim).values


def _cover(distance: Tensor, soft: float = 0.06) -> Tensor:
    return (0.5 - distance / soft).clamp(0.0, 1.0)


def _grid(*axes: tuple[float, ...]) -> list[Tensor]:
    return [axis.reshape(-1, 1, 1) for axis in torch.meshgrid(*[torch.tensor(axis) for axis in axes], indexing="ij")]


def _region() -> Tensor:
    """Ellipse of the window that holds the mouth and little else [h, w]."""
    radius = (MOUTH_COLS[None, :] / 0.42) ** 2 + ((MOUTH_ROWS[:, None] - 0.42) / 0.36) ** 2
    return ((1.0 - radius) * 3.0).clamp(0.0, 1.0)


@cache
def _mouths() -> tuple[Tensor, Tensor]:
    """Mouth shapes as two maps each, unit length [K, 2 h w], and their smile [K]."""
    smile, width, opening, lift = _grid(
        tuple(-1.2 + 0.3 * k for k in range(9)), (0.17, 0.22, 0.28, 0.35), (0.0, 0.12, 0.25, 0.4, 0.6, 0.85),
        (-0.03, 0.0, 0.03),
    )  # fmt: skip
    x, y = MOUTH_COLS[None, None, :], MOUTH_ROWS[None, :, None]
    width = width * (1.0 + 0.08 * smile)
    corner = MOUTH_Y - 0.08 * smile + 0.09 * opening + lift
    top = MOUTH_Y + 0.022 * smile - 0.015 * opening + lift
    bottom = top + OPENING * opening
    u = (x / width).clamp(-1.4, 1.4)
    middle, half = 0.5 * (top + bottom), 0.5 * (bottom - top)
    bend = corner - middle
    slope = 2.0 * u.abs() * (bend.abs() + half) / width
    line, gap = middle + bend * u * u, half * (1.0 - u * u)
    rim = ((y - line).abs() - gap) / torch.sqrt(1.0 + slope**2) + (x.abs() - width).clamp(min=0.0)
    lips = _cover(rim - 0.052 * (1.0 - 0.55 * u.abs().clamp(max=1.0) ** 2))
    hole = _cover(rim) * (half * 60.0).clamp(max=1.0)
    teeth = hole * _cover(y - (line - gap) - (0.12 * opening).clamp(max=0.085))
    tall = 0.02 + 0.13 * opening
    tongue = torch.sqrt((x / (0.62 * width)) ** 2 + ((y - bottom - 0.01) / tall) ** 2) - 1.0
    tongue = (hole - teeth) * _cover(tongue * tall)
    magenta = 0.26 * (lips - hole) + 0.08 * (hole - teeth - tongue) - 0.02 * teeth + 0.25 * tongue
    cool = 0.2 * (0.95 * hole - 0.2 * tongue)
    shapes = torch.stack([magenta * _region(), cool * _region()], dim=1).flatten(1)
    return functional.normalize(shapes, dim=1), smile.flatten()


def smile(patch: Tensor, skin: Tensor) -> Tensor:
    """patch over MOUTH_ROWS x MOUTH_COLS -> smile [B].

    Magenta, (R + B) / 2 - G, is what lips and tongue have and no skin, light or dark, lit or shaded, has.
    """
    shapes, values = (tensor.to(patch.device) for tensor in _mouths())

    def magenta(color: Tensor) -> Tensor:
        return 0.5 * (color[:, 0] + color[:, 2]) - color[:, 1]

    region = _region().to(patch.device)
    lips = (magenta(patch) - magenta(skin)[:, None, None]) * region
    cool = 0.2 * (coolness(patch, skin) - 0.1).clamp(min=0.0) * region
    maps = functional.normalize(torch.stack([lips, cool], dim=1).flatten(1), dim=1)
    return torch.softmax(BETA_MOUTH * maps @ shapes.T, dim=1) @ values


@cache
def _brows() -> tuple[Tensor, Tensor]:
    """Right-hand brow shapes, unit length [K, h w], and their height [K]."""
    lift, worry, space, thick = _grid(
        tuple(-1.2 + 0.2 * k for k in range(13)), (0.0, 0.04), (0.22, 0.25, 0.28), (0.024, 0.034, 0.044)
    )
    across = (BROW_COLS[None, None, :] - space) / 0.15
    bent = across.clamp(-1.3, 1.3)
    y = BROW_ROWS[None, _BROW_USED, None] - (BROW_Y - 0.075 * lift) - (0.03 * bent**2 + worry * bent)
    rim = torch.maximum((y.abs() - thick * (1.0 - 0.25 * across)) * 0.95, (across.abs() - 1.0) * 0.15)
    return functional.normalize(_cover(rim).flatten(1), dim=1), lift.flatten()


def brow(left: Tensor, right: Tensor, skin: Tensor) -> tuple[Tensor, Tensor]:
    """Patches over BROW_ROWS x BROW_COLS, outward on both sides -> brow height [B] and thickness [B]."""
    shapes, values = (tensor.to(left.device) for tensor in _brows())
    total = torch.zeros_like(left[:, 0])
    for patch in (left, right):
        dark = ((0.95 - patch.mean(dim=1) / skin.mean(dim=1).clamp(min=0.1)[:, None, None]) / 0.6).clamp(0.0, 1.0)
        solid = ((torch.maximum(darkness(patch, skin), coolness(patch, skin)) - 0.4) / 0.4).clamp(0.0, 1.0)
        hair = functional.max_pool2d(hanging(solid, 1), (5, 1), 1, (2, 0))  # what hangs into the window, and its rim
        total = total + 0.5 * dark * (1.0 - hair)
    used = total[:, _BROW_USED]
    height = torch.softmax(BETA_BROW * functional.normalize(used.flatten(1), dim=1) @ shapes.T, dim=1) @ values
    return height, used.sum(dim=1).mean(dim=1) * 0.02
