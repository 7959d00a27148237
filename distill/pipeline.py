"""The path from nothing to an Online LPM, step by step; every step does only what is missing and says what comes next.

runs/<run>/ teacher? trajectories stage1 stage2 stage3 stage4 online-lpm report
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill import export as exporting
from distill import gates, launch
from distill.config import Recipe
from distill.data import dataset
from distill.data.prepare import prepare, read_fingerprint
from distill.embedder import ensure_embedder
from distill.engine import Engine, make_engine
from distill.engine.process import together
from distill.errors import ExitCode, UserError
from distill.evaluate import Bench, Row, data_row, measure_all, student_row, teacher_rows
from distill.options import Options
from distill.report import assemble
from distill.roles import build_roles, find_teacher, kept_teacher, network
from distill.runs import existing_run, read_status, run_folder, write_json
from distill.samples import SampleHook, TeacherClips, teacher_clips
from distill.state import checkpoint, lineage
from distill.state.lineage import Manifest
from distill.trainer import Trainer
from distill.trajectories import Trajectories, make_trajectories
from evaluation.bench import BenchConfig
from evaluation.scores import write_scores
from student.causal_dit import CausalDiT

STAGES = ("stage1", "stage2", "stage3", "stage4")
NEEDS_TRAJECTORIES = ("teacher", "renoised")  # rollout kinds


def data(options: Options) -> None:
    """Prepare the data set of the scale's recipes."""
    recipe = options.load("trajectories") if options.recipe is None else options.load(_stage_of(options))
    _refuse_foreign(recipe)
    with _timed(options, "data"):
        prepare(recipe.data.prepare, Path(recipe.data.path))
        ensure_embedder(Path(recipe.data.path))
    print(f"Wrote {recipe.data.path}; next: make distill (or make teacher, to train the teacher again).")


def train_stage(options: Options, stage: str, until: int | None = None) -> None:
    """Train one stage, from its parent's checkpoint; `until` as in Trainer.fit."""
    recipe = options.load(stage)
    if stage == "stage4" and not recipe.student.refined:
        told = f"student.steps {list(recipe.student.steps)} leaves no step for a refiner: there is no stage 4"
        if not options.several:
            raise UserError(f"{told}, go on from stage 3 with `make export`.")
        print(f"{told}.")
        return
    folder = run_folder(options.run)
    engine = make_engine(recipe.train.precision, launch.check(options.own))
    with engine.main_first():  # the others find the data made
        need_data(recipe)
    teacher = None if stage == "teacher" else find_teacher(recipe, folder)
    parent = _parent(recipe, folder, teacher, options.parent)
    forced = ""
    if read_status(folder / stage).get("status") != "done":
        forced = gates.check(recipe, parent, options.own.get("force", ""))
    source = dataset.load(Path(recipe.data.path), "train")
    trajectories = None
    if recipe.rollout is not None and recipe.rollout.kind in NEEDS_TRAJECTORIES:
        with engine.main_first():
            _need_trajectories(options, recipe.rollout.config.source, folder)
        trajectories = Trajectories(folder / "trajectories", source, recipe.student.steps)
    with together(engine, options.run, recipe, options.path(stage), parent.hash if parent else None) as run:
        if run.done:
            print(f"{run.folder} is done; next: {_next(stage)}.")
            return
        goes_on = any(run.checkpoints.glob("step_*"))
        with _timed(options, stage, goes_on) if engine.is_main else nullcontext():
            roles = build_roles(recipe, teacher, parent, Path(recipe.data.path), engine.empty)
            roles.trajectories = trajectories
            notes = {"teacher": teacher.hash if teacher else None} | ({"forced": forced} if forced else {})
            trainer = Trainer(recipe, run, roles, trajectories or source, engine, parent, notes)
            pictures = run.samples if engine.is_main else None
            final = trainer.fit(SampleHook(Path(recipe.data.path), pictures, _beside(recipe, teacher, engine)), until)
    print(f"Wrote {final}; next: {_next(stage)}.")


def distill(options: Options) -> None:
    """Trajectories and stages 1 to 4."""
    trajectories(options)
    for stage in STAGES:
        train_stage(options, stage)


def trajectories(options: Options) -> None:
    """Store the teacher's trajectories of a run."""
    folder = run_folder(options.run)
    make(options, folder, options.parent)
    print(f"Wrote {folder / 'trajectories'}; next: make distill-stage1.")


