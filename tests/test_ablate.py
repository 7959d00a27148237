"""Grids: shared stages once, nothing twice, failures marked, interruptions taken up. The jobs are quick stand-ins."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distill import ablate, cli, jobs
from distill import progress as standing
from distill.config import load
from distill.errors import ExitCode, UserError
from distill.grid import Choice, Job, Plan, expand, plan, read_grid
from distill.progress import Progress, rows, survey
from distill.state import lineage

ROOT = Path(__file__).resolve().parents[1]
GRID = """
name: g
stages: [stage1, stage2, stage3]
seeds: [0, 1]
grid: {phases.1.every: [4, 2]}
"""
# Does what a stage leaves behind: sys.argv = folder, stage, what to do
FAKE = """
import json, pathlib, signal, sys, time
folder, stage, what = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
(folder / ("report" if stage == "score" else stage)).mkdir(parents=True, exist_ok=True)
(folder / stage).mkdir(parents=True, exist_ok=True)
if what == "fail":
    print("The reason, in one sentence."); sys.exit(3)
if what in ("wait", "die"):
    if what == "wait": signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (folder / stage / "begun").write_text(""); time.sleep(30)
with open(folder / stage / "calls", "a") as calls: calls.write("x")
(folder / stage / ("manifest.json" if stage == "trajectories" else "STATUS.json")).write_text('{"status": "done"}')
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the repository's recipes and an empty runs/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    return tmp_path


def write(text: str, name: str = "g.yaml") -> Path:
    Path(name).write_text(text)
    return Path(name)


def run(found: Plan, monkeypatch: pytest.MonkeyPatch, what: dict[str, str] | None = None, **changes: Any) -> Progress:
    """Run the jobs as stand-ins; `what`: {part of "run stage": fail | wait}."""

    def command(job: Job) -> list[str]:
        name = f"{job.run} {job.stage}"
        act = next((act for part, act in (what or {}).items() if part in name), "do")
        return [sys.executable, "-c", FAKE, str(job.folder), job.stage, act]

    monkeypatch.setattr(jobs, "command", command)
    progress = survey(found)
    jobs.run_all(found, progress, changes.get("count", 1), changes.get("stop", SimpleNamespace(requested=False)))
    return progress


def calls() -> Counter[str]:
    return Counter({str(path.parent): len(path.read_text()) for path in Path("runs").rglob("calls")})


# ---- what is to be done -----------------------------------------------------------------------------------


def test_a_grid_over_stage_3_trains_the_stages_before_once_per_seed(here: Path) -> None:
    found = plan(write(GRID))
    assert Counter(job.stage for job in found.jobs.values()) == {
        "trajectories": 1, "stage1": 2, "stage2": 2, "stage3": 4, "score": 4,
    }  # fmt: skip
    assert set(found.cells) == {("every-4", 0), ("every-4", 1), ("every-2", 0), ("every-2", 1)}
    ends = [found.chain(key) for key in found.cells.values()]
    assert {job.run for chain in ends for job in chain[-2:]} == {f"g/{c}-seed{s}" for c, s in found.cells}
    once = plan(write(GRID + "parents: once\n"))
    assert Counter(job.stage for job in once.jobs.values())["stage1"] == 1


def test_a_job_is_known_by_its_content(here: Path) -> None:
    first, second = plan(write(GRID)), plan(write(GRID.replace("name: g", "name: h").replace("[4, 2]", "[8]")))
    shared = {job.key: job.run for job in first.jobs.values() if job.run.startswith("shared")}
    assert shared == {job.key: job.run for job in second.jobs.values() if job.run.startswith("shared")}
    longer = plan(write(GRID + "set: {stage1.train.steps: 70}\n"))
    changed = {job.stage for job in longer.jobs.values() if job.key not in first.jobs}
    assert changed == {"stage1", "stage2", "stage3", "score"}  # all that descends from it; not the trajectories


