"""`make drift RUN=... MINUTES=10`: does the character stay who it is, and stay alive, for many minutes?

Streams of held-out characters in which one utterance keeps returning, measured at its returns and thrown away; the
controls that say whether the measure can be trusted; time and memory of one long session.
RUN, MINUTES, CHARACTERS, BASELINE, MODEL  ->  runs/<run>/report/drift.json and drift.html
A grid as RUN: the same for every cell that is done, for `make compare`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.config import Recipe, load
from distill.data import dataset, puppet, speech
from distill.data.dataset import LatentDataset
from distill.data.prepare import by_state
from distill.data.recurrent import Plan, people
from distill.data.timeline import FPS, LISTEN, SPEAK
from distill.data.version import source_hash
from distill.drift_keep import Keeper
from distill.drift_rows import INJECTED, Source, controls, on_the_way, sampled, streamed
from distill.errors import UserError
from distill.judge import ensure_judge
from distill.options import Options
from distill.progress import STATE, done_cells
from distill.roles import find_teacher, network
from distill.runs import RESOLVED, existing_run, run_folder, write_json, write_text
from distill.score import STUDENTS, last_stage, students
from distill.state.lineage import environment
from distill.streaming import load as load_online
from distill.tracking import progress
from evaluation import aging, latency, motion, recurrence, residual, sync
from evaluation.bench import BenchConfig, teacher_sampler
from evaluation.drift_page import page, table
from evaluation.drift_report import headline, recovery, row_facts, shuffled_row
from evaluation.geometry import measure
from evaluation.recurrence import Layout, Truth, identity_windows, measure_row
from evaluation.scores import without_nan
from evaluation.windows import Windows, anchor_of, as_float
from student.causal_dit import CausalDiT
from student.online import OnlineLPM
from teacher.codec import STRIDE, PCACodec

CODE = (recurrence, residual, motion, sync)  # what makes figures of windows
PIECE = 4000  # samples pushed at once in the long session
SIZES = {"": (10.0, 24), "quick": (2.0, 8), "smoke": (1.0, 2)}  # minutes, characters
TEACHER, UNTRAINED, ONLINE = "teacher", "undistilled", "online_lpm"
TEXT = "a calm person, looking ahead, head straight"


@dataclass(frozen=True)
class Subject:
    """What is measured: its name in the table, a hash of its weights, its networks."""

    name: str
    source: str
    backbone: CausalDiT
    refiner: CausalDiT | None
    recipe: Recipe


def drift(options: Options) -> str:
    """Measure a run's export, its last stage, or what STAGE or MODEL names, or every cell of a grid; returns the
    tables."""
    run = run_folder(options.run)
    if not (run / STATE).is_file():
        text = measure_run(options)
        return f"{text}\nWrote {run}/report/drift.json and drift.html; next: open the page in a browser."
    cells = [f"{cell}-seed{seed}" for cell, seed in done_cells(run)]
    own = {**options.own, "age": options.own["age"] or "0"}  # the weights of a cell do not make a chunk slower
    for name in cells:
        print(f"{name}\n{measure_run(replace(options, run=f'{options.run}/{name}', own=own))}", flush=True)
    return f"Wrote report/drift.json of {len(cells)} cells in {run}; next: make compare RUNS={options.run}."


def measure_run(options: Options) -> str:
    """One run; returns its table."""
    run = run_folder(options.run)
    minutes, count = _sizes(options)
    subject = find(options, run, options.own["stage"])
    test = dataset.load(Path(subject.recipe.data.path), "test")
    config = subject.recipe.evaluation or BenchConfig()
    plan = Plan(minutes=minutes, seed=config.seed)
    size = subject.backbone.stream.chunk_frames * STRIDE[0]
    sources = [_streamed(subject, test.codec(), plan), *_baselines(options, run, subject, test, config)]
    judge = ensure_judge(test.folder)
    rows = _share(people(test, count), options.own["shares"], subject.recipe.seed)
    keeper = Keeper(test, rows, plan, judge, run / "report")
    aged = _aged(subject, test, run / "report") if options.own["age"] != "0" and not options.smoke else {}
    held = keeper.measure(controls(test, plan, size), beside_data=True)
    facts = _facts(keeper, subject, keeper.measure(sources), held, aged)
    report = run / "report"
    report.mkdir(parents=True, exist_ok=True)
    write_json(report / "drift.json", without_nan(facts))
    write_text(report / "drift.html", page(without_nan(facts)))
    return table(without_nan(facts))


def find(options: Options, run: Path, stage: str) -> Subject:
    """The networks that MODEL, STAGE or the run itself name."""
    folder = Path(options.own["model"]) if options.own["model"] else run / "online-lpm"
    if options.own["model"] or stage == ONLINE or (not stage and folder.is_dir()):
        online = load_online(folder)
        return Subject(ONLINE, online.fingerprint(), online.backbone, online.refiner, options.load("stage4"))
    if stage == UNTRAINED:
        recipe = options.load("stage3")
        teacher = find_teacher(recipe, run)
        made = network(replace(recipe.model, flow_map=False), teacher, "ema").eval().requires_grad_(False)
        return Subject(UNTRAINED, teacher.hash, CausalDiT(made, recipe.student), None, recipe)
    stage = stage or last_stage(existing_run(options.run))
    if stage not in STUDENTS or not (run / stage / RESOLVED).is_file():
        raise UserError(f"{run} has no stage '{stage}': STAGE is {', '.join((*STUDENTS, ONLINE))} or {UNTRAINED}.")
    recipe = load(run / stage / RESOLVED, options.overrides)
    hash, nets = students(run, stage, recipe)
    return Subject(stage, hash, nets[0], nets[1] if len(nets) > 1 else None, recipe)


def _streamed(subject: Subject, codec: PCACodec, plan: Plan) -> Source:
    return streamed(subject.name, subject.source, subject.backbone, subject.refiner, codec, plan.seed)


def _baselines(options: Options, run: Path, subject: Subject, test: LatentDataset, config: BenchConfig) -> list[Source]:
    """Rows beside the subject: BASELINE="teacher undistilled stage2"."""
    out, codec, seed = [], test.codec(), config.seed
    for name in options.own["baseline"].split():
        if name == subject.name:
            continue
        if name != TEACHER:
            other = find(replace(options, own={**options.own, "model": ""}), run, name)
            out.append(streamed(name, other.source, other.backbone, other.refiner, codec, seed))
            continue
        origin = find_teacher(subject.recipe, run)
        made = network(replace(subject.recipe.model, flow_map=False), origin, "ema").eval().requires_grad_(False)
        generate = teacher_sampler(made, config, config.teacher_steps, subject.recipe.model.channels)
        clip = subject.recipe.data.prepare.clip_frames // STRIDE[0]
        told = json.dumps([origin.hash, config.teacher_steps, config.sampler, config.shift, config.text, config.audio])
        out.append(sampled(TEACHER, told, generate, codec, clip, seed))
    return out


def _facts(
    keeper: Keeper, subject: Subject, rows: dict[str, Windows], held: dict[str, Windows], aged: dict[str, Any]
) -> dict[str, Any]:
    """drift.json."""
    plan, judge, test = keeper.plan, keeper.judge, keeper.dataset
    layout = layout_of(plan, subject.recipe.data.prepare.clip_frames)
    batch = test.all().select(keeper.rows)
    anchors = [anchor_of(*keeper.references(number), judge) for number in range(len(keeper.groups))]
    anchor = type(anchors[0])(*(torch.cat([getattr(a, part) for a in anchors]) for part in ("identity", "face")))
    limits = {"identity": judge.about["geometry"]["threshold"], "judge": judge.about["judge"]["threshold"]}
    truth = Truth(*keeper.driven(), anchor, held["codec"], limits)
    measured = {name: measure_row(windows, layout, truth) for name, windows in (rows | held).items()}
    measured["shuffled"] = shuffled_row(measured[subject.name], plan.seed)
    measured["injected shuffled"] = shuffled_row(measured["injected"], plan.seed)
    expected = injected_distance(test, keeper.rows, held["truth"], anchor.identity, layout)
    table_rows = {name: row_facts(row, layout) for name, row in measured.items()}
    return {
        **headline(table_rows[subject.name], aged),
        "subject": subject.name,
        "weights": subject.source,
        "characters": len(keeper.rows),
        "identities": batch.identity.tolist(),
        "measured_by": f"{keeper.measured_by}-{source_hash(CODE)[:8]}",
        "settings": {
            **asdict(plan),
            "split": test.split,
            "data": test.fingerprint,
            "returns": plan.returns,
            "measured": {name: list(span) for name, span in plan.parts().items()},
            "measured_share": sum(b - a for a, b in plan.spans()) / plan.frames,
            "stream": asdict(subject.backbone.stream),
            "injected_per_min": INJECTED,
            "scale": subject.recipe.scale,
        },
        "judge": judge.about,
        "recovery": recovery(measured["injected"], expected, layout),
        "rows": table_rows,
        "aging": aged,
        "cost": {
            name: dict(zip(("seconds", "cpu_seconds", "windows"), values, strict=True))
            for name, values in keeper.seconds.items()
        },
        "environment": environment(),
    }


def layout_of(plan: Plan, clip: int = 48) -> Layout:
    """Where the plan's windows lie in what is kept of a stream."""
    at, parts = 0, {}
    for name, (start, stop) in plan.parts().items():
        parts[name] = slice(at, at := at + stop - start)
    middles = torch.tensor([(a + b) / 2 / FPS / 60 for a, b in plan.spans()], dtype=torch.float64)
    return Layout(parts, middles.unflatten(0, (plan.returns, len(parts))), plan.minutes, clip)