def make(options: Options, folder: Path, parent: str | None = None) -> None:
    """Sample the trajectories of the recipe's parent unless they are there; UserError when those there are others."""
    recipe = replace(options, several=True).load("trajectories")
    need_data(recipe)
    if recipe.parent in (None, "teacher"):
        origin = find_teacher(recipe, folder)
    else:
        origin = _finished(recipe, folder, parent)
    target = folder / "trajectories"
    if (target / checkpoint.MANIFEST).is_file():
        stored = lineage.read(target)
        if stored.parent_hash != origin.hash or _decides(stored.recipe) != _decides(recipe.resolved):
            raise UserError(f"{target} holds trajectories of another teacher or of other settings: take another RUN.")
        print(f"{target} is done.")
        return
    source = dataset.load(Path(recipe.data.path), "train")
    print(f"trajectories: {recipe.trajectories.count} clips of the teacher {origin.path}", flush=True)
    with _timed(options, "trajectories"):
        dit = network(recipe.model, origin, "ema").eval()
        model = dit if origin.stage == "teacher" else CausalDiT(dit, recipe.student)
        make_trajectories(recipe, model, origin, source, target)


def _decides(resolved: dict[str, Any]) -> list[Any]:
    """What of a recipe the trajectories hang on, besides their teacher."""
    return [resolved.get("trajectories"), resolved.get("student", {}).get("steps"), resolved.get("seed")]


def export(options: Options) -> None:
    """Gather backbone, refiner and codec."""
    recipe, folder = options.load("stage4"), run_folder(options.run)
    refiner = None
    if recipe.student.refined:
        refiner = lineage.find_parent(folder, "stage4", recipe.scale, options.parent)
    backbone = lineage.find_parent(folder, "stage3", recipe.scale, None if refiner else options.parent)
    if refiner is not None:
        lineage.require(backbone, hash=refiner.parent_hash)
    target = folder / "online-lpm"
    if (target / checkpoint.MANIFEST).is_file() and (target / "demo.json").is_file():
        if lineage.read(target).parent_hash == (refiner or backbone).hash:
            print(f"{target} is done; next: make evaluate.")
            return
    with _timed(options, "export"):
        exporting.export(recipe, backbone, refiner, dataset.load_codec(Path(recipe.data.path)), target)
    print(f"Wrote {target}; next: make evaluate.")


def keep(options: Options) -> None:
    """Put the teacher trained in this run where the repository keeps one."""
    recipe, folder = options.load("teacher"), run_folder(options.run)
    trained = lineage.find_parent(folder, "teacher", recipe.scale, options.parent)
    target = exporting.keep_teacher(trained, dataset.load_codec(Path(recipe.data.path)), kept_teacher(recipe.scale))
    print(f"Wrote {target}; next: make data, then make distill.")


def evaluate(options: Options) -> None:
    """Measure every row that the run has, and write scores and report."""
    recipe, folder = options.load("stage4"), existing_run(options.run)
    need_data(recipe)
    setup = Path(sys.prefix) / ".setup_seconds"  # written by the Makefile
    with _timed(options, "evaluation"):
        bench = Bench(Path(recipe.data.path), recipe.evaluation or BenchConfig(), folder / "report" / "rows")
        values, _ = measure_all(bench, _rows(bench, recipe, folder), print)
    about = {
        "quick": options.variant is not None,
        "clips": len(bench.batch),
        "characters": len(set(bench.batch.identity.tolist())),
        "voice": bench.test_voice(),
        "stream_seconds": bench.config.stream_seconds,
    }
    timings = {"setup": float(setup.read_text())} if setup.is_file() else {}
    write_scores(folder / "report" / "scores.json", values, timings | _timings(folder), about)
    exporting.refresh_card(recipe, folder)
    report(options)


def report(options: Options) -> None:
    """Write the report from the kept rows."""
    recipe, folder = options.load("stage4"), existing_run(options.run)
    bench = Bench(Path(recipe.data.path), recipe.evaluation or BenchConfig(), folder / "report" / "rows")
    page = assemble(folder, bench)
    print(f"Wrote {page}; next: open it in a browser.")


def online_lpm(options: Options) -> None:
    """Everything, in order."""
    began = time.perf_counter()
    data(options)
    recipe = options.load("stage1")
    folder = run_folder(options.run)
    trained = read_status(folder / "teacher").get("status") == "done"
    if recipe.teacher == "kept" and not trained and not kept_teacher(recipe.scale).is_dir():
        print("There is no kept teacher: training one first.", flush=True)
        train_stage(options, "teacher")
    origin = find_teacher(recipe, folder)
    print(f"teacher: {origin.path} ({origin.hash[:12]})", flush=True)
    for stage in STAGES:
        train_stage(options, stage)
    export(options)
    evaluate(options)
    print(f"online-lpm: {(time.perf_counter() - began) / 60:.1f} minutes in this call.")


# ---- pieces -----------------------------------------------------------------------------------------------