def test_cells_are_scored_again_by_newer_code_but_not_trained_again(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = plan(write(GRID))
    monkeypatch.setattr(lineage, "sources", lambda *packages: "newer")
    gone = {job.stage for key, job in first.jobs.items() if key not in plan(write(GRID)).jobs}
    assert gone == {"score"}


def test_keys_reach_the_stage_they_are_meant_for(here: Path) -> None:
    steps = "set: {all.student.steps: [1.0, 0.5], stage2.train.steps: 7, trajectories.count: 9, train.steps: 5}\n"
    by_stage = {job.stage: job.overrides for job in plan(write(GRID + steps)).jobs.values()}
    assert by_stage["trajectories"] == ("student.steps=[1.0, 0.5]", "trajectories.count=9")
    assert by_stage["stage1"][:1] == ("student.steps=[1.0, 0.5]",) and len(by_stage["stage1"]) == 2
    assert "train.steps=7" in by_stage["stage2"] and "train.steps=5" in by_stage["stage3"]


def test_the_loss_that_a_recipe_names_is_part_of_the_content_but_not_its_comments(here: Path) -> None:
    write("extends: recipes/tiny/stage1_ode.yaml\nphases: [{update: student, terms: {mine: {}}}]\n", "stage1_mine.yaml")
    code = "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Config:\n    x: int = 0\n"
    write(f"{code}def term(roll, roles, cfg): return 1\n", "mine.py")
    first = plan(Path("stage1_mine.yaml"), Choice(seeds=(0,)))
    write(f"# a comment\n{code}def term(roll, roles, cfg): return 1\n", "mine.py")
    assert plan(Path("stage1_mine.yaml"), Choice(seeds=(0,))).cells == first.cells
    write(f"{code}def term(roll, roles, cfg): return 2\n", "mine.py")
    second = plan(Path("stage1_mine.yaml"), Choice(seeds=(0,))).cells
    assert second["stage1_ode", 0] == first.cells["stage1_ode", 0]
    assert second["stage1_mine", 0] != first.cells["stage1_mine", 0]


def test_a_recipe_is_a_grid_of_itself_and_its_base(here: Path) -> None:
    path = write("extends: recipes/tiny/stage3_self_forcing.yaml\nname: mine\n", "stage3_mine.yaml")
    found = plan(path, Choice(seeds=(5,), overrides=("stage1.train.steps=30",)))
    assert found.baseline == "stage3_self_forcing" and set(found.cells) == {(found.baseline, 5), ("stage3_mine", 5)}
    assert [job.stage for job in found.jobs.values()].count("stage1") == 1
    with pytest.raises(UserError, match="extends no other stage1"):
        plan(Path("recipes/tiny/stage1_ode.yaml"))


def test_a_given_checkpoint_stands_for_the_stages_up_to_its_own(here: Path) -> None:
    write('{"stage": "stage2"}', "manifest.json")
    found = plan(write(GRID), Choice(parent="."))
    assert Counter(job.stage for job in found.jobs.values()) == {"stage3": 4, "score": 4}
    assert {job.parent for job in found.jobs.values() if job.stage == "stage3"} == {"."}
    mine = write("extends: recipes/tiny/stage3_self_forcing.yaml\nname: mine\n", "mine.yaml")
    assert {job.stage for job in plan(mine, Choice(parent=".")).jobs.values()} == {"stage3", "score"}
    with pytest.raises(UserError, match="sets stage1.train.steps, but PARENT= is a checkpoint of stage2"):
        plan(write(GRID + "set: {stage1.train.steps: 7}\n"), Choice(parent="."))
    with pytest.raises(UserError, match="cells of the grid end there"):
        plan(write("name: g\nstages: [stage1, stage3]\ncells: [{name: a}, {name: b, stages: [stage2]}]\n", "h.yaml"),
             Choice(parent="."))  # fmt: skip
    with pytest.raises(UserError, match="Cell b begins at an earlier stage than PARENT="):
        plan(
            write("name: g\nstages: [stage3]\ncells: [{name: a}, {name: b, set: {parent: stage1}}]\n", "i.yaml"),
            Choice(parent="."),
        )
    write('{"stage": "stage1"}', "manifest.json")
    assert "stage1" not in {job.stage for job in plan(mine, Choice(parent=".")).jobs.values()}
    assert "stage2" in {job.stage for job in plan(mine, Choice(parent=".")).jobs.values()}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("seeds", "seedz", "g.yaml:4: seedz: unknown key, did you mean 'seeds'?"),
        ("[0, 1]", "[0, 0]", "must be different numbers"),
        ("[stage1, stage2, stage3]", "[stage2, stage1]", "in order"),
        ("[4, 2]", "4", "a list of values is needed"),
        ("grid: {phases.1.every: [4, 2]}", "", "a grid needs `cells`"),
        ("[4, 2]", "[0]", "every: 0 is out of range"),
        ("phases.1.every", "phases.1.evry", "evry: unknown key, did you mean 'every'?"),
        ("name: g", "name: g\nbaseline: x", "baseline 'x' is no cell"),
        ("name: g", "name: g\nevaluation: {clip: 3}", "did you mean 'clips'?"),
    ],
)
def test_what_is_wrong_with_a_grid_is_told_in_a_sentence(here: Path, old: str, new: str, expected: str) -> None:
    assert old in GRID
    with pytest.raises(UserError) as caught:
        plan(write(GRID.replace(old, new)))
    assert expected in caught.value.message