def injected_distance(test: LatentDataset, rows: Tensor, truth: Windows, anchor: Tensor, layout: Layout) -> Tensor:
    """The identity distance that the injected drift must show [N, R]: the undrifted windows moved by what the renderer
    says that the parameters alone change, in pictures at rest."""
    share = INJECTED * torch.cat([torch.zeros(1), layout.minutes.flatten().float()])  # the start comes first
    on = on_the_way(test, rows, share)  # [N, 1 + R P, D]
    rest = torch.zeros(on.shape[0] * on.shape[1], 1, len(puppet.MOTION))
    pictures = as_float(puppet.render(on.flatten(0, 1), rest, test.size))
    seen = torch.cat([measure(part).identity[:, 0] for part in pictures.split(256)]).unflatten(0, on.shape[:2])
    change = (seen[:, 1:] - seen[:, :1]).unflatten(1, layout.minutes.shape)  # [N, R, P, D]
    lengths = torch.tensor([(part.stop - part.start) // 12 for part in layout.parts.values()])
    return identity_windows(truth.identity + change.repeat_interleave(lengths, 2), anchor, layout).mean(2)


def _aged(subject: Subject, test: LatentDataset, report: Path) -> dict[str, Any]:
    """Time and memory of one session at chunk 100 and at chunk 10,000, kept by the weights."""
    path = report / "drift" / "aging.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if kept.get("weights") == subject.source:
        return kept
    model = OnlineLPM(subject.backbone, subject.refiner, test.codec())
    said = by_state(speech.corpus(test.folder.parent / "speech"), test.split)
    pairs = zip(said[SPEAK], said[LISTEN], strict=False)  # as many turns of each as the shorter list has
    recordings = [turn for a, b in pairs for turn in (("speak", a.wave), ("listen", b.wave))]
    references = test.codec().decode(test.all().cond.refs[0, :1][:, None])[:, 0]
    audio = latency.turns(recordings, PIECE)
    found = aging.age(model, references, TEXT, audio, lambda chunks: progress(chunks, "one long session"))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"weights": subject.source, **found})
    return {"weights": subject.source, **found}


def _share(rows: Tensor, shares: str, seed: int) -> Tensor:
    """SHARES=3: of the characters only the third that is the seed's, so that three seeds stream them once together."""
    if not shares:
        return rows
    if not shares.isdigit() or not 1 <= int(shares) <= len(rows) // 2:
        raise UserError(f"SHARES must be a number from 1 to {len(rows) // 2}, two characters in each, not {shares}.")
    return rows.tensor_split(int(shares))[seed % int(shares)]


def _sizes(options: Options) -> tuple[float, int]:
    """MINUTES and CHARACTERS."""
    usual = SIZES[options.variant or ""]
    try:
        minutes = float(options.own["minutes"] or usual[0])
        count = int(options.own["characters"] or usual[1])
    except ValueError:
        raise UserError("MINUTES and CHARACTERS are numbers: make drift RUN=tiny MINUTES=10 CHARACTERS=24.") from None
    if not 1 <= minutes <= 240 or minutes * 2 % 1:
        raise UserError(f"MINUTES must be whole or half and lie between 1 and 240, not {minutes:g}.")
    if count < 2:
        raise UserError(f"CHARACTERS must be at least 2, not {count}: intervals come from how characters differ.")
    return minutes, count
