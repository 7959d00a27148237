"""Exact geometry of the drawn character, read back from pixels: motion tracks, identity, caption labels.

1. silhouette against the corner color -> head position; 2. mirror symmetry of the features -> roll; 3. windows
resampled in the head's own coordinates -> mouth, iris, lids, brows by color (skin is warm, R - B > 0; inside, teeth,
whites are not). Nothing is learned: it relies on what all characters share, the heights of hair top, eyes and mouth.
frames [N, F, 3, H, W] in [0, 1] -> Tracks of [N, F] in the rig's motion units, identity [N, F, D] with std about 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from evaluation import outlines
from evaluation.outlines import coolness, darkness, hanging, span

HEAD_REACH, PARALLAX, MAX_ROLL = (0.105, 0.125), 0.30, math.radians(10.0)
HEAD_Y, HAIR_TOP, EYE_Y, OPENING = -0.02, -0.84, -0.10, 0.40
EXPRESSION_CENTERS = ((0.0, 0.0), (0.62, 0.15), (-0.62, -0.35), (0.0, 0.85))  # (smile, brow) by label, as they read
BROW_SHARE = 0.7  # of brow against smile: brows sway more
GLINT = 0.008  # the highlight at the upper left moves the dark part of the iris this far right
SMILE_REST, BROW_REST = -0.12, 0.04  # what the fitted outlines read on a neutral face
EYE_REST = 0.007  # the centroid of an open eye lies this far above the eye line
EDGE = 0.020  # the soft outline is found this far outside the hair's true rim
LIP_THICKNESS, LIP_YELLOW = 0.052, 0.27  # the lips' band and its (R + G) / 2 - B before skin is mixed in
GAZE_THRESHOLD, POSE_THRESHOLD = 0.375, 0.30


@dataclass
class Tracks:
    """Motion per frame [N, F] in the rig's units; identity [N, F, D] in units of the spread between characters."""

    mouth: Tensor
    head_x: Tensor
    head_y: Tensor
    roll: Tensor
    gaze_x: Tensor
    blink: Tensor
    smile: Tensor
    brow: Tensor
    identity: Tensor

    def select(self, index: Tensor) -> Tracks:
        """The tracks of some clips."""
        return Tracks(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


@dataclass
class _Place:
    """Where the head is in every frame: world offset of its center and its angle; all [B]."""

    x: Tensor
    y: Tensor
    roll: Tensor

    def face(self) -> _Place:
        """The features' frame, which parallax carries further than the outline."""
        return _Place(self.x * (1 + PARALLAX), self.y * (1 + PARALLAX), self.roll)


def _sample(image: Tensor, place: _Place, x: Tensor, y: Tensor, padding: str = "border") -> Tensor:
    """image [B, C, H, W] at local points x [w] or [B, w], y [h] or [B, h] -> [B, C, h, w]."""
    device = image.device
    x, y = x.to(device).reshape(-1, 1, x.shape[-1]), y.to(device).reshape(-1, y.shape[-1], 1)
    cos, sin = torch.cos(place.roll)[:, None, None], torch.sin(place.roll)[:, None, None]
    world_x = cos * x - sin * y + place.x[:, None, None]
    world_y = sin * x + cos * y + place.y[:, None, None] + HEAD_Y
    points = torch.stack([world_x, world_y], dim=-1)
    return functional.grid_sample(image, points, mode="bilinear", padding_mode=padding, align_corners=False)


def _median(values: Tensor) -> Tensor:
    """Median over the pixels of a patch: [B, 3, ...] -> [B, 3]."""
    return values.flatten(2).median(dim=2).values


def _light(image: Tensor) -> Tensor:
    return image.mean(dim=1)


def _centroid(weight: Tensor, at: Tensor, dim: int) -> Tensor:
    """Mean position over the window [B, h, w] along rows (dim 1) or columns (dim 2): [B]."""
    profile = weight.sum(dim=3 - dim)
    return (profile * at.to(weight.device)).sum(1) / profile.sum(1).clamp(min=1e-4)


def _hold(values: Tensor, weight: Tensor, clips: int, width: float = 2.0) -> Tensor:
    """Fill frames of little weight (a blink hides the iris) from their neighbors in time: [B, ...] -> [B, ...]."""
    frames = len(values) // clips
    reach = min(12, max(frames - 1, 1))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=values.device) / width) ** 2)
    flat = values.reshape(clips, frames, -1)
    weight = weight.reshape(clips, frames, 1).clamp(0.0, 1.0)

    def smooth(signal: Tensor) -> Tensor:  # [N, F, C] blurred over time
        rows = signal.transpose(1, 2).reshape(-1, 1, frames)
        blurred = functional.conv1d(functional.pad(rows, (reach, reach)), kernel.view(1, 1, -1))
        return blurred.view(clips, -1, frames).transpose(1, 2)

    overall = (flat * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1e-3)
    near = (smooth(flat * weight) + 1e-3 * overall) / (smooth(weight) + 1e-3)
    return (weight * flat + (1.0 - weight) * near).reshape(values.shape)


