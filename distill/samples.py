"""What the trainer shows every so often: fixed validation characters, the data and the teacher above the network's own
clips, and the gauges - lip sync, motion per state, identity, color, chunk jumps - measured on those clips.

A stage's loss says little (RESEARCH: identity rises while a character goes still); these numbers are what to stop on.
The teacher plays the same characters to the same audio, from the same seed. Its clips are made once for a teacher and
a data set, kept beside the data, and what it scores there is the yardstick of `..._of_teacher`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.contracts import Roles
from distill.data import dataset
from distill.data.batch import Batch, keyed_generator
from distill.evaluate import truth_of
from evaluation.bench import BenchConfig, Generate, decode, make_clips, student_sampler, teacher_sampler
from evaluation.geometry import measure
from evaluation.quality import color_drift, color_shift, contrast_ratio
from evaluation.scores import Values, score
from evaluation.video import contact_sheet, write_image, write_mp4
from teacher.flow import add_noise, x0_from_v

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
    "contrast": "health/contrast",
    "exposure": "health/exposure",
    "chroma": "health/chroma",
    "drift": "health/drift",
}
OF_TEACHER = ("sync_corr", "identity_distance", "motion_ratio", "motion_speak", "motion_listen", "motion_silence")
SHOWN = 3  # characters in a strip
TEACHER_STEPS = 10  # Euler


@dataclass(frozen=True)
class TeacherClips:
    """Where the teacher's clips are kept; `known`: they were there when the run began."""

    path: Path
    known: bool


def teacher_clips(data: Path, fingerprint: str, teacher_hash: str) -> Path:
    """Where the clips of this teacher on this data set are kept."""
    bench = BenchConfig()
    facts = (teacher_hash, fingerprint, TEACHER_STEPS, bench.seed, bench.guidance)
    return data / f"teacher-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.safetensors"


class SampleHook:
    """Called by the trainer with the step and the roles (averaged weights) -> gauges; writes a strip and an mp4."""

    def __init__(self, data: Path, folder: Path | None, clips: TeacherClips | None = None):
        """folder: where pictures go, None where none are written. clips: None where no teacher stands beside."""
        validation = dataset.load(data, "validation")
        self.codec, self.folder, self.clips = validation.codec(), folder, clips
        self.batch = batch = validation.all()
        self.truth = truth_of(batch, self.codec)
        self.tracks = [measure(self.truth.frames)]
        self.wave = validation.waves(batch.index[:1])[0][0, 24000:]  # without the 1.5 s of past
        self.beside: tuple[Tensor, Values] | None = None  # the teacher's frames and what they score

    def __call__(self, step: int, roles: Roles) -> tuple[dict[str, float], dict[str, Tensor]]:
        latents, _ = make_clips(self._generator(roles), self.batch.cond, BenchConfig())
        frames = decode(self.codec, latents)
        values = self._score(frames)
        gauges = {tag: float(values[name].nanmean()) for name, tag in GAUGES.items()}
        panels = {"data": self.truth.frames}
        # Of several processes the others take part only where the teacher's clips are still to be made.
        if self.clips is not None and (self.folder is not None or not self.clips.known):
            self.beside = self.beside or self._teacher(roles, self.clips)
            panels["teacher"], reference = self.beside
            for name in OF_TEACHER:
                gauges[f"{GAUGES[name]}_of_teacher"] = gauges[GAUGES[name]] / float(reference[name].nanmean())
        if "teacher" in roles.models and len(roles.models) > 1:
            gauges["health/one_step"] = one_step_error(roles, self.batch)
        panels[f"step {step}"] = frames
        sheet = contact_sheet([(name, f[i]) for i in range(SHOWN) for name, f in panels.items()])
        if self.folder is not None:  # in one of several processes
            write_image(self.folder / f"step_{step:06d}.png", sheet)
            film = torch.cat([f[0] for f in panels.values()], -1)
            write_mp4(self.folder / f"step_{step:06d}.mp4", film, self.wave)
        return gauges, {"samples/clips": torch.from_numpy(np.array(sheet))}

    def _score(self, frames: Tensor) -> Values:
        data = self.truth.frames
        values = score(frames, self.truth, self.tracks)
        values["contrast"] = contrast_ratio(frames, data)
        values["exposure"], values["chroma"] = color_shift(frames, data)
        values["drift"] = color_drift(frames) - color_drift(data)
        return values

    def _teacher(self, roles: Roles, clips: TeacherClips) -> tuple[Tensor, Values]:
        if clips.known:
            latents = load_file(clips.path)["latents"]
        else:
            teacher = roles.dit("teacher")
            generate = teacher_sampler(teacher, BenchConfig(), TEACHER_STEPS, teacher.config.channels)
            latents, _ = make_clips(generate, self.batch.cond, BenchConfig())
            if self.folder is not None:
                temporary = clips.path.with_name(f".{clips.path.name}.partial")
                save_file({"latents": latents.contiguous()}, temporary)
                temporary.replace(clips.path)
        frames = decode(self.codec, latents)
        return frames, self._score(frames)

    def _generator(self, roles: Roles) -> Generate:
        if "refiner" in roles.models:
            return student_sampler(roles.causal("backbone"), roles.causal("refiner"))
        if "student" in roles.models:
            return student_sampler(roles.causal("student"), None)
        teacher = roles.dit("teacher")
        return teacher_sampler(teacher, BenchConfig(), TEACHER_STEPS, teacher.config.channels)


@torch.no_grad()
def one_step_error(roles: Roles, batch: Batch) -> float:
    """Error of one evaluation at the last step time under the clips' own clean past, root mean square over the spread
    of the data: what a few-step student must have learned first."""
    network = roles.causal("refiner" if "refiner" in roles.models else "student")
    device = next(network.parameters()).device
    assert batch.latents is not None
    # What a stream sees at once: with fewer chunks in sight than a clip has, its beginning.
    seen = min(batch.latents.shape[1], roles.stream.visible_chunks * roles.stream.chunk_frames)
    errors = []
    for rows in torch.arange(len(batch)).split(BenchConfig().batch_size):
        x0, cond = batch.latents[rows, :seen].to(device), batch.cond.select(rows).frames(0, seen).to(device)
        noise = torch.randn(x0.shape, generator=keyed_generator("one step", int(rows[0]))).to(device)
        t = torch.full((len(x0),), roles.stream.steps[-1], dtype=torch.float64, device=device)
        xt = add_noise(x0, noise, t)
        v = network(xt, t, cond, x0, torch.zeros_like(t))
        errors.append((x0_from_v(xt, v, t) - x0).square().flatten(1).mean(1))
    return float(torch.cat(errors).mean().sqrt() / batch.latents.std())
