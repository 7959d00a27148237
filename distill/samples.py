"""What the trainer shows every so often: fixed validation characters, the data above the network's own clips, and the
motion gauge - lip sync, motion per state, identity, exposure - measured on those clips.

A stage's loss says little (RESEARCH: identity rises while a character goes still); these numbers are what to stop on.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from distill.contracts import Roles
from distill.data import dataset
from evaluation.bench import BenchConfig, Generate, decode, make_clips, student_sampler, teacher_sampler
from evaluation.geometry import measure
from evaluation.scores import Truth, score
from evaluation.video import contact_sheet, write_image, write_mp4

GAUGES = {
    "sync_corr": "health/sync",
    "identity_distance": "health/identity",
    "motion_ratio": "health/motion",
    "motion_speak": "health/motion_speak",
    "motion_listen": "health/motion_listen",
    "motion_silence": "health/motion_silence",
    "mouth_amplitude": "health/mouth_amplitude",
    "seam_ratio": "health/seam",
    "sharpness_ratio": "health/sharpness",
    "nod_corr": "health/nod",
    "text_accuracy": "health/text",
}


class SampleHook:
    """Called by the trainer with the step and the roles (averaged weights) -> gauges; writes a strip and an mp4."""

    def __init__(self, data: Path, folder: Path, teacher_steps: int = 10):
        validation = dataset.load(data, "validation")
        self.batch, self.codec, self.folder, self.teacher_steps = validation.all(), validation.codec(), folder, teacher_steps
        batch = self.batch
        assert batch.latents is not None
        stills = self.codec.decode(batch.cond.refs.flatten(0, 1)[:, None])[:, 0]
        self.truth = Truth(
            frames=decode(self.codec, batch.latents),
            references=stills.unflatten(0, batch.cond.refs.shape[:2]),
            reference_mask=batch.cond.ref_mask,
            state=batch.state.long(),
            driven_mouth=batch.driven_mouth,
            driven_nod=batch.driven_nod,
            labels=batch.labels,
            character=batch.identity,
        )
        self.tracks = measure(self.truth.frames)
        self.wave = validation.waves(batch.index[:1])[0][0, 24000:]  # without the 1.5 s of past

    def __call__(self, step: int, roles: Roles) -> dict[str, float]:
        latents, _ = make_clips(self._generator(roles), self.batch.cond, BenchConfig())
        frames = decode(self.codec, latents)
        values = score(frames, self.truth, self.tracks)
        rows = [(name, f[i]) for i in range(3) for name, f in (("data", self.truth.frames), (f"step {step}", frames))]
        write_image(self.folder / f"step_{step:06d}.png", contact_sheet(rows))
        write_mp4(self.folder / f"step_{step:06d}.mp4", torch.cat([self.truth.frames[0], frames[0]], -1), self.wave)
        return {tag: float(np.nanmean(values[name].numpy())) for name, tag in GAUGES.items()}

    def _generator(self, roles: Roles) -> Generate:
        if "refiner" in roles.models:
            return student_sampler(roles.causal("backbone"), roles.causal("refiner"))
        if "student" in roles.models:
            return student_sampler(roles.causal("student"), None)
        teacher = roles.dit("teacher")
        return teacher_sampler(teacher, BenchConfig(), self.teacher_steps, teacher.config.channels)


def gauge_line(gauges: dict[str, float]) -> str:
    """One line for the log."""
    return ", ".join(f"{name.removeprefix('health/')} {value:.3f}" for name, value in gauges.items())