def _silhouette(image: Tensor) -> tuple[Tensor, Tensor]:
    """Soft foreground [B, 1, H, W] and the background color [B, 3] from the upper corners."""
    height, width = image.shape[-2:]
    rows, cols = max(1, height // 4), max(1, width // 16)
    corners = torch.cat([image[:, :, :rows, :cols], image[:, :, :rows, width - cols :]], dim=3)
    back = _median(corners)
    far = (image - back[:, :, None, None]).abs().sum(dim=1)
    return ((far - 0.10) / 0.25).clamp(0.0, 1.0)[:, None], back


def _outline(front: Tensor, place: _Place) -> tuple[_Place, Tensor]:
    """One refinement of the head's place from its sides and top; also the half width of the silhouette [B]."""
    step = 2.0 / front.shape[-1]
    half, band = span(0.0, 1.1, step), span(-0.45, 0.10, 2.0 / 64)
    upright = _Place(place.x, place.y, place.roll)
    left = _sample(front, upright, -half.flip(0), band, "zeros")[:, 0]  # [B, rows, cols] from the rim inward
    right = _sample(front, upright, half.flip(0), band, "zeros")[:, 0]
    left_reach = left.cummax(dim=2).values.mean(1).sum(1) * step
    right_reach = right.cummax(dim=2).values.mean(1).sum(1) * step
    shift = 0.5 * (right_reach - left_reach)
    down, middle = span(-1.15, -0.40, step), span(-0.15, 0.15, 2.0 / 64)
    crown = _sample(front, upright, middle, down, "zeros")[:, 0]  # [B, rows, cols] from the top down
    sky = (1.0 - crown.cummax(dim=1).values).mean(2).sum(1) * step
    lift = (-1.15 + sky) - HAIR_TOP + EDGE
    cos, sin = torch.cos(place.roll), torch.sin(place.roll)
    moved = _Place(place.x + cos * shift - sin * lift, place.y + sin * shift + cos * lift, place.roll)
    return moved, 0.5 * (left_reach + right_reach)


def _skin(image: Tensor, face: _Place) -> Tensor:
    """Skin color [B, 3]: median of the nose bridge and the upper cheeks."""
    bridge = _sample(image, face, span(-0.07, 0.07, 0.03), span(-0.16, 0.02, 0.03)).flatten(2)
    cheeks = [_sample(image, face, s * span(0.18, 0.32, 0.03), span(0.04, 0.12, 0.03)).flatten(2) for s in (-1, 1)]
    return torch.cat([bridge, *cheeks], dim=2).median(dim=2).values


_EYE_X, _EYE_Y = span(0.06, 0.44, 0.02), span(EYE_Y - 0.16, EYE_Y + 0.13, 0.02)


def _eye_masks(image: Tensor, face: _Place, skin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Left and right eye windows: not-skin masks [2, B, h, w], lightness [2, B, h, w], columns' x [2, w]."""
    masks, lights, columns = [], [], []
    for side in (-1.0, 1.0):
        patch = _sample(image, face, side * _EYE_X, _EYE_Y)
        mask = torch.maximum(coolness(patch, skin), darkness(patch, skin))
        masks.append(((mask - 0.35) / 0.4).clamp(0.0, 1.0))
        lights.append(_light(patch))
        columns.append(side * _EYE_X)
    return torch.stack(masks), torch.stack(lights), torch.stack(columns).to(image.device)


def _eye_seen(masks: Tensor) -> Tensor:
    """How far the eyes are open enough to be trusted [B] in [0, 1]; closed ones leave only the line of the lashes."""
    return ((masks.sum(dim=(0, 2, 3)) * 0.02**2 - 0.030) / 0.015).clamp(0.0, 1.0)


def _level(image: Tensor, place: _Place, clips: int) -> _Place:
    """Correct the height by the eye line: hair found too high or low by its color misplaces a whole clip alike."""
    face = place.face()
    masks, _, _ = _eye_masks(image, face, _skin(image, face))
    alone = (masks - torch.stack([hanging(mask, 1) for mask in masks])).clamp(min=0.0)  # without the brows
    line = _centroid(alone[0] + alone[1], _EYE_Y, 1)
    seen = _eye_seen(masks)
    error = 0.8 * (line - EYE_Y + EYE_REST)
    weight = seen.view(clips, -1)
    mean = (weight * error.view(clips, -1)).sum(1) / weight.sum(1).clamp(min=1.0)  # [N]
    return _Place(place.x, place.y + (mean / (1 + PARALLAX)).repeat_interleave(weight.shape[1]), place.roll)


_MIRROR_X, _MIRROR_Y = span(-0.45, 0.45, 0.03), span(-0.45, 0.51, 0.03)


def _features(patch: Tensor, skin: Tensor) -> Tensor:
    """Soft mask of everything drawn on the skin (brows, eyes, mouth): [B, h, w]."""
    red = (patch[:, 0] - patch[:, 1]) - (skin[:, 0] - skin[:, 1])[:, None, None]
    mask = torch.maximum(torch.maximum(coolness(patch, skin), darkness(patch, skin)), ((red - 0.08) / 0.16))
    return ((mask - 0.3) / 0.5).clamp(0.0, 1.0)


def _mirror(image: Tensor, face: _Place, skin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn [B] and sideways shift [B] that make the features mirror-symmetric, by one Gauss-Newton step.

    A symmetric mask m turned by e and shifted by t differs from its mirror image by 2 e (y m_x - x m_y) - 2 t m_x.
    """
    mask = _features(_sample(image, face, _MIRROR_X, _MIRROR_Y), skin)
    x, y = _MIRROR_X.to(mask.device)[None, None, :], _MIRROR_Y.to(mask.device)[None, :, None]
    weight = ((1.0 - (x / 0.46) ** 2 - ((y - 0.03) / 0.49) ** 2) * 4.0).clamp(0.0, 1.0)
    even, odd = 0.5 * (mask + mask.flip(2)), mask - mask.flip(2)
    along_y, along_x = torch.gradient(even, spacing=0.03, dim=(1, 2))
    turn, move = 2.0 * (y * along_x - x * along_y), -2.0 * along_x

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (weight * a * b).sum(dim=(1, 2))

    tt, tm, mm = dot(turn, turn) + 0.5, dot(turn, move), dot(move, move) + 0.5
    ot, om = dot(odd, turn), dot(odd, move)
    scale = tt * mm - tm * tm
    return (mm * ot - tm * om) / scale, (tt * om - tm * ot) / scale


def _locate(image: Tensor) -> tuple[_Place, Tensor, Tensor, Tensor]:
    """Head place, silhouette half width [B], foreground [B, 1, H, W] and background color [B, 3]."""
    front, back = _silhouette(image)
    zero = torch.zeros(len(image), device=image.device)
    place, half_width = _outline(front, _Place(zero, zero, zero))
    shift = zero
    for _ in range(4):
        face = place.face()
        turn, shift = _mirror(image, face, _skin(image, face))
        turned = (place.roll + turn.clamp(-0.15, 0.15)).clamp(-0.35, 0.35)
        place, half_width = _outline(front, _Place(place.x, place.y, turned))
    shift = shift.clamp(-0.06, 0.06) / (1 + PARALLAX)
    return _Place(place.x + 0.5 * shift, place.y, place.roll), half_width, front, back


def _steady(patch: Tensor, clips: int) -> Tensor:
    """Average of an aligned patch [B, C, h, w] over 11 frames of its clip: smiles and brows change slowly."""
    rows = patch.reshape(clips, -1, patch[0].numel()).transpose(1, 2)  # [N, C h w, F]
    smooth = functional.avg_pool1d(rows, 11, stride=1, padding=5, count_include_pad=False)
    return smooth.transpose(1, 2).reshape(patch.shape)


def _mouth_mask(patch: Tensor, skin: Tensor) -> Tensor:
    """Soft mask [B, h, w] of the mouth with its lips in the mouth window."""
    x, y = outlines.MOUTH_COLS.to(patch.device), outlines.MOUTH_ROWS.to(patch.device)
    red = (patch[:, 0] - patch[:, 1]) - (skin[:, 0] - skin[:, 1])[:, None, None]
    cool = ((coolness(patch, skin) - 0.25) / 0.6).clamp(0.0, 1.0)  # inside, teeth and tongue
    mask = torch.maximum(cool, ((red - 0.12) / 0.16).clamp(0.0, 1.0))
    rim = torch.maximum(hanging(mask, 2), hanging(mask.flip(2), 2).flip(2))  # hair or background beside the jaw
    narrow = 0.46 - 0.60 * (y - 0.40).clamp(min=0.0)  # the lower lip is never wide: what is there is collar and hair
    inner = ((narrow[:, None] - x.abs()[None, :]) / 0.06).clamp(0.0, 1.0)
    return (mask - rim).clamp(min=0.0) * inner


def _opening(patch: Tensor, skin: Tensor) -> Tensor:
    """Opening [B] in [0, 1], counted as what is not yellow, (R + G) / 2 - B, in the middle columns.

    Skin and lips are yellow, inside, teeth and tongue are not. The sum is signed and linear in the pixels, so blur
    does not bias it; the lips' own share is known from the skin color.
    """
    near = functional.max_pool2d(((_mouth_mask(patch, skin) - 0.1) / 0.2).clamp(0.0, 1.0), (5, 1), 1, (2, 0))
    warmth = (0.5 * (skin[:, 0] + skin[:, 1]) - skin[:, 2]).clamp(min=0.08)
    yellow = (0.5 * (patch[:, 0] + patch[:, 1]) - patch[:, 2]) / warmth[:, None, None]
    lips = 0.94 * (0.25 + 0.75 * LIP_YELLOW / warmth)
    center = outlines.MOUTH_COLS.abs() < 0.09
    counted = ((1.0 - yellow.clamp(-0.5, 2.5)) * near)[:, :, center].mean(2).sum(1) * 0.02
    shown = near[:, :, center].mean(2).amax(1)  # no mouth in sight, no lips to account for
    return (counted - 2.0 * LIP_THICKNESS * (1.0 - lips) * shown) / (1.12 * OPENING)


def _gaze(masks: Tensor, lights: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Iris shift [B] in world units about the middle of each eye, and the distance [B] of eyes from the face's axis."""
    rows = ((_EYE_Y - EYE_Y).abs() < 0.065).to(masks.device)
    dark = (masks * ((0.80 - lights) / 0.45).clamp(0.0, 1.0) ** 2)[:, :, rows]
    shift = [_centroid(dark[k], columns[k], 2) - _centroid(masks[k], columns[k], 2) for k in (0, 1)]
    space = 0.5 * (_centroid(masks[1], columns[1], 2) - _centroid(masks[0], columns[0], 2))
    return 0.5 * (shift[0] + shift[1]) - GLINT, space


def _iris(image: Tensor, face: _Place, space: Tensor, shift: Tensor) -> Tensor:
    """Iris color [B, 3]: median of the colored ring's lower half in both eyes."""
    below = span(EYE_Y + 0.03, EYE_Y + 0.07, 0.02)
    across = torch.tensor([-0.035, -0.015, 0.015, 0.035], device=image.device)
    patches = []
    for side in (-1.0, 1.0):
        points = (side * space + shift)[:, None] + across
        patches.append(_sample(image, face, points, below).flatten(2))
    return torch.cat(patches, dim=2).mean(dim=2)


# Mean and spread between characters of every identity measure, over 512 characters at rest and in motion.
IDENTITY_NAMES = tuple(f"{part}_{c}" for part in ("skin", "hair", "iris", "shirt", "back") for c in "rgb") + (
    "head_width", "hair_length", "eye_spacing", "eye_size", "brow_thickness",
)  # fmt: skip
IDENTITY_MEAN = (
    0.82, 0.61, 0.48, 0.65, 0.44, 0.31, 0.36, 0.44, 0.43, 0.49, 0.43, 0.42, 0.53, 0.68, 0.77,
    0.68, 0.57, 0.241, 0.114, 0.093,
)  # fmt: skip
IDENTITY_STD = (
    0.14, 0.156, 0.167, 0.265, 0.24, 0.236, 0.13, 0.12, 0.20, 0.28, 0.206, 0.17, 0.147, 0.12, 0.168,
    0.053, 0.139, 0.022, 0.040, 0.024,
)  # fmt: skip


@torch.no_grad()
def measure(frames: Tensor) -> Tracks:
    """frames [N, F, 3, H, W] in [0, 1] -> Tracks; every value is finite whatever the frames hold."""
    if frames.ndim != 5 or frames.shape[2] != 3:
        raise ValueError(f"measure expects frames shaped [N, F, 3, H, W]; it was given {tuple(frames.shape)}.")
    clips, length = frames.shape[:2]
    image = frames.float().nan_to_num(0.0).clamp(0.0, 1.0).flatten(0, 1)  # [B, 3, H, W]
    place, half_width, front, back = _locate(image)
    place = _level(image, place, clips)
    face = place.face()
    skin = _skin(image, face)
    patch = _sample(image, face, outlines.MOUTH_COLS, outlines.MOUTH_ROWS)
    opening = _opening(patch, skin)
    smile = outlines.smile(_steady(patch, clips), skin) + SMILE_REST
    sides = [_steady(_sample(image, face, s * outlines.BROW_COLS, outlines.BROW_ROWS), clips) for s in (-1.0, 1.0)]
    brow, brow_thickness = outlines.brow(sides[0], sides[1], skin)
    masks, lights, columns = _eye_masks(image, face, skin)
    area = masks.sum(dim=(0, 2, 3)) * 0.02**2  # [B] both eyes with their lashes
    by_clip = area.view(clips, length)
    full = by_clip.quantile(0.8, dim=1, keepdim=True).clamp(min=0.02)
    blink = ((1.0 - by_clip / full) / 0.88).clamp(-0.2, 1.2)
    seen = _eye_seen(masks) * (1.0 - 1.6 * blink.clamp(0.0, 1.0)).clamp(min=0.0).flatten()
    shift, space = _gaze(masks, lights, columns)
    shift, space = _hold(shift, seen, clips), _hold(space, seen, clips)
    gaze = (shift / 0.066).clamp(-1.2, 1.2)  # the corners of the eye cover a far-turned iris: the cubic undoes it
    iris = _hold(_iris(image, face, space, shift), seen, clips)
    hair = _median(_sample(image, place, span(-0.22, 0.22, 0.04), span(-0.77, -0.67, 0.03)))
    height, width = image.shape[-2:]
    low = image[:, :, height - max(1, height // 16) :, :]
    left, right = slice(width // 10, width * 3 // 10), slice(width * 7 // 10, width * 9 // 10)
    shirt = _median(torch.cat([low[..., left], low[..., right]], dim=3))
    lower = _sample(front, place, span(-0.95, 0.95, 0.03), span(0.36, 0.50, 0.03), "zeros")
    shapes = [half_width, lower.mean(dim=(1, 2, 3)) * 0.95, space, _hold(area, seen, clips), brow_thickness]
    identity = torch.cat([skin, hair, iris, shirt, back, torch.stack(shapes, dim=1)], dim=1)  # [B, D]
    center = torch.tensor(IDENTITY_MEAN, device=image.device)
    spread = torch.tensor(IDENTITY_STD, device=image.device)
    identity = (identity - center) / spread
    known = seen.view(clips, length).amax(1).repeat_interleave(length)[:, None]  # [B, 1] 0 if the eyes never open
    identity[:, 6:9] *= known  # an iris nobody has seen counts as average
    identity[:, 17:19] *= known

    def track(values: Tensor) -> Tensor:
        return values.view(clips, length)

    return Tracks(
        mouth=track(opening),
        head_x=track(place.x) / HEAD_REACH[0],
        head_y=track(place.y) / HEAD_REACH[1],
        roll=track(place.roll) / MAX_ROLL,
        gaze_x=track(gaze * (0.82 + 0.43 * gaze**2)),
        blink=blink,
        smile=track(smile),
        brow=track(brow) + BROW_REST,
        identity=identity.view(clips, length, -1),
    )


def classify(tracks: Tracks) -> Tensor:
    """Caption labels [N, 3] (expression, gaze, pose) that the clips show on average."""
    shown = torch.stack([tracks.smile.mean(1), tracks.brow.mean(1)], dim=1)  # [N, 2]
    share = torch.tensor([1.0, BROW_SHARE], device=shown.device)
    centers = torch.tensor(EXPRESSION_CENTERS, device=shown.device)
    expression = torch.cdist(shown * share, centers * share).argmin(dim=1)

    def side(values: Tensor, threshold: float) -> Tensor:  # 0 middle, 1 left (negative), 2 right
        middle = values.median(dim=1).values
        return (middle < -threshold).long() + 2 * (middle > threshold).long()

    return torch.stack([expression, side(tracks.gaze_x, GAZE_THRESHOLD), side(tracks.roll, POSE_THRESHOLD)], dim=1)
