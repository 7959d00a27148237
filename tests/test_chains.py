"""Whole chains of stages on small networks and data: every number of steps, the autoregressive teacher, a flow map."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_resume import DATA, gauge, make_data

from distill import pipeline
from distill.config import load
from distill.errors import UserError
from distill.options import Options
from distill.roles import build_roles
from distill.state import checkpoint, lineage
from student.fast import FastDiT
from student.online import OnlineLPM
from teacher.conditions import AUDIO_PER_LATENT, PAST, TEXT_DIM, TEXT_LENGTH, Conditions

AR_TEACHER = """
parent: teacher
rollout: {kind: data}
phases: [{update: student, terms: {causal_flow_matching: {drop_text: 0.3, drop_audio: 0.3}}}]
"""
pytestmark = pytest.mark.timeout(600)  # seconds by itself, minutes beside a training that has the cores

SHORT = ("train.steps=2", "train.batch_size=2", "optimizer.warmup_steps=1", "teacher=runs/origin/teacher")


@pytest.fixture(scope="module")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small data, the recipes of a chain, and a trained teacher in the run `origin`."""
    root = tmp_path_factory.mktemp("chains")
    make_data(root)
    folder = root / "whole"
    text = f"extends: base.yaml\nname: ar-teacher\nstage: ar-teacher\n{AR_TEACHER}"
    (folder / "recipes" / "tiny" / "ar-teacher.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(pipeline, "SampleHook", lambda *_: gauge)
        pipeline.train_stage(Options(run="origin", overrides=SHORT[:3]), "teacher")
    return folder


@pytest.fixture(autouse=True)
def inside(small_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small_world)
    monkeypatch.setattr(pipeline, "SampleHook", lambda *_: gauge)


def options(run: str, *overrides: str, recipe: Path | None = None) -> Options:
    return Options(recipe=recipe, run=run, overrides=(*SHORT, *overrides))


def variant(name: str, stage: str, text: str) -> Path:
    """A recipe that extends the one of its stage, beside it."""
    path = Path("recipes/tiny/alternatives") / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"extends: ../{stage}.yaml\nname: {name}\n{text}\n")
    return path


def told(frames: int) -> Conditions:
    audio = torch.randn(1, AUDIO_PER_LATENT * (PAST + frames), 32, generator=torch.Generator().manual_seed(1))
    text = torch.zeros(1, TEXT_LENGTH, TEXT_DIM)
    refs = torch.randn(1, 2, DATA.channels, 4, 4, generator=torch.Generator().manual_seed(2))
    return Conditions(audio, audio, text, text[..., 0] > 0, refs, torch.ones(1, 2, dtype=torch.bool))


