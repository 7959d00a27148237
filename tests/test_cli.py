"""The command line, run folders and what a run tells while it works."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from distill import cli, pipeline, runs, tracking
from distill.config import OptimConfig, Recipe, TrainConfig, load
from distill.errors import ExitCode, UserError
from distill.options import Options, run_name
from distill.state import checkpoint, lineage
from distill.tracking import StopSignal, Tracker
from recipes import data_forcing

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def recipe(steps: int = 10) -> Recipe:
    return Recipe(name="r", scale="tiny", stage="stage1", train=TrainConfig(steps=steps))


def status() -> dict[str, object]:
    return json.loads(Path("runs/a/stage1/STATUS.json").read_text())


# ---- run folders ------------------------------------------------------------------------------------------


def test_a_stage_that_ends_well_is_done_and_stays_done() -> None:
    with runs.open_stage("a", recipe()) as stage:
        assert not stage.done and status()["status"] == "running" and status()["pid"] == os.getpid()
        stage.note(step=10)
    assert status()["status"] == "done" and status()["step"] == 10
    with runs.open_stage("a", recipe()) as stage:
        assert stage.done
    names = {path.name for path in Path("runs/a/stage1").iterdir()}
    assert names == {"STATUS.json", "config.resolved.yaml", "env.json", "tb", "samples", "checkpoints"}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError("stopped", ExitCode.STOPPED), "stopped"),
        (KeyboardInterrupt(), "stopped"),
        (UserError("numbers", ExitCode.NUMERICS), "failed"),
        (ZeroDivisionError("bug"), "failed"),
    ],
)
def test_status_tells_how_a_stage_ended_and_the_same_command_resumes(error: BaseException, expected: str) -> None:
    with pytest.raises(type(error)), runs.open_stage("a", recipe()):
        raise error
    assert status()["status"] == expected
    with runs.open_stage("a", recipe()) as stage:
        assert not stage.done
    assert status()["status"] == "done" and "error" not in status()


def test_a_run_name_with_another_recipe_is_refused_and_nothing_is_touched() -> None:
    with runs.open_stage("a", recipe()):
        pass
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught, runs.open_stage("a", recipe(steps=5)):
        pass
    assert "train.steps" in caught.value.message and "RUN=other" in caught.value.message
    assert before == {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}


def test_a_finished_run_goes_on_when_it_is_given_more_steps_alone() -> None:
    for steps, done in ((10, False), (10, True), (20, False), (20, True)):
        with runs.open_stage("a", recipe(steps)) as stage:
            assert stage.done == done
    assert "steps: 20" in Path("runs/a/stage1/config.resolved.yaml").read_text()
    falling = {"student": OptimConfig(1e-3, schedule="cosine")}
    with runs.open_stage("b", replace(recipe(10), optimizer=falling)):
        pass
    with pytest.raises(UserError, match="train.steps"), runs.open_stage("b", replace(recipe(20), optimizer=falling)):
        pass  # its rates would all be others
    with pytest.raises(UserError, match="train.batch_size, train.steps"):
        more = recipe(30)
        with runs.open_stage("a", replace(more, train=replace(more.train, batch_size=7))):
            pass


def test_a_stage_trained_from_another_parent_is_refused() -> None:
    with runs.open_stage("a", recipe(), parent="1" * 64):
        pass
    with pytest.raises(UserError, match="another parent"), runs.open_stage("a", recipe(), parent="2" * 64):
        pass


def test_a_live_process_keeps_others_out_and_a_dead_one_does_not() -> None:
    with pytest.raises(UserError), runs.open_stage("a", recipe()):
        raise UserError("x")
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    beat = {"status": "running", "pid": other.pid, "host": socket.gethostname(), "heartbeat": time.time()}
    Path("runs/a/stage1/STATUS.json").write_text(json.dumps(beat))
    with pytest.raises(UserError, match=f"kill {other.pid}"), runs.open_stage("a", recipe()):
        pass
    other.communicate(b"\n")
    with runs.open_stage("a", recipe()) as stage:
        assert not stage.done


def test_a_stale_heartbeat_of_another_host_does_not_block() -> None:
    folder = Path("runs/a/stage1")
    folder.mkdir(parents=True)
    beat = {"status": "running", "pid": 1, "host": "elsewhere", "heartbeat": time.time()}
    (folder / "STATUS.json").write_text(json.dumps(beat))
    with pytest.raises(UserError, match="on elsewhere"), runs.open_stage("a", recipe()):
        pass
    (folder / "STATUS.json").write_text(json.dumps({**beat, "heartbeat": time.time() - 1000}))
    with runs.open_stage("a", recipe()) as stage:
        assert not stage.done


@pytest.mark.parametrize("name", ["", "../up", "a b", ".hidden", "a/../b", "/a", "a/b/c"])
def test_a_run_name_that_would_leave_the_runs_folder_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="cannot name a run"):
        runs.run_folder(name)


# ---- tracking ---------------------------------------------------------------------------------------------


def records() -> list[dict[str, float]]:
    return [json.loads(text) for text in Path("metrics.jsonl").read_text().splitlines()]


def test_metrics_are_means_over_the_logging_interval() -> None:
    with Tracker(Path("."), 4, "x", log_every=2, say=lambda text: None) as tracker:
        for step in range(1, 5):
            tracker.log(step, {"train/dmd": torch.tensor(float(step))})
    assert [(r["step"], r["train/dmd"]) for r in records()] == [(2, 1.5), (4, 3.5)]


def test_resume_drops_the_records_beyond_the_resumed_step() -> None:
    with Tracker(Path("."), 6, "x", log_every=1, say=lambda text: None) as tracker:
        for step in range(1, 6):
            tracker.log(step, {"a": 0.0})
    with open("metrics.jsonl", "a") as file:
        file.write('{"step": 5, "a"')  # cut in the middle of a write
    with Tracker(Path("."), 6, "x", start_step=3, log_every=1, say=lambda text: None) as tracker:
        for step in range(4, 7):
            tracker.log(step, {"a": 1.0})
    assert [(r["step"], r["a"]) for r in records()] == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 1)]


def test_the_terminal_line_has_step_terms_speed_and_time_left() -> None:
    text = tracking.line(20, 100, {"train/dmd": 0.5, "train/grad_norm": 2.0, "perf/step_s": 0.25}, 3725.0)
    assert text == "step 20/100 | dmd 0.5 | grad_norm 2 | 0.25 s/it | ETA 1:02:05"


def test_a_value_that_is_not_finite_still_makes_valid_json() -> None:
    with Tracker(Path("."), 1, "x", log_every=1, say=lambda text: None) as tracker:
        tracker.log(1, {"train/dmd": float("nan")})
    assert json.loads(Path("metrics.jsonl").read_text(), parse_constant=pytest.fail)["train/dmd"] == "nan"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_the_second_interrupts(number: signal.Signals) -> None:
    said: list[str] = []
    before = signal.getsignal(number)
    with StopSignal(said.append) as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested and len(said) == 1
        assert stop.error(7).code == ExitCode.STOPPED
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) == before


# ---- command line -----------------------------------------------------------------------------------------


def pipeline_with(monkeypatch: pytest.MonkeyPatch, **functions: object) -> None:
    """Stand a fake distill.pipeline in place of the real one."""
    module = ModuleType("distill.pipeline")
    for name, function in functions.items():
        setattr(module, name, function)
    monkeypatch.setitem(sys.modules, "distill.pipeline", module)
    monkeypatch.setattr("distill.pipeline", module, raising=False)


def test_options_reach_the_pipeline_as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Options, str]] = []
    pipeline_with(monkeypatch, train_stage=lambda options, stage: seen.append((options, stage)))
    given = ["stage2", "--parent", "p", "--set", "train.steps=3 name='a b'", "--quick"]
    assert cli.main(given) == ExitCode.DONE
    options, stage = seen[0]
    assert (stage, options.parent, options.run, options.variant) == ("stage2", "p", "tiny-quick", "quick")
    assert options.overrides == ("train.steps=3", "name=a b")


@pytest.mark.parametrize("command", ["evaluate --run", "report --run", "score --run", "drift --run", "compare --runs"])
def test_a_run_that_is_not_there_is_refused_before_anything_is_measured(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("runs/tiny").mkdir(parents=True)
    monkeypatch.setattr(Options, "load", lambda options, *stages: load(ROOT / "recipes/tiny/stage4_refiner.yaml"))
    assert cli.main([*command.split(), "tinny"]) == ExitCode.USAGE
    assert capsys.readouterr().err == "There is no run runs/tinny: runs holds tiny.\n"
    assert [path.name for path in Path("runs").iterdir()] == ["tiny"]


def test_trajectories_of_other_settings_or_of_another_teacher_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    path, teacher = ROOT / "recipes/tiny/trajectories.yaml", lineage.Manifest(Path("teacher"), "abc", {})
    monkeypatch.setattr(pipeline, "need_data", lambda recipe: None)
    monkeypatch.setattr(pipeline, "find_teacher", lambda recipe, folder: teacher)
    told = lineage.describe(load(path), 0, teacher)
    with checkpoint.committed(Path("runs/a/trajectories"), told, 10) as folder:
        (folder / checkpoint.TENSORS).write_bytes(b"states")
    pipeline.make(Options(recipe=path), Path("runs/a"))  # done, says so
    with pytest.raises(UserError, match="of other settings: take another RUN"):
        pipeline.make(Options(recipe=path, overrides=("trajectories.text=1.5",)), Path("runs/a"))
    teacher = lineage.Manifest(Path("teacher"), "def", {})
    with pytest.raises(UserError, match="of another teacher"):
        pipeline.make(Options(recipe=path), Path("runs/a"))
    assert Path("runs/a/trajectories", checkpoint.TENSORS).read_bytes() == b"states"


def test_distill_runs_trajectories_and_the_four_stages_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(pipeline, "trajectories", lambda options: order.append("trajectories"))
    monkeypatch.setattr(pipeline, "train_stage", lambda options, stage: order.append(stage))
    assert cli.main(["distill"]) == ExitCode.DONE
    assert order == ["trajectories", "stage1", "stage2", "stage3", "stage4"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("The reason.", ExitCode.DATA), 3),
        (UserError("Stopped.", ExitCode.STOPPED), 75),
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left on device"), 2),
        (MemoryError("big"), 4),
        (RuntimeError("CUDA out of memory. Tried"), 4),
    ],
)
def test_failures_become_exit_codes_and_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    def fail(options: Options) -> None:
        raise error

    pipeline_with(monkeypatch, data=fail)
    assert cli.main(["data"]) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said and len(said.splitlines()) == 1


def test_what_a_shipped_loss_refuses_is_a_sentence_and_a_loss_of_ones_own_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(*_: object) -> None:
        data_forcing.term(SimpleNamespace(real=None), None, data_forcing.Config())  # type: ignore[arg-type]

    def fails(*_: object) -> None:
        (one, two) = [1]  # noqa: F841 - a ValueError too

    pipeline_with(monkeypatch, export=refuses)
    assert cli.main(["export"]) == ExitCode.USAGE
    assert (
        capsys.readouterr().err
        == "data_forcing needs the data's clip under the samples' condition: rollout.kind self.\n"
    )
    pipeline_with(monkeypatch, export=fails)
    with pytest.raises(ValueError, match="unpack"):
        cli.main(["export"])


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline_with(monkeypatch, data=lambda options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["data"])


def test_an_unknown_command_exits_with_2() -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["distil"])
    assert caught.value.code == ExitCode.USAGE


def test_a_missing_recipe_is_one_sentence_without_traceback() -> None:
    command = [sys.executable, "-m", "distill", "stage2", "--recipe", "nowhere.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == ExitCode.USAGE
    assert done.stderr.startswith("There is no recipe nowhere.yaml") and "Traceback" not in done.stderr
    assert not (ROOT / "runs" / "nowhere").exists()


def test_a_recipe_of_another_stage_is_refused() -> None:
    Path("r.yaml").write_text("name: r\nscale: tiny\nstage: stage3\n")
    with pytest.raises(UserError, match="stage 'stage3' but stage2 was asked for"):
        Options(recipe=Path("r.yaml")).load("stage2")


def test_run_defaults_to_the_scale_and_the_variant() -> None:
    assert run_name(None, "tiny", False, False) == "tiny"
    assert run_name(None, "tiny", True, False) == "tiny-quick"
    assert run_name(None, "1.3b", True, True) == "1.3b-smoke"
    assert run_name("mine", "tiny", True, False) == "mine"


def test_lineage_of_an_empty_run_says_what_to_give(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["lineage", "--run", "none"]) == ExitCode.USAGE
    assert "give RUN=name" in capsys.readouterr().err


def test_recipes_lists_stages_and_skips_bases(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("recipes/tiny")
    folder.mkdir(parents=True)
    (folder / "base.yaml").write_text("scale: tiny\ntrain: {steps: 7}\n")
    (folder / "stage1_ode.yaml").write_text("# One-line description.\nextends: base.yaml\nname: s\nstage: stage1\n")
    assert cli.main(["recipes"]) == ExitCode.DONE
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].split()[:3] == ["recipes/tiny/stage1_ode.yaml", "stage1", "7"]
    assert lines[1].endswith("One-line description.")


def test_every_make_target_has_a_help_line_and_bare_make_prints_them() -> None:
    printed = subprocess.run(["make", "-C", str(ROOT)], capture_output=True, text=True, check=True).stdout
    text = (ROOT / "Makefile").read_text()
    declared = text[text.index(".PHONY:") + 7 :].split("\n\n")[0].replace("\\", " ").split()
    assert len(declared) > 15
    for target in declared:
        assert f"make {target} " in printed, target


def test_make_passes_its_variables_to_the_command_line() -> None:
    variables = ["RECIPE=r.yaml", "PARENT=p", "RUN=n", "SET=a.b=1 c=2", "QUICK=1"]
    command = ["make", "-C", str(ROOT), "-n", "-o", ".venv/.installed", "distill-stage2", *variables]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    wanted = "-m distill stage2 --recipe 'r.yaml' --parent 'p' --run 'n' --set 'a.b=1 c=2' --quick"
    assert wanted in " ".join(printed.split())


def test_what_is_asked_for_and_not_there_is_named_with_what_is(capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("recipes/tiny/base.yaml", "scale: tiny"), ("runs/a/stage1/config.resolved.yaml", "")):
        Path(name).parent.mkdir(parents=True)
        Path(name).write_text(text)
    Path("recipes/ablations").mkdir()
    for name in ("base", "history"):
        Path(f"recipes/ablations/{name}.yaml").touch()
    for command, told in (
        ("stage2 --recipe recipes/tiny/base.yaml", "names no stage, other recipes extend it"),
        ("score --run a --stage stage2", "runs/a has no stage 'stage2' to score: STAGE is one of stage1."),
        ("ablate --grid histry.yaml", "There is no grid histry.yaml: recipes/ablations/ holds history.yaml."),
    ):
        assert cli.main(command.split()) == ExitCode.USAGE
        assert told in capsys.readouterr().err


def test_a_listing_into_a_pipe_that_closes_is_no_mistake() -> None:
    """`make recipes | head -n 1`, where head is done before the listing is printed."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "distill", "recipes"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == ExitCode.DONE and done.stderr == ""
