"""Clips as people see them: mp4 with sound, two models side by side, contact sheets.

h264 + AAC through PyAV, pictures through Pillow. Small frames are enlarged with whole, smooth steps so that a browser
does not blur them its own way. frames [F, 3, H, W] (uint8 or float in [0, 1]), wave [S] float32 mono -> bytes or files.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate

from evaluation.film import SAMPLE_RATE, Film
from evaluation.sync import FPS

INK, PAPER, QUIET = (28, 28, 30), (250, 249, 246), (110, 110, 115)


def write_mp4(path: Path, frames: Tensor, wave: Tensor, scale: int = 4) -> None:
    """frames [F, 3, H, W], wave [S] starting with the first frame -> mp4 file, enlarged by `scale`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(mp4_bytes(frames, wave, scale))
    temporary.replace(path)


def mp4_bytes(frames: Tensor, wave: Tensor, scale: int = 4) -> bytes:
    """The same in memory; the sound is cut or padded with silence to the length of the picture."""
    pictures = enlarge(frames, scale)
    buffer = io.BytesIO()
    film = Film(buffer, *pictures.shape[-2:])
    film.show(pictures)
    film.sound(wave[: round(len(frames) * SAMPLE_RATE / FPS)])
    film.close()
    return buffer.getvalue()


def side_by_side(panels: Mapping[str, Tensor], scale: int = 4) -> Tensor:
    """{label: frames [F, 3, H, W]} -> uint8 [F, 3, H', W'], panels left to right under their labels."""
    bar, gap = 26, 8
    columns = []
    for label, frames in panels.items():
        picture = enlarge(frames, scale)
        strip = Image.new("RGB", (picture.shape[-1], bar), PAPER)
        ImageDraw.Draw(strip).text((picture.shape[-1] / 2, bar / 2), label, fill=INK, font=font(15), anchor="mm")
        head = as_tensor(strip)[None].expand(len(picture), -1, -1, -1)
        columns += [torch.cat([head, picture], dim=2), paper(len(picture), picture.shape[-2] + bar, gap)]
    joined = torch.cat(columns[:-1], dim=3)
    even = joined.shape[-2] // 2 * 2, joined.shape[-1] // 2 * 2  # yuv420p halves both sides
    return joined[..., : even[0], : even[1]]


def contact_sheet(rows: Sequence[tuple[str, Tensor]], columns: int = 8, scale: int = 2) -> Image.Image:
    """(label, frames [F, 3, H, W]) top to bottom -> one sheet: a row per entry, time from left to right."""
    height, width = rows[0][1].shape[-2] * scale, rows[0][1].shape[-1] * scale
    margin, gap, bar, letters = 6 * scale, 2 * scale, 11 * scale, font(7 * scale)
    left = margin + max(int(letters.getlength(label)) for label, _ in rows) + margin
    sheet = Image.new(
        "RGB", (left + columns * (width + gap) + margin, bar + len(rows) * (height + gap) + margin), PAPER
    )
    draw = ImageDraw.Draw(sheet)
    for r, (label, frames) in enumerate(rows):
        times = torch.linspace(0, len(frames) - 1, columns).round().long()
        top = bar + r * (height + gap)
        draw.text((margin, top + height / 2), label, fill=INK, font=letters, anchor="lm")
        for c, picture in enumerate(enlarge(frames[times], scale)):
            sheet.paste(as_image(picture), (left + c * (width + gap), top))
            if r == 0:
                middle = left + c * (width + gap) + width / 2
                draw.text((middle, bar / 2), f"{times[c] / FPS:.2f} s", fill=QUIET, font=font(6 * scale), anchor="mm")
    return sheet


def png_bytes(image: Image.Image) -> bytes:
    """A picture as PNG in memory."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def write_image(path: Path, image: Image.Image) -> None:
    """A picture as PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(png_bytes(image))
    temporary.replace(path)


def enlarge(frames: Tensor, scale: int) -> Tensor:
    """frames [F, 3, H, W] uint8 or float in [0, 1] -> uint8 [F, 3, scale H, scale W], bilinear."""
    picture = frames.detach().cpu()
    if scale == 1 and picture.dtype == torch.uint8:
        return picture
    picture = picture.float() / 255 if picture.dtype == torch.uint8 else picture.float()
    if scale > 1:
        picture = interpolate(picture, scale_factor=scale, mode="bilinear", align_corners=False)
    return (picture.clamp(0, 1) * 255).round().byte()


def paper(num_frames: int, height: int, width: int) -> Tensor:
    """An empty strip between panels, uint8 [F, 3, height, width]."""
    return torch.tensor(PAPER, dtype=torch.uint8)[None, :, None, None].expand(num_frames, 3, height, width)


def as_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> uint8 [3, H, W]"""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def as_image(picture: Tensor) -> Image.Image:
    """uint8 [3, H, W] -> RGB picture"""
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The typeface that Pillow brings along, so that sheets look the same everywhere."""
    return ImageFont.load_default(size)