@pytest.mark.parametrize("steps", [[1.0], [1.0, 0.5], [1.0, 0.8, 0.45], [1.0, 0.9, 0.7, 0.4]], ids=len)
def test_a_student_of_any_number_of_steps_goes_through_every_stage_to_a_stream(
    steps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = options(f"steps{len(steps)}", f"student.steps={steps}")
    pipeline.distill(replace(run, several=True))
    made = [path.name for path in Path("runs", run.run).iterdir() if path.name.startswith("stage")]
    stages = pipeline.STAGES[: 3 + (len(steps) > 1)]
    assert sorted(made) == sorted(stages)
    stored = load_file(Path("runs") / run.run / "trajectories" / checkpoint.TENSORS)
    assert stored["times"].tolist() == [*steps, 0.0] and stored["states"].shape[1] == len(steps) + 1
    if len(steps) == 1:
        with pytest.raises(UserError, match=r"student.steps \[1.0\] leaves no step for a refiner"):
            pipeline.train_stage(run, "stage4")
    pipeline.export(run)
    folder = Path("runs") / run.run / "online-lpm"
    assert lineage.read(folder).parent_hash == lineage.read(Path("runs") / run.run / stages[-1]).hash
    online, asked = OnlineLPM.from_pretrained(folder), []
    velocity = FastDiT.velocity

    def spy(self: FastDiT, xt, t, cond, cache, r=None):
        asked.append((self.model is online.refiner, float(t[0])))
        return velocity(self, xt, t, cond, cache, r)

    monkeypatch.setattr(FastDiT, "velocity", spy)
    chunks = list(online.latents(told(4), torch.Generator().manual_seed(0)))
    assert [chunk.shape[1] for chunk in chunks] == [2, 2] and all(chunk.isfinite().all() for chunk in chunks)
    assert asked == 2 * [(len(steps) > 1 and t == steps[-1], t) for t in steps]


def test_a_chain_through_an_autoregressive_teacher_keeps_its_lineage() -> None:
    ar = Path("runs/ar")
    pipeline.train_stage(options("ar"), "ar-teacher")
    paths = variant("trajectories_ar", "trajectories", "parent: ar-teacher")
    stage1 = variant("stage1_ode_ar", "stage1", "parent: ar-teacher\nrollout: {source: ar-teacher}")
    with pytest.raises(UserError, match="of nobody but rollout.source is ar-teacher: run `make trajectories`"):
        pipeline.train_stage(options("ar", recipe=stage1), "stage1")
    pipeline.trajectories(options("ar", recipe=paths))
    pipeline.train_stage(options("ar", recipe=stage1), "stage1")
    teacher = lineage.read(ar / "ar-teacher")
    for child in ("trajectories", "stage1"):
        assert lineage.read(ar / child).parent_hash == teacher.hash
    family = [line.strip("└─ ").split()[0] for line in lineage.tree(ar / "stage1").splitlines()]
    assert family == ["stage1", "ar-teacher", "teacher"]
    with pytest.raises(UserError, match="of ar-teacher but rollout.source is teacher"):
        pipeline.train_stage(options("ar"), "stage2")
    pipeline.train_stage(options("ar", "rollout.source=ar-teacher"), "stage2")
    assert lineage.read(ar / "stage2").parent_hash == lineage.read(ar / "stage1").hash


def test_a_flow_map_begins_with_weights_that_know_none_and_streams_with_any_number_of_steps() -> None:
    run = ("model.flow_map=true",)
    flow = variant("stage1_flow", "stage1", "rollout: {kind: data}\nphases: [{update: student, terms: {flow_map: {}}}]")
    pipeline.train_stage(options("flow", *run, recipe=flow), "stage1")
    pipeline.train_stage(options("again", *run, recipe=flow), "stage1")
    one, other = (checkpoint.load(lineage.read(f"runs/{at}/stage1").path, "ema") for at in ("flow", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)  # what the teacher lacks begins by the seed
    recipe = load(flow, (*SHORT, *run))
    told = (recipe, lineage.read("runs/origin/teacher"), None, Path(recipe.data.path))
    sharded, whole = build_roles(*told, empty=lambda trained: torch.device("meta")), build_roles(*told)
    begun = whole.causal("student").dit.interval_embedding.state_dict()
    assert all(torch.equal(sharded.origins["student"].own[f"interval_embedding.{n}"], t) for n, t in begun.items())
    pipeline.train_stage(options("flow", *run), "stage2")
    pipeline.train_stage(options("flow", *run), "stage3")
    start, end = (checkpoint.load(lineage.read(f"runs/{at}").path, "ema") for at in ("origin/teacher", "flow/stage3"))
    extra = {name.removeprefix("dit.") for name in end} - set(start)
    assert extra and all(name.startswith("interval_embedding.") for name in extra)
    assert not any(
        name.startswith("interval") for name in checkpoint.load(lineage.read("runs/flow/stage3").path, "critic")
    )
    with pytest.raises(UserError, match="do not fit the recipe's model"):
        pipeline.train_stage(Options(run="plain", overrides=SHORT, parent="runs/flow/stage1"), "stage2")


def test_the_seconds_of_a_stage_add_up_over_resumes_and_begin_at_nothing_with_it() -> None:
    timed, kept = Options(run="timed", overrides=SHORT[:3]), Path("runs/timed/timings.json")
    with pytest.raises(UserError, match="Stopped and saved at step 1"):
        pipeline.train_stage(timed, "teacher", until=1)
    kept.write_text(json.dumps({"teacher": 1000.0, "evaluation": 5.0}))
    pipeline.train_stage(timed, "teacher")
    assert json.loads(kept.read_text())["teacher"] > 1000
    shutil.rmtree("runs/timed/teacher")
    pipeline.train_stage(timed, "teacher")
    again = json.loads(kept.read_text())
    assert 0 < again["teacher"] < 1000 and again["evaluation"] == 5
