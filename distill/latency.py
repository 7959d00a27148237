"""`make latency`: how fast and how steadily the Online LPM of a run streams, next to the teacher it came from.

RUN or MODEL, HORIZON (seconds, default an hour)  ->  runs/<run>/report/latency.json and latency.html, a table
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.config import Recipe
from distill.errors import ExitCode, UserError
from distill.options import Options
from distill.roles import find_teacher, network
from distill.runs import run_folder, write_json, write_text
from distill.state.lineage import environment
from distill.streaming import load
from distill.tracking import progress
from evaluation import latency
from evaluation.bench import BenchConfig, teacher_sampler
from evaluation.latency_report import page, table
from evaluation.sound import read_audio
from student.demo import Demo, read_demo
from student.hearing import border
from student.online import OnlineLPM
from teacher.audio import log_mel
from teacher.codec import STRIDE
from teacher.conditions import PAST, SILENCE, Conditions, encode_text

PIECE = 4000  # samples pushed at once in the long run


def measure(options: Options) -> str:
    """Measure a run's export; returns the table."""
    own, run = options.own, run_folder(options.run)
    folder = Path(own["model"]) if own["model"] else run / "online-lpm"
    horizon = _horizon(own["horizon"])
    model, recipe = load(folder), options.load("stage4")
    demo = _demo(folder)
    if not demo.characters or not demo.voices:
        raise UserError(f"{folder} has no characters and recordings to stream with: run `make export` again.")
    references, text = demo.references(next(iter(demo.characters))), next(iter(demo.texts.values()), "")
    recordings = [(voice.role, torch.cat(list(read_audio(voice.file)))) for voice in demo.voices.values()]
    audio = latency.turns(recordings, PIECE)

    first = latency.first_frames(model, references, text, recordings[0][1])
    session = model.stream(references, text, look_ahead=0)
    track = latency.Track()
    for _ in progress(range(round(horizon / session.chunk_seconds)), "latency"):
        latency.step(session, audio, track)
    young = model.stream(references, text, seed=1, look_ahead=0)
    grown = {**latency.growth(track), "cpu_against_young": latency.against_young(session, young, audio)}
    told = {
        "model": str(folder),
        "scale": recipe.scale,
        "chunk_seconds": session.chunk_seconds,
        "first_frame": first,
        "horizons": latency.read_off(track, session.chunk_seconds),
        "growth": grown,
        "against_teacher": _against_teacher(recipe, run, model, references, text, recordings[0][1], audio),
        "environment": environment(),
    }
    report = run / "report"
    report.mkdir(parents=True, exist_ok=True)
    write_text(report / "latency.html", page(told, track))
    write_json(report / "latency.json", told)
    return f"{table(told)}\nWrote {report / 'latency.json'} and latency.html; next: open the page in a browser."


def _horizon(given: str) -> float:
    try:
        seconds = float(given or max(latency.HORIZONS.values()))
    except ValueError:
        raise UserError(f"HORIZON is a number of seconds, not '{given}'.") from None
    if not 10 <= seconds <= 86_400:
        raise UserError(f"HORIZON must lie between 10 seconds and a day (86400), not {given}.")
    return seconds


def _demo(folder: Path) -> Demo:
    try:
        return read_demo(folder)
    except ValueError as error:
        raise UserError(str(error), ExitCode.CHECKPOINT) from None


def _against_teacher(
    recipe: Recipe,
    run: Path,
    model: OnlineLPM,
    references: Tensor,
    text: str,
    wave: Tensor,
    audio: Iterator[tuple[Tensor, Tensor]],
) -> dict[str, Any]:
    """The comparison for one clip of the teacher's length, guided, at the full number of steps also in a quick run."""
    teacher = network(recipe.model, find_teacher(recipe, run), "ema").eval().requires_grad_(False)
    config = replace(recipe.evaluation or BenchConfig(), teacher_steps=BenchConfig().teacher_steps)
    frames = recipe.data.prepare.clip_frames // STRIDE[0]
    speak = log_mel(torch.cat([torch.zeros(border(PAST)), wave])[: border(PAST + frames)])[None]
    refs = model.codec.encode_image(references)[None]
    there = torch.ones(refs.shape[:2], dtype=torch.bool)
    cond = Conditions(speak, torch.full_like(speak, SILENCE), *encode_text([text]), refs, there)
    sample = teacher_sampler(teacher, config, config.teacher_steps, recipe.model.channels)
    found = latency.compare(model, references, text, teacher, sample, cond, audio)
    return {**found, "teacher_steps": config.teacher_steps, "guidance": {"text": config.text, "audio": config.audio}}