def test_problems_of_all_cells_are_told_at_once(here: Path) -> None:
    cells = "cells: [{name: a, set: {train.stepz: 1}}, {name: b, set: {train.clipp: 1}}]\n"
    with pytest.raises(UserError) as caught:
        plan(write("name: g\nstages: [stage1]\n" + cells))
    assert len(caught.value.message.splitlines()) == 2
    twice = write("name: g\nstages: [stage1]\ncells: [{name: a}, {name: a}]\n")
    with pytest.raises(UserError, match="Two cells of the grid are called 'a'"):
        expand(read_grid(twice))


SHIPPED = [p for p in sorted((ROOT / "recipes" / "ablations").glob("*.yaml")) if "base" not in p.stem]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_grid_is_valid_and_says_how_long_it_takes(
    path: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["validate", "--recipe", str(path)]) == ExitCode.DONE
    told = capsys.readouterr().out
    assert "minutes on quiet cores." in told and "not known" not in told
    grid = read_grid(path)
    assert grid.name == path.stem.replace("_", "-") and len(grid.seeds) == 3


# ---- doing it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_every_job_runs_once_and_a_second_call_does_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    found = plan(write(GRID))
    most = 0
    write_state = jobs.standing.write_state

    def watch(plan: Plan, progress: Progress) -> None:
        nonlocal most
        most = max(most, list(progress.state.values()).count("running"))
        write_state(plan, progress)

    monkeypatch.setattr(jobs.standing, "write_state", watch)
    progress = run(found, monkeypatch, count=count)
    assert set(progress.state.values()) == {"done"} and 1 <= most <= count
    assert len(calls()) == 13 and set(calls().values()) == {1}
    cell = Path("runs/g/every-2-seed1")
    assert (cell / "stage1").resolve().parent.parent.name == "shared" and (cell / "stage2/STATUS.json").is_file()
    assert not (cell / "stage3").is_symlink()
    again = run(found, monkeypatch)
    assert set(again.state.values()) == {"done"} and set(calls().values()) == {1} and not again.seconds
    state = json.loads(Path("runs/g/GRID.json").read_text())
    assert [cell["state"] for cell in state["cells"]] == ["done"] * 4 and state["baseline"] == "every-4"


