"""Measure a run: every row of the table on held-out characters and speech, plus a long stream of each.

A row is a network (or the data itself) and how it is sampled. Finished rows are kept under report/rows with the hashes
of the weights and of the code that made them, so a second call measures only what is new.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.data import dataset, puppet, speech
from distill.data.batch import Batch
from distill.data.dataset import LatentDataset
from distill.data.redraw import REFERENCE_DRAWS, another_draw, reference_tracks
from distill.runs import write_json
from distill.state.lineage import sources
from distill.tracking import progress
from evaluation.bench import (
    LATENT_FPS,
    BenchConfig,
    Generate,
    decode,
    make_clips,
    student_sampler,
    student_stream,
    teacher_sampler,
    teacher_stream,
)
from evaluation.drift import Drift, measure_drift
from evaluation.scores import Truth, Values, load_values, save_values, score
from evaluation.statistics import exactly
from student.causal_dit import CausalDiT
from teacher.codec import PCACodec
from teacher.dit import DiT
from teacher.sampler import evaluations

MEASURED_BY = ("teacher", "student", "evaluation")  # packages whose code decides a score; where it changes, it is old


@dataclass(frozen=True)
class Row:
    """One row: its name, the hash of what made it, its evaluations per chunk, and how clips and streams are made."""

    name: str
    source: str
    evaluations: int
    clips: Generate | None  # None: the data itself
    stream: Callable[[], Tensor] | None  # uint8 frames [N, F, 3, S, S]


class Bench:
    """The held-out clips and streams of a data set, and everything needed to score rows on them."""

    def __init__(self, data: Path, config: BenchConfig, folder: Path):
        self.data, self.config, self.folder = data, config, folder
        self.test: LatentDataset = dataset.load(data, "test")
        self.codec: PCACodec = self.test.codec()
        rows = torch.arange(min(config.clips, len(self.test)))
        self.batch: Batch = self.test.all().select(rows)
        self.truth = truth_of(self.batch, self.codec)
        # Chance moves what one draw of idle motion amounts to by a tenth: motion is held against the mean of several.
        self.tracks = reference_tracks(self.test, self.batch, self.codec, config.seed)
        self.case, self.speak, self.listen = dataset.stream_case(data, config.stream_characters, config.stream_seconds)
        self.stream_refs, self.stream_mask = stills(self.case, self.codec), self.case.cond.ref_mask

    def measure(self, row: Row) -> tuple[Values, Drift | None]:
        """Scores of a row, from its cache where weights and settings are the same."""
        base = self.folder / row.name
        key = {
            "source": row.source,
            "bench": asdict(self.config),
            "data": self.test.fingerprint,
            "draws": REFERENCE_DRAWS,
            "code": sources(*MEASURED_BY),
        }
        if (base / "key.json").is_file() and json.loads((base / "key.json").read_text()) == key:
            return load_values(base / "values.safetensors"), self._kept_drift(base)
        base.mkdir(parents=True, exist_ok=True)
        if row.clips is None:
            latents, seconds = another_draw(self.test, self.batch, self.codec, self.config.seed), 0.0
        else:
            latents, seconds = make_clips(row.clips, self.batch.cond, self.config)
        values = score(decode(self.codec, latents), self.truth, self.tracks)
        values["evaluations_per_chunk"] = exactly(row.evaluations, len(latents))
        values["seconds_per_video_second"] = exactly(seconds, len(latents))
        drift = None
        if row.stream is not None:
            frames = row.stream()
            drift = measure_drift(frames, self.stream_refs[: len(frames)], self.stream_mask[: len(frames)], 5.0)
            values |= drift.values()
            save_values(base / "drift.safetensors", vars(drift))
        save_file({"latents": latents.half()}, base / "latents.safetensors")
        save_values(base / "values.safetensors", values)
        write_json(base / "key.json", key)
        return values, drift

    def latents(self, name: str) -> Tensor:
        """The clips that a finished row was scored on."""
        return load_file(self.folder / name / "latents.safetensors")["latents"].float()

    def test_voice(self) -> str:
        """Whose voice speaks in the test clips, for the report."""
        said = speech.corpus(self.data.parent / "speech")
        voices = {u.voice.partition("*")[0] for u in said if (u.split, u.role) == ("test", "speak")}
        return ", ".join(sorted(voices))

    def data_stream(self) -> Tensor:
        """The truth of the long streams, through the codec: what a perfect model would score."""
        characters = self.test.characters[self.case.index]
        parts = []
        for start in range(0, self.case.motion.shape[1], 240):
            frames = puppet.render(characters, self.case.motion[:, start : start + 240], self.test.size).float() / 255
            parts.append((self.codec.decode(self.codec.encode(frames)) * 255).round().to(torch.uint8))
        return torch.cat(parts, 1)

    def _kept_drift(self, base: Path) -> Drift | None:
        path = base / "drift.safetensors"
        return Drift(**load_values(path)) if path.is_file() else None


def truth_of(batch: Batch, codec: PCACodec) -> Truth:
    """What clips of this batch are held against."""
    assert batch.latents is not None
    return Truth(
        frames=decode(codec, batch.latents),
        references=stills(batch, codec),
        reference_mask=batch.cond.ref_mask,
        state=batch.state.long(),
        driven_mouth=batch.driven_mouth,
        driven_nod=batch.driven_nod,
        labels=batch.labels,
        character=batch.identity,
    )


def stills(batch: Batch, codec: PCACodec) -> Tensor:
    """Reference images as the networks get them, [N, R, 3, S, S]."""
    shape = batch.cond.refs.shape[:2]
    return codec.decode(batch.cond.refs.flatten(0, 1)[:, None])[:, 0].unflatten(0, shape)


def teacher_rows(bench: Bench, teacher: DiT, source: str, student_steps: int) -> list[Row]:
    """The teacher as it is meant to be sampled, and at the student's number of steps."""
    config, channels = bench.config, teacher.config.channels
    clip = bench.batch.cond.num_frames
    streamed = bench.case.cond.frames(0, int(config.teacher_stream_seconds * LATENT_FPS) // clip * clip)
    rows = []
    for name, steps in (("teacher", config.teacher_steps), ("teacher_few_step", student_steps)):
        generate = teacher_sampler(teacher, config, steps, channels)

        def play(generate: Generate = generate) -> Tensor:
            return teacher_stream(generate, bench.codec, streamed, config, clip)

        cost = evaluations(config.sampler, steps) * config.guidance.evaluations
        rows.append(Row(name, source, cost, generate, play))
    return rows


def student_row(bench: Bench, name: str, source: str, backbone: CausalDiT, refiner: CausalDiT | None = None) -> Row:
    """A causal student, with or without its refiner."""

    def play() -> Tensor:
        return student_stream(backbone, refiner, bench.codec, bench.case.cond, bench.config)

    return Row(name, source, len(backbone.stream.steps), student_sampler(backbone, refiner), play)


def data_row(bench: Bench) -> Row:
    """What a perfect model would score."""
    return Row("data", bench.codec.fingerprint(), 0, None, bench.data_stream)


def measure_all(
    bench: Bench, rows: list[Row], say: Callable[[str], None]
) -> tuple[dict[str, Values], dict[str, Drift]]:
    """All rows, with the time of each."""
    values: dict[str, Values] = {}
    drifts: dict[str, Drift] = {}
    for row in progress(rows, "rows of the table"):
        began = time.perf_counter()
        values[row.name], drift = bench.measure(row)
        if drift is not None:
            drifts[row.name] = drift
        shown = ", ".join(
            f"{name} {float(np.nanmean(values[row.name][name].numpy())):.3f}"
            for name in ("sync_corr", "identity_distance", "motion_ratio", "seam_ratio", "frechet_motion")
        )
        say(f"{row.name}: {shown} ({time.perf_counter() - began:.0f} s)")
    return values, drifts
