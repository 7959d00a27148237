"""The puppet: a talking head drawn from identity and motion parameters, so that everything about it is known exactly.

World units: the frame spans [-1, 1] with y down; head units are the same, centered on the head and turned with it.
Hair top, eye line and mouth line sit at fixed head heights for every character: evaluation.geometry relies on it.
identity [N, 16] in [0, 1] and motion [N, F, 10] (order MOTION) -> render -> uint8 frames [N, F, 3, S, S], any size S.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.data.shapes import Canvas, Pose, ellipse, palette

IDENTITY = (
    "skin", "hair", "iris", "shirt", "back_hue", "back_light", "face_width", "face_length",
    "eye_spacing", "eye_size", "brow_thickness", "nose_size", "mouth_width", "hair_length", "hair_volume", "hair_part",
)  # fmt: skip
MOTION = (
    "mouth_open", "mouth_wide", "head_x", "head_y", "roll", "gaze_x", "gaze_y", "blink", "smile", "brow",
)  # fmt: skip

HEAD_REACH, PARALLAX = (0.105, 0.125), 0.30  # full head motion in world units; features inside the face go 30% further
HEAD_Y, MAX_ROLL = -0.02, math.radians(10.0)
HAIR_TOP, EYE_Y, BROW_Y, NOSE_Y, MOUTH_Y = -0.84, -0.10, -0.32, 0.10, 0.27
OPENING, JAW_DROP = 0.40, 0.15  # inner mouth height at mouth_open = 1 (12.8 px of 64) and what the chin follows of it
LENS_PIXELS = 0.8
FRAMES_AT_ONCE = 48 * 64 * 64  # pixels painted in one go: planes stay in cache

SKIN = ((1.0, 0.88, 0.79), (0.96, 0.77, 0.62), (0.84, 0.61, 0.44), (0.66, 0.44, 0.29), (0.50, 0.32, 0.20))
HAIR = (
    (0.09, 0.08, 0.12), (0.27, 0.16, 0.11), (0.60, 0.20, 0.09), (0.86, 0.42, 0.12),
    (0.94, 0.78, 0.36), (0.80, 0.80, 0.84), (0.46, 0.44, 0.52),
)  # fmt: skip
IRIS = ((0.42, 0.24, 0.08), (0.38, 0.50, 0.10), (0.10, 0.58, 0.42), (0.12, 0.48, 0.88), (0.46, 0.28, 0.80))
SHIRT = (
    (0.80, 0.16, 0.20), (0.96, 0.60, 0.14), (0.96, 0.90, 0.62), (0.16, 0.56, 0.30), (0.10, 0.36, 0.62),
    (0.16, 0.15, 0.24), (0.52, 0.24, 0.62), (0.94, 0.94, 0.96),
)  # fmt: skip
BACK_DEEP = ((0.42, 0.58, 0.30), (0.22, 0.56, 0.50), (0.24, 0.50, 0.72), (0.36, 0.38, 0.72), (0.50, 0.34, 0.66))
BACK_PALE = ((0.78, 0.94, 0.66), (0.64, 0.94, 0.88), (0.66, 0.88, 1.00), (0.74, 0.76, 1.00), (0.88, 0.74, 1.00))
LIP, INSIDE, TEETH, TONGUE = (0.80, 0.14, 0.20), (0.13, 0.02, 0.11), (0.98, 0.98, 0.97), (0.56, 0.22, 0.46)


def sample_identities(n: int, seed: int, split: str) -> Tensor:
    """n characters [n, 16]; every parameter is stratified over its range, so few characters differ widely."""
    salt = sum(ord(letter) * 257**place for place, letter in enumerate(split)) % (2**31)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + salt) % (2**63))
    strata = torch.stack([torch.randperm(n, generator=generator) for _ in IDENTITY], dim=1)  # [n, 16]
    return (strata + torch.rand(n, len(IDENTITY), generator=generator)) / n


@torch.no_grad()
def render(identity: Tensor, motion: Tensor, size: int = 64) -> Tensor:
    """identity [N, 16], motion [N, F, 10] -> uint8 [N, F, 3, size, size]."""
    clips, frames = motion.shape[:2]
    who = identity.float().repeat_interleave(frames, dim=0)  # [N * F, 16]
    how = motion.float().reshape(clips * frames, -1)  # [N * F, 10]
    out = torch.empty(clips * frames, 3, size, size, dtype=torch.uint8)
    step = max(1, FRAMES_AT_ONCE // (size * size))
    for start in range(0, clips * frames, step):
        image = _soften(_Puppet(who[start : start + step], how[start : start + step], size).draw())
        out[start : start + step] = image.mul_(255.0).add_(0.5).clamp_(0.0, 255.0).to(torch.uint8)
    return out.view(clips, frames, 3, size, size)


def _soften(image: Tensor) -> Tensor:
    """Gaussian blur of one output pixel, the lens in front of the sensor: [N, 3, S, S] -> same.

    Edges of one pixel cost the linear codec 6 dB at 64 px (24 dB without, 30 dB with, at 24 channels); at 256 px the
    blur is not seen.
    """
    taps = torch.exp(-0.5 * (torch.arange(-3, 4) / LENS_PIXELS) ** 2)
    taps = (taps / taps.sum()).expand(3, 1, 1, 7)
    image = F.pad(image, (3, 3, 3, 3), mode="replicate")
    image = F.conv2d(image, taps, groups=3)
    return F.conv2d(image, taps.transpose(2, 3), groups=3)


def _constant(color: tuple[float, float, float], batch: int) -> Tensor:
    return torch.tensor(color).expand(batch, 3)


class _Puppet:
    """One batch of frames: parameters are unpacked once, then the parts are painted from back to front."""

    def __init__(self, who: Tensor, how: Tensor, size: int) -> None:
        self.batch = len(who)
        self.canvas = Canvas(self.batch, size)
        self.who = dict(zip(IDENTITY, who.unbind(1), strict=True))  # each [B]
        self.how = dict(zip(MOTION, how.unbind(1), strict=True))  # each [B]
        head_x, head_y, roll = self.how["head_x"], self.how["head_y"], self.how["roll"] * MAX_ROLL
        dx, dy = HEAD_REACH[0] * head_x, HEAD_REACH[1] * head_y
        self.head = Pose(dx, dy + HEAD_Y, roll)
        self.face = Pose(dx * (1 + PARALLAX), dy * (1 + PARALLAX) + HEAD_Y, roll)
        still = torch.zeros(self.batch)
        self.body = Pose(still, still, still)
        self.skin = palette(self.who["skin"], SKIN)
        self.hair = palette(self.who["hair"], HAIR)
        self.half_width = 0.50 + 0.14 * self.who["face_width"]
        self.chin = 0.68 + 0.13 * self.who["face_length"] + JAW_DROP * self.how["mouth_open"]
        self.hair_width = self.half_width + 0.05 + 0.12 * self.who["hair_volume"]

    def draw(self) -> Tensor:
        """The finished images [B, 3, S, S]."""
        self._background()
        self._hair_back()
        self._body()
        self._head()
        self._nose_and_cheeks()
        self._mouth()
        self._hair_front()
        self._eyes()
        self._brows()
        return self.canvas.image

    def _background(self) -> None:
        hue = self.who["back_hue"]
        light = self.who["back_light"][:, None]
        color = palette(hue, BACK_DEEP) * (1 - light) + palette(hue, BACK_PALE) * light
        grid = self.canvas.grid
        glow = 1.0 - 0.03 * grid[:, None] - 0.02 * grid[None, :].abs()  # a little darker toward the floor and the sides
        self.canvas.image.copy_((color[:, :, None, None] * glow).clamp_(0.0, 1.0))

    def _cap(self, x: Tensor, y: Tensor) -> Tensor:
        """Signed distance to the hair's outline above the ears, an ellipse that always peaks at HAIR_TOP."""
        return ellipse(x, y + 0.22, self.hair_width, -HAIR_TOP - 0.22)

    def _hair_back(self) -> None:
        window = self.canvas.window(self.head, (-0.95, 0.95), (-0.9, 1.1))
        x, y = window.x, window.y
        length = self.who["hair_length"][:, None, None]
        end = -0.12 + 0.98 * length
        width = self.hair_width[:, None, None] * (1.0 + 0.10 * length * ((y + 0.2).clamp(min=0.0)))
        fall = torch.maximum(x.abs() - width + 0.12, y - end + 0.12)
        other = torch.minimum(x.abs() - width + 0.12, y - end + 0.12)
        corner = torch.sqrt(fall.clamp(min=0) ** 2 + other.clamp(min=0) ** 2)
        box = corner + fall.clamp(max=0.0) - 0.12  # rounded lower corners
        distance = torch.where(y < -0.22, self._cap(x, y), box)
        shade = 0.74 - 0.10 * (y - 0.1).clamp(0.0, 0.8)
        self.canvas.paint(window, self.canvas.soft(distance), self.hair[:, :, None, None] * shade[:, None])

    def _body(self) -> None:
        canvas = self.canvas
        shirt = palette(self.who["shirt"], SHIRT)
        neck = Pose(self.head.x * 0.5, self.body.y, self.body.roll)
        window = canvas.window(neck, (-0.3, 0.3), (0.3, 0.98))
        canvas.paint(window, canvas.soft(ellipse(window.x, window.y - 0.55, 0.27, 0.42)), self.skin * 0.80)
        window = canvas.window(self.body, (-1.0, 1.0), (0.66, 1.0))
        x, y = window.x, window.y
        shoulders = ellipse(x, y - 1.34, 1.02, 0.60)
        neckline = ellipse(x, y - 0.70, 0.27, 0.20)
        shade = (1.0 - 0.30 * (x.abs() - 0.15).clamp(min=0.0) + 0.06 * (x < 0)).clamp(max=1.06)
        alpha = canvas.soft(torch.maximum(shoulders, -neckline))
        canvas.paint(window, alpha, shirt[:, :, None, None] * shade[:, None])
        collar = canvas.soft(torch.maximum(shoulders, (neckline - 0.03).abs() - 0.022))
        canvas.paint(window, collar, shirt * 0.72)

    def _head(self) -> None:
        canvas = self.canvas
        window = canvas.window(self.head, (-0.78, 0.78), (-0.66, 0.98))
        x, y = window.x, window.y
        ears = ellipse(x.abs() - self.half_width[:, None, None] + 0.005, y + 0.04, 0.075, 0.125)
        canvas.paint(window, canvas.soft(ears), self.skin * 0.86)
        canvas.paint(window, canvas.soft(ears + 0.045), self.skin * 0.72)
        low = (self.chin + 0.06)[:, None, None]
        t = ((y + 0.06) / low).clamp(0.0, 1.2)
        narrowed = x / (1.0 - 0.12 * t * t)  # the jaw tapers toward the chin
        height = torch.where(y > -0.06, low, torch.full_like(low, 0.60))
        sx, sy = narrowed / self.half_width[:, None, None], (y + 0.06) / height
        k0 = torch.sqrt(sx * sx + sy * sy).clamp_(min=1e-4)
        gx, gy = sx / self.half_width[:, None, None], sy / height
        rim = k0 * (k0 - 1.0) / torch.sqrt(gx * gx + gy * gy)
        shade = 1.03 - 0.16 * (k0 - 0.55).clamp(0.0, 0.5) / 0.45 - 0.05 * sx  # lit from the upper left
        color = (self.skin[:, :, None, None] * shade[:, None]).clamp_(max=1.0)
        canvas.paint(window, canvas.soft(rim), color)

    def _nose_and_cheeks(self) -> None:
        canvas = self.canvas
        size = self.who["nose_size"]
        window = canvas.window(self.face, (-0.16, 0.16), (-0.12, 0.22))
        x, y = window.x, window.y
        width, height = 0.045 + 0.065 * size, 0.035 + 0.035 * size
        bridge = ellipse(x + 0.01, y - NOSE_Y + 0.14, 0.030 + 0.012 * size, 0.15)
        canvas.paint(window, canvas.soft(bridge, 0.05) * 0.5, (self.skin * 1.07).clamp(max=1.0))
        canvas.paint(window, canvas.soft(ellipse(x, y - NOSE_Y - 0.012, width, height), 0.015), self.skin * 0.76)
        canvas.paint(window, canvas.soft(ellipse(x, y - NOSE_Y + 0.012, width * 0.92, height), 0.02), self.skin)
        shine = ellipse(x + 0.35 * width[:, None, None], y - NOSE_Y + 0.025, 0.018, 0.014)
        canvas.paint(window, canvas.soft(shine, 0.02) * 0.5, (self.skin * 1.15).clamp(max=1.0))
        window = canvas.window(self.face, (-0.52, 0.52), (0.0, 0.28))
        lift = 0.03 * self.how["smile"].clamp(min=0.0)
        cheek = ellipse(window.x.abs() - 0.34, window.y - 0.13 + lift[:, None, None], 0.11, 0.075)
        blush = self.skin * torch.tensor([1.0, 0.80, 0.80])
        canvas.paint(window, canvas.soft(cheek, 0.09) * 0.55, blush)

    def _mouth(self) -> None:
        """Two parabolas through the corners bound the inside; the lips are the band around it."""
        canvas, how = self.canvas, self.how
        opening, smile = how["mouth_open"], how["smile"]
        width = (0.22 + 0.07 * self.who["mouth_width"]) * (1.0 + 0.24 * how["mouth_wide"]) * (1.0 + 0.08 * smile)
        corner = MOUTH_Y - 0.080 * smile + 0.09 * opening
        top = MOUTH_Y + 0.022 * smile - 0.015 * opening
        bottom = top + OPENING * opening
        window = canvas.window(self.face, (-0.46, 0.46), (0.10, 0.80))
        x, y = window.x, window.y
        w = width[:, None, None]
        u = (x / w).clamp(-1.4, 1.4)
        middle0, half0 = (0.5 * (top + bottom))[:, None, None], (0.5 * (bottom - top))[:, None, None]
        bend = corner[:, None, None] - middle0
        half = half0 * (1.0 - u * u)
        middle = middle0 + bend * u * u
        slope = 2.0 * u.abs() * (bend.abs() + half0) / w
        reach = (x.abs() - w).clamp(min=0.0)
        inside = ((y - middle).abs() - half) / torch.sqrt(1.0 + slope * slope) + reach  # [B, h, w] signed distance
        lip = self.skin * 0.25 + _constant(LIP, self.batch) * 0.75
        thick = 0.052 * (1.0 - 0.55 * u.abs().clamp(max=1.0) ** 2)
        shade = torch.where(y < middle, 0.86, 1.02)
        canvas.paint(window, canvas.soft(inside - thick), lip[:, :, None, None] * shade[:, None])
        canvas.paint(window, canvas.soft(inside - 0.006), lip * 0.50)
        hole = canvas.soft(inside) * (half0 * 60.0).clamp(max=1.0)
        canvas.paint(window, hole, _constant(INSIDE, self.batch))
        tongue = ellipse(x, y - bottom[:, None, None] - 0.01, width * 0.62, 0.02 + 0.13 * opening)
        canvas.paint(window, hole * canvas.soft(tongue, 0.02), _constant(TONGUE, self.batch))
        teeth = y - (middle - half) - (0.30 * OPENING * opening).clamp(max=0.085)[:, None, None]
        canvas.paint(window, hole * canvas.soft(teeth), _constant(TEETH, self.batch))

    def _hair_front(self) -> None:
        canvas = self.canvas
        window = canvas.window(self.head, (-0.82, 0.82), (-0.88, 0.12))
        x, y = window.x, window.y
        cap = self._cap(x, y)
        part = 0.30 * (self.who["hair_part"] - 0.5)[:, None, None]
        across = (x - part) / self.half_width[:, None, None]
        fringe = -0.62 + 0.09 * self.who["hair_volume"][:, None, None] + 0.07 * torch.tanh(8.0 * part) * across
        hairline = fringe + 0.34 * across**4
        distance = torch.maximum(cap, (y - hairline) * 0.75)
        gloss = torch.exp(-(((cap + 0.15) / 0.05) ** 2)) * (0.6 - 0.4 * across).clamp(0.0, 1.0)
        shade = 0.92 + 0.10 * (y < hairline - 0.06) - 0.10 * (cap + 0.12).clamp(0.0, 0.12) / 0.12
        color = self.hair[:, :, None, None] * shade[:, None] + 0.14 * gloss[:, None]
        canvas.paint(window, canvas.soft(distance), color.clamp_(max=1.0))

    def _eyes(self) -> None:
        canvas, how = self.canvas, self.how
        space = (0.205 + 0.065 * self.who["eye_spacing"])[:, None, None]
        wide = 0.118 + 0.036 * self.who["eye_size"]
        wake = 1.0 + 0.20 * how["brow"].clamp(-1.0, 1.0) - 0.08 * how["smile"].abs()
        full = 0.80 * wide
        lids = (1.0 - how["blink"]) * wake
        high = (full * lids).clamp(min=0.006)
        low = EYE_Y + 0.80 * full * (1.0 - lids.clamp(max=1.0))  # the upper lid comes down, the lower one stays
        window = canvas.window(self.face, (-0.46, 0.46), (-0.28, 0.06))
        x = torch.where(window.x < 0, window.x + space, window.x - space)  # both eyes at once, each about its center
        y = window.y - low[:, None, None]
        lash = ellipse(x, y + 0.012, wide + 0.010, high + 0.018)
        canvas.paint(window, canvas.soft(lash), _constant((0.16, 0.10, 0.12), self.batch))
        open_eye = canvas.soft(ellipse(x, y, wide, high)) * (lids * 8.0).clamp(max=1.0)[:, None, None]
        canvas.paint(window, open_eye, _constant((0.94, 0.94, 0.96), self.batch))
        iris_x = x - 0.066 * how["gaze_x"][:, None, None]
        iris_y = window.y - EYE_Y - 0.030 * how["gaze_y"][:, None, None]
        iris = palette(self.who["iris"], IRIS)
        round_iris = torch.sqrt(iris_x**2 + iris_y**2)
        radius = (0.70 * wide)[:, None, None]
        glow = (0.80 + 0.45 * (iris_y / radius).clamp(-0.4, 1.0))[:, None]
        canvas.paint(window, open_eye * canvas.soft(round_iris - radius), iris[:, :, None, None] * glow)
        canvas.paint(
            window, open_eye * canvas.soft(round_iris - 0.46 * radius), _constant((0.05, 0.04, 0.06), self.batch)
        )
        shine = torch.sqrt((iris_x + 0.026) ** 2 + (iris_y + 0.030) ** 2) - 0.026
        canvas.paint(window, open_eye * canvas.soft(shine), _constant((1.0, 1.0, 1.0), self.batch))

    def _brows(self) -> None:
        canvas, how = self.canvas, self.how
        window = canvas.window(self.face, (-0.46, 0.46), (-0.50, -0.14))
        space = 0.215 + 0.065 * self.who["eye_spacing"]
        across = (window.x.abs() - space[:, None, None]) / 0.15
        lift = 0.075 * how["brow"]
        worry = 0.05 * (-how["smile"]).clamp(min=0.0)  # sad brows rise toward the nose
        arch = 0.030 * across.clamp(-1.3, 1.3) ** 2 + worry[:, None, None] * across.clamp(-1.3, 1.3)
        y = window.y - (BROW_Y - lift)[:, None, None] - arch
        thick = (0.020 + 0.026 * self.who["brow_thickness"])[:, None, None]
        distance = (y.abs() - thick * (1.0 - 0.25 * across)) * 0.95
        distance = torch.maximum(distance, (across.abs() - 1.0) * 0.15)
        canvas.paint(window, canvas.soft(distance), self.hair * 0.18 + 0.03)
