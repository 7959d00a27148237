"""Real video into the same records as the puppet world: mp4 with sound in, latents and conditions out.

Pictures are brought to 24 fps by nearest time and to a centered square; sound to 16 kHz mono. Clips follow each other
without overlap, the first begins after the 1.5 s of past that the audio needs. Motion is unknown (zeros, labels -1).
paths, captions -> Records of N clips: latents [N, T, C, H, W], speak / listen [N, 8 (PAST + T), M], refs, text, ...
"""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from distill.data import timeline
from distill.data.prepare import REFERENCES, PrepareConfig, encode
from distill.data.puppet import IDENTITY, MOTION
from distill.data.records import Records, concatenate
from distill.errors import UserError
from teacher.audio import SAMPLE_RATE
from teacher.codec import PCACodec


def prepare_video(
    paths: list[Path], captions: list[str], codec: PCACodec, config: PrepareConfig, role: str = "speak"
) -> Records:
    """Records of every full clip of these videos, one identity per video.

    `role` says whether the sound is the character's own ("speak") or what it hears ("listen"); the other one is silent.
    UserError(code 3) for a video without sound, or too short for its past, one clip and a reference outside of it.
    """
    parts = []
    for number, (path, caption) in enumerate(zip(paths, captions, strict=True)):
        frames, wave = read_video(path, config.size)
        parts.append(_clips(frames, wave, path, caption, number, codec, config.clip_frames, role))
    records = concatenate(parts)
    records["index"] = torch.arange(len(records["index"]))
    return records


def read_video(path: Path, size: int) -> tuple[Tensor, Tensor]:
    """-> frames uint8 [F, 3, size, size] at 24 fps, wave [S] float32 at 16 kHz starting with frame 0."""
    pictures, times, sounds = [], [], []
    resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
    with av.open(str(path)) as container:
        if not container.streams.video or not container.streams.audio:
            raise UserError(f"video: {path} needs a picture and a sound track; mux one in (silence will do).", 3)
        for frame in container.decode(video=0, audio=0):
            if isinstance(frame, av.VideoFrame):
                times.append(frame.time)
                pictures.append(_square(frame.to_ndarray(format="rgb24"), size))
            else:
                sounds += [part.to_ndarray().reshape(-1) for part in resampler.resample(frame)]
    sounds += [part.to_ndarray().reshape(-1) for part in resampler.resample(None)]
    wanted = torch.arange(int((times[-1] - times[0]) * timeline.FPS + 1e-6) + 1) / timeline.FPS + times[0]
    nearest = (wanted[:, None] - torch.tensor(times)[None]).abs().argmin(1)
    frames = torch.stack(pictures)[nearest]  # [F, 3, size, size]
    wave = torch.from_numpy(np.concatenate(sounds)) if sounds else torch.zeros(0)
    missing = timeline.sample_at(len(frames)) - wave.numel()
    return frames, functional.pad(wave, (0, max(0, missing)))


def _square(picture: np.ndarray, size: int) -> Tensor:
    """Centered square of a picture [H, W, 3], scaled: uint8 [3, size, size]."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = torch.from_numpy(picture[top : top + side, left : left + side].copy()).permute(2, 0, 1)[None].float()
    scaled = functional.interpolate(image, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return scaled[0].round().clamp(0, 255).to(torch.uint8)


def _clips(
    frames: Tensor, wave: Tensor, path: Path, caption: str, number: int, codec: PCACodec, length: int, role: str
) -> Records:
    past = timeline.PAST_FRAMES
    starts = list(range(past, len(frames) - length + 1, length))
    if not starts:
        seconds, need = len(frames) / timeline.FPS, (past + length) / timeline.FPS
        raise UserError(f"video: {path} lasts {seconds:.1f} s, a clip and its past need {need:.1f} s.", 3)
    samples = timeline.sample_at(past + length)
    sound = torch.stack([wave[(at := timeline.sample_at(s - past)) : at + samples] for s in starts])  # [N, S]
    quiet = torch.zeros_like(sound)
    stills = torch.stack([frames[_outside(len(frames), s, length)] for s in starts])  # [N, R, 3, size, size]
    count = len(starts)
    drafts: Records = {
        "speak_wave": sound if role == "speak" else quiet,
        "listen_wave": sound if role == "listen" else quiet,
        "state": torch.full((count, length), timeline.SPEAK if role == "speak" else timeline.LISTEN, dtype=torch.uint8),
        "motion": torch.zeros(count, length, len(MOTION)),
        "driven_mouth": torch.zeros(count, length),
        "driven_nod": torch.zeros(count, length),
        "labels": torch.full((count, 3), -1),
        "identity": torch.full((count,), number),
        "index": torch.arange(count),
        "character": torch.zeros(count, len(IDENTITY)),
        "caption": [caption] * count,
        "ref_mask": torch.ones(count, REFERENCES, dtype=torch.bool),
    }
    clips = torch.stack([frames[s : s + length] for s in starts])
    return encode(drafts, codec, clips, stills, keep_waves=True)


def _outside(total: int, start: int, length: int) -> Tensor:
    """REFERENCES frame numbers spread over everything outside of the clip [start, start + length)."""
    rest = torch.cat([torch.arange(start), torch.arange(start + length, total)])
    return rest[torch.linspace(0, len(rest) - 1, REFERENCES).round().long()]