def _rows(bench: Bench, recipe: Recipe, folder: Path) -> list[Row]:
    """Data, teacher, few-step teacher, untrained student, and every stage that the run has."""
    origin = find_teacher(recipe, folder)
    teacher = network(replace(recipe.model, flow_map=False), origin, "ema").eval()
    rows = [data_row(bench), *teacher_rows(bench, teacher, origin.hash, len(recipe.student.steps))]
    rows.append(student_row(bench, "undistilled", origin.hash, CausalDiT(teacher, recipe.student)))
    nets: dict[str, CausalDiT] = {}
    for stage in STAGES:
        if not (folder / stage / "checkpoints").is_dir():
            continue
        manifest = lineage.find_parent(folder, stage, recipe.scale)
        nets[stage] = CausalDiT(network(recipe.model, manifest, "ema").eval(), recipe.student)
        pair = (nets["stage3"], nets[stage]) if stage == "stage4" else (nets[stage],)
        rows.append(student_row(bench, stage, manifest.hash, *pair))
    target = folder / "online-lpm"
    if (target / checkpoint.MANIFEST).is_file():
        from student.online import OnlineLPM

        online = OnlineLPM.from_pretrained(target)
        rows.append(student_row(bench, "online_lpm", online.fingerprint(), online.backbone, online.refiner))
    return rows


def _beside(recipe: Recipe, teacher: Manifest | None, engine: Engine) -> TeacherClips | None:
    """Where the teacher's clips are that stand beside a student's; rank 0 says for all whether they are there."""
    if teacher is None:
        return None
    data = Path(recipe.data.path)
    path = teacher_clips(data, read_fingerprint(data)["fingerprint"], teacher.hash)
    return TeacherClips(path, engine.from_main(path.is_file()))


def _parent(recipe: Recipe, folder: Path, teacher: Manifest | None, override: str | None) -> Manifest | None:
    if recipe.parent is None:
        return None
    if recipe.parent == "teacher" and override is None:
        return teacher
    return _finished(recipe, folder, override)


def _finished(recipe: Recipe, folder: Path, override: str | None) -> Manifest:
    """The parent in this run, which must have been trained to its end, or the one that PARENT names."""
    assert recipe.parent is not None
    manifest = lineage.find_parent(folder, recipe.parent, recipe.scale, override)
    status = read_status(folder / recipe.parent)
    if override is None and status.get("status") != "done":
        raise UserError(
            f"{folder / recipe.parent} is not finished (step {status.get('step', 0)}): run `{_make(recipe.parent)}` to "
            f"its end, or take it as it is with PARENT={manifest.path}."
        )
    return manifest


def _need_trajectories(options: Options, wanted: str, folder: Path) -> None:
    """Make the teacher's trajectories where there are none; UserError when those there are another network's."""
    stored = folder / "trajectories"
    there = (stored / checkpoint.MANIFEST).is_file()
    if not there and wanted == "teacher":
        make(options, folder)
        return
    made_by = lineage.read(stored).recipe.get("parent") or "teacher" if there else "nobody"
    if made_by != wanted:
        raise UserError(
            f"{stored} holds trajectories of {made_by} but rollout.source is {wanted}: run `make trajectories` with a "
            f"RECIPE whose parent is {wanted}{', in another RUN' if there else ''}."
        )


def need_data(recipe: Recipe) -> None:
    """Prepare the recipe's data set and its identity embedder unless they are there."""
    prepare_once = Path(recipe.data.path)
    if not (prepare_once / "fingerprint.json").is_file():
        _refuse_foreign(recipe)
        print(f"{prepare_once} is missing: preparing it first.", flush=True)
        prepare(recipe.data.prepare, prepare_once)
    ensure_embedder(prepare_once)


def _refuse_foreign(recipe: Recipe) -> None:
    """Clips with a `data.clip` block come from a codec and a text encoder that this toolkit does not hold."""
    if recipe.data.clip is not None:
        raise UserError(
            f"{recipe.data.path} holds no clips and `make data` cannot make them: such latents come from a video codec "
            "and a text encoder outside this toolkit, docs/GPU.md says in which form they are read.",
            ExitCode.DATA,
        )


def _stage_of(options: Options) -> str:
    from distill.config import read

    assert options.recipe is not None
    return str(read(options.recipe).data.get("stage"))


def _make(stage: str) -> str:
    return f"make distill-{stage}" if stage.startswith("stage") else f"make {stage}"


def _next(stage: str) -> str:
    after = {
        "teacher": "make distill-stage1",
        "ar-teacher": "make trajectories with a RECIPE whose parent is ar-teacher",
        "stage4": "make export",
    }
    return after.get(stage) or f"make distill-stage{int(stage[-1]) + 1}"


@contextmanager
def _timed(options: Options, part: str, goes_on: bool = True) -> Iterator[None]:
    """Add the seconds of a part to runs/<run>/timings.json; one that begins anew (`goes_on` false) starts at 0."""
    began = time.perf_counter()
    try:
        yield
    finally:
        folder = run_folder(options.run)
        folder.mkdir(parents=True, exist_ok=True)
        timings = _timings(folder)
        timings[part] = (timings.get(part, 0.0) if goes_on else 0.0) + time.perf_counter() - began
        write_json(folder / "timings.json", timings)


def _timings(folder: Path) -> dict[str, float]:
    path = folder / "timings.json"
    return json.loads(path.read_text()) if path.is_file() else {}