def test_a_changed_grid_adds_only_what_is_new(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(plan(write(GRID)), monkeypatch)
    wider = plan(write(GRID.replace("[4, 2]", "[4, 2, 8]").replace("[0, 1]", "[0, 1, 2]")))
    progress = run(wider, monkeypatch)
    assert set(calls().values()) == {1} and len(progress.seconds) == 2 * 5 + 2  # 5 new cells; stages 1 and 2, seed 2


def test_what_another_grid_has_made_is_linked_not_made_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(plan(write(GRID)), monkeypatch)
    text = GRID.replace("name: g", "name: h").replace("[4, 2]", "[2, 8]")
    other = plan(write(text, "h.yaml"))
    assert survey(other).state[other.cells["every-2", 0]] == "done" and not Path("runs/h").exists()  # as DRY=1 says it
    status = Path("runs/g/every-2-seed0/stage3/STATUS.json")
    status.write_text('{"status": "stopped"}')
    trained = other.jobs[other.cells["every-2", 0]].needs[0]
    assert survey(other).state[trained] == "waiting"  # half made there is not made
    status.write_text('{"status": "done"}')
    jobs.link(other)
    cell, new = Path("runs/h/every-2-seed1"), Path("runs/h/every-8-seed1")
    assert os.readlink(cell / "stage3") == "../../g/every-2-seed1/stage3" and (cell / "report").is_symlink()
    assert (cell / "stage1").resolve() == Path("runs/g/every-2-seed1/stage1").resolve() and not new.exists()
    progress = run(other, monkeypatch)
    assert set(progress.state.values()) == {"done"} and len(progress.seconds) == 4 and set(calls().values()) == {1}
    assert set(survey(other).state.values()) == {"done"}
    # Scored in another way: the training is linked, the report is the grid's own and the first grid keeps its own.
    scored = plan(write(text + "evaluation: {clips: 4}\n", "h.yaml"))
    jobs.link(scored)
    assert (cell / "stage3").is_symlink() and not (cell / "report").exists()
    run(scored, monkeypatch)
    assert not (cell / "report").is_symlink() and set(survey(scored).state.values()) == {"done"}
    assert set(survey(plan(write(GRID))).state.values()) == {"done"}
    # The first grid is thrown away: so are the links that led there, and the cells are made.
    third = plan(write(GRID.replace("name: g", "name: i").replace("[4, 2]", "[4]"), "i.yaml"))
    jobs.link(third)
    assert Path("runs/i/every-4-seed0/stage3").is_symlink()
    shutil.rmtree("runs/g")
    jobs.link(third)
    assert not Path("runs/i/every-4-seed0/stage3").is_symlink()
    assert set(run(third, monkeypatch).state.values()) == {"done"} and Path("runs/i/every-4-seed0/stage3").is_dir()


def test_what_fails_is_marked_with_its_reason_and_the_rest_goes_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(write(GRID))
    progress = run(found, monkeypatch, {"every-2-seed0 stage3": "fail"})
    told = {(cell, seed): (state, why) for cell, seed, state, _, why in rows(found, progress)}
    assert told.pop(("every-2", "0"))[0] == "failed" and {state for state, _ in told.values()} == {"done"}
    reasons = {why for *_, why in rows(found, progress)} - {""}
    assert (
        len(reasons) == 1 and "The reason, in one sentence. (exit 3, runs/g/logs/every-2-seed0-stage3" in reasons.pop()
    )
    again = run(found, monkeypatch)  # the same command tries it again, and only it
    assert set(again.state.values()) == {"done"} and len(again.seconds) == 2


def test_a_shared_stage_that_fails_takes_its_cells_with_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(write(GRID))
    first = next(job for job in found.jobs.values() if job.stage == "stage2")
    progress = run(found, monkeypatch, {f"{first.run} stage2": "fail"})
    assert [state for _, _, state, *_ in rows(found, progress)] == ["failed", "done", "failed", "done"]


@pytest.mark.parametrize("act", ["wait", "die"])  # what saves when it is told to stop, and what has nothing to save
def test_an_interrupted_grid_stops_after_its_running_jobs_and_goes_on(
    here: Path, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    found = plan(write(GRID))

    class Stop:
        """Asked for as soon as the job that waits has begun."""

        @property
        def requested(self) -> bool:
            return any(Path("runs").rglob("begun"))

    began = time.monotonic()
    progress = run(found, monkeypatch, {"every-4-seed0 stage3": act}, stop=Stop())
    assert time.monotonic() - began < 20
    assert Counter(progress.state.values()) == {"done": 3, "stopped": 1, "waiting": 9}
    assert [state for _, _, state, *_ in rows(found, progress)] == ["stopped", "waiting", "waiting", "waiting"]
    again = run(found, monkeypatch)
    assert set(again.state.values()) == {"done"} and set(calls().values()) == {1}


def test_a_second_interruption_leaves_no_process_behind(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(write(GRID))
    started: list[Any] = []
    start = jobs._start
    monkeypatch.setattr(jobs, "_start", lambda *given: started.append(start(*given)) or started[-1])

    def twice(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "time", SimpleNamespace(sleep=twice, monotonic=time.monotonic))
    with pytest.raises(KeyboardInterrupt):
        run(found, monkeypatch, {"trajectories": "wait"})
    assert len(started) == 1 and started[0].process.wait(10) != 0


def test_a_cell_whose_folder_holds_another_recipe_is_not_overwritten(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(plan(write(GRID)), monkeypatch)
    kept = Path("runs/g/every-2-seed0/stage3/config.resolved.yaml")
    kept.write_text("train: {steps: 200}\n")
    other = plan(write(GRID + "set: {train.steps: 5}\n"))
    why = survey(other).reason[other.cells["every-2", 0]]
    assert "was made from something else" in why and "rename the cell" in why
    assert standing.rows(other, survey(other))[2][2] == "failed"


def test_predictions_come_from_jobs_of_the_same_kind_once_there_are_some(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(GRID + "step_seconds: {stage3: 1.0}\n")
    found = plan(path)
    third = [job for job in found.jobs.values() if job.stage == "stage3"]
    steps = load(ROOT / "recipes/tiny/stage3_self_forcing.yaml").train.steps
    assert standing.predicted(found, third[0]) == steps + 15.0  # a second each, and a start
    run(found, monkeypatch)
    (third[0].folder / "timings.json").write_text('{"stage3": 50.0}')
    same = next(job for job in third if job.family == third[0].family and job is not third[0])
    assert standing.predicted(found, same) == 50.0


def test_the_command_of_a_job_is_one_that_a_user_can_type(here: Path) -> None:
    found = plan(write(GRID), Choice(variant="smoke"))
    job = next(job for job in found.jobs.values() if job.stage == "stage3")
    line = jobs.command(job)
    assert line[1:5] == ["-m", "distill", "stage3", "--run"] and line[-1] == "--smoke"
    options = cli._options(cli._parse(line[3:]))
    assert options.overrides == ("phases.1.every=4", "seed=0") and options.load("stage3").phases[1].every == 4


def test_dry_runs_and_wrong_words_start_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write(GRID))
    assert cli.main(["ablate", "--grid", path, "--dry", "1"]) == ExitCode.DONE
    assert "4 cells (baseline every-4), 13 jobs, 13 to do" in capsys.readouterr().out
    for words in (["ablate"], ["ablate", "--grid", path, "--jobs", "no"], ["ablate", "--grid", path, "--seeds", "x"]):
        assert cli.main(words) == ExitCode.USAGE
    assert not Path("runs").exists() and ablate.describe(plan(Path(path)))
