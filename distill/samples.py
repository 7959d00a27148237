"""What the trainer shows every so often: fixed validation characters, the data above the network's own clips, and the
motion gauge - lip sync, motion per state, identity, exposure - measured on those clips.

A stage's loss says little (RESEARCH: identity rises while a character goes still); these numbers are what to stop on.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.contracts import Roles
from distill.data import dataset
from distill.evaluate import truth_of
from evaluation.bench import BenchConfig, Generate, decode, make_clips, student_sampler, teacher_sampler
from evaluation.geometry import measure
from evaluation.scores import score
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

    def __init__(self, data: Path, folder: Path | None, teacher_steps: int = 10):
        validation = dataset.load(data, "validation")
        self.codec, self.folder, self.teacher_steps = validation.codec(), folder, teacher_steps
        self.batch = batch = validation.all()
        self.truth = truth_of(batch, self.codec)
        self.tracks = [measure(self.truth.frames)]
        self.wave = validation.waves(batch.index[:1])[0][0, 24000:]  # without the 1.5 s of past

    def __call__(self, step: int, roles: Roles) -> tuple[dict[str, float], dict[str, Tensor]]:
        latents, _ = make_clips(self._generator(roles), self.batch.cond, BenchConfig())
        frames = decode(self.codec, latents)
        values = score(frames, self.truth, self.tracks)
        rows = [(name, f[i]) for i in range(3) for name, f in (("data", self.truth.frames), (f"step {step}", frames))]
        sheet = contact_sheet(rows)
        if self.folder is not None:  # in one of several processes
            write_image(self.folder / f"step_{step:06d}.png", sheet)
            write_mp4(self.folder / f"step_{step:06d}.mp4", torch.cat([self.truth.frames[0], frames[0]], -1), self.wave)
        gauges = {tag: float(values[name].nanmean()) for name, tag in GAUGES.items()}
        return gauges, {"samples/clips": torch.from_numpy(np.array(sheet))}

    def _generator(self, roles: Roles) -> Generate:
        if "refiner" in roles.models:
            return student_sampler(roles.causal("backbone"), roles.causal("refiner"))
        if "student" in roles.models:
            return student_sampler(roles.causal("student"), None)
        teacher = roles.dit("teacher")
        return teacher_sampler(teacher, BenchConfig(), self.teacher_steps, teacher.config.channels)
