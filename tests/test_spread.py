"""Two processes under every engine give the losses, weights, moments and averages of one, whole networks and adapters;
and what happens when one of them meets a NaN, a signal or its death, or was another number yesterday. All runs of two
processes share one start (tests/spread.py).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import spread
import torch
from torch import Tensor

from distill import consolidate
from distill.errors import ExitCode
from distill.options import Options
from distill.state import checkpoint
from distill.state.shards import Part

pytestmark = pytest.mark.timeout(1800)  # a few minutes by itself, many beside others that have the cores
ROOT = Path(__file__).resolve().parents[1]
KINDS = ("ddp", "fsdp2", "zero2", "zero3")
WHOLE = [f"{stage}-{kind}" for stage in spread.STAGES for kind in KINDS]
SHORT = [
    *(f"stage2-{kind}-accumulate" for kind in (*KINDS, "zero1")),
    *(f"stage2-{kind}-poison" for kind in KINDS),
    *(f"stage2-{kind}-bf16" for kind in ("fsdp2", "zero2", "zero3")),
]
ADAPTED = [f"{case}-lora" for case in WHOLE]
JUDGED = [f"stage3-{kind}-gan" for kind in KINDS]
# As the 17b recipes are: bf16, adapters, recomputed blocks, accumulated steps. Offloading needs a GPU to mean anything
# for FSDP2, DeepSpeed does it here.
LARGE = [f"stage3-{kind}-large" for kind in ("fsdp2_offload", "zero1", "zero2_offload", "zero3_offload")]
COMPILED = [f"stage2-{kind}-compiled" for kind in KINDS]
LONG = [f"stage3-{kind}-long" for kind in KINDS]
STOPPED = "stage2-fsdp2-stop"
RESUMED = ["stage2-fsdp2-resumed", "stage2-zero3-resumed"]
UNLIKE = ("perf/step_s", "health/", "optim/update_")
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def processes(folder: Path, *cases: str) -> subprocess.CompletedProcess[str]:
    """Run the cases in two processes, started as `make distill-stage2 PROCESSES=2` starts them."""
    code = "import sys; from distill.launch import launch; sys.exit(launch({'processes': '2', 'accelerate': "
    code += f"'recipes/accelerate/ddp.yaml'}}, {[str(ROOT / 'tests/spread.py'), str(folder), *cases]}))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1700)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs: of one process here, of two beside it."""
    folder = tmp_path_factory.mktemp("spread")
    for role, model in spread.models_of(spread.recipe(folder, "stage3")).items():
        checkpoint.write_tensors(folder / "start" / role, dict(model.state_dict()))
    for stage in spread.STAGES:
        spread.trainer(folder, f"{stage}-plain").fit(spread.gauge)
    for what in ("accumulate", "poison", "bf16", "lora", "two"):
        spread.trainer(folder, f"stage2-plain-{what}").fit(spread.gauge)
    for what in ("lora", "gan", "large", "long"):
        spread.trainer(folder, f"stage3-plain-{what}").fit(spread.gauge)
    for case in RESUMED:
        hand_over(folder / "stage2-plain", folder / case)
    cases = (*WHOLE, *SHORT, *RESUMED, *ADAPTED, *JUDGED, *LARGE, *COMPILED, *LONG)
    done = processes(folder, *cases, STOPPED)  # which ends them all
    assert done.returncode == ExitCode.STOPPED, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


def hand_over(giver: Path, taker: Path, name: str = "step_00000006") -> None:
    """What an interrupted run left behind: a checkpoint."""
    shutil.copytree(giver / "checkpoints" / name, taker / "checkpoints" / name)


def final(run: Path) -> dict[str, dict[str, Tensor]]:
    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    return {path.name: checkpoint.load(newest, path.name) for path in newest.iterdir() if path.is_dir()}


def curves(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # Spreads over a batch (health/) are not means over its parts, and the share of its size by which a network moved is
    # read off some of its weights, other ones where they lie in parts. Nothing but the verdict looks at either.
    kept = [{name: float(value) for name, value in row.items() if not name.startswith(UNLIKE)} for row in rows]
    return [row for row in kept if len(row) > 1]


def last_losses(run: Path) -> dict[str, float]:
    return [row for row in curves(run) if "train/dmd" in row][-1]


def assert_same(run: Path, reference: Path, steps: int) -> None:
    """Weights, moments, average; and every curve, the averaged student's own evaluation among them."""
    ours, theirs = final(run), final(reference)
    assert set(ours) - {"carried"} == {"student", "critic", "ema", "optimizer_student", "optimizer_critic"}
    assert set(ours) == set(theirs)
    for part, tensors in theirs.items():
        assert ours[part].keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(ours[part][name], tensor, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
    rows = {row["step"] for row in curves(run)}
    assert max(rows) == steps
    for mine, other in zip(curves(run), [row for row in curves(reference) if row["step"] in rows], strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-6, nan_ok=True)


def assert_near(run: Path, reference: Path) -> None:
    """Masters that started from the same fp32 weights: two steps of Adam move each by twice the rate at most."""
    ours, theirs = final(run), final(reference)
    for part in ("student", "critic"):
        for name, tensor in theirs[part].items():
            assert float((ours[part][name] - tensor).abs().max()) < 8e-4, name  # bf16 starts are 8e-3 away


# ---- equality ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", WHOLE)
def test_two_processes_give_the_losses_and_weights_of_one(runs: Path, case: str) -> None:
    stage = case.partition("-")[0]
    assert_same(runs / case, runs / f"{stage}-plain", steps=10)
    assert {row["step"] for row in curves(runs / case) if "train/dmd" in row} == {2, 4, 6, 8, 10}


@pytest.mark.parametrize("case", ADAPTED)
def test_adapters_on_one_shared_base_learn_in_two_processes_what_they_learn_in_one(runs: Path, case: str) -> None:
    """Blocks are recomputed in the backward pass; the base lies in shards under FSDP2 and ZeRO-3."""
    stage = case.partition("-")[0]
    assert_same(runs / case, runs / f"{stage}-plain-lora", steps=10)
    for part, tensors in final(runs / case).items():
        assert all("adapters." in name for name in tensors), part
    start, end = (checkpoint.load(runs / case / "checkpoints" / f"step_{n:08d}", "student") for n in (6, 10))
    assert max(float((end[name] - start[name]).abs().max()) for name in end) > 2e-5


@pytest.mark.parametrize("case", JUDGED)
def test_an_adversarial_head_learns_in_two_processes_what_it_learns_in_one(runs: Path, case: str) -> None:
    assert_same(runs / case, runs / "stage3-plain-gan", steps=2)
    assert {"train/adversarial", "train/dmd", "train/critic_adversarial"} < set().union(*curves(runs / case))
    assert "heads.adversarial.out.weight" in final(runs / case)["critic"]


@pytest.mark.parametrize("case", LONG)
def test_a_stream_that_is_replayed_part_by_part_learns_in_two_processes_what_it_learns_in_one(
    runs: Path, case: str
) -> None:
    """The first of its backward passes ends at x0 and reaches no weight; every process carries its own streams."""
    assert_same(runs / case, runs / "stage3-plain-long", steps=4)
    assert [row["rollout/age"] for row in curves(runs / case) if "rollout/age" in row][-1] == 8


@pytest.mark.parametrize("case", COMPILED)
def test_compiled_blocks_learn_in_two_processes_what_eager_ones_learn_in_one(runs: Path, case: str) -> None:
    assert_same(runs / case, runs / "stage2-plain-two", steps=2)


@pytest.mark.parametrize("case", LARGE)
def test_adapters_in_bf16_with_state_on_the_cpu_stay_near_and_keep_fp32_masters(runs: Path, case: str) -> None:
    ours, theirs = (last_losses(runs / name) for name in (case, "stage3-plain-large"))
    for name in ("train/critic_flow_matching", "train/dmd"):
        assert ours[name] == pytest.approx(theirs[name], rel=0.05)
    assert {tensor.dtype for part in final(runs / case).values() for tensor in part.values()} == {torch.float32}
    assert_near(runs / case, runs / "stage3-plain-large")


@pytest.mark.parametrize("kind", (*KINDS, "zero1"))
def test_accumulated_micro_steps_are_those_of_one_process(runs: Path, kind: str) -> None:
    assert_same(runs / f"stage2-{kind}-accumulate", runs / "stage2-plain-accumulate", steps=2)


@pytest.mark.parametrize("kind", ("fsdp2", "zero2", "zero3"))
def test_bf16_compute_stays_near_and_masters_and_averages_stay_fp32(runs: Path, kind: str) -> None:
    ours, theirs = (last_losses(runs / f"stage2-{name}-bf16") for name in (kind, "plain"))
    assert ours["train/critic_flow_matching"] == pytest.approx(theirs["train/critic_flow_matching"], rel=0.05)
    assert ours["train/dmd"] == pytest.approx(theirs["train/dmd"], rel=0.05)
    tensors = [tensor for part in final(runs / f"stage2-{kind}-bf16").values() for tensor in part.values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert_near(runs / f"stage2-{kind}-bf16", runs / "stage2-plain-bf16")
    # A bf16 number has 16 empty bits; masters that have moved do not.
    moved = final(runs / f"stage2-{kind}-bf16")["student"]["dit.blocks.0.ffn.0.weight"]
    assert not torch.equal(moved, moved.bfloat16().float())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_in_one_process_is_skipped_in_all(runs: Path, kind: str) -> None:
    """The last clip of the batch, which the second process has, is NaN in the student's first update."""
    run = runs / f"stage2-{kind}-poison"
    assert [(run / f"skipped-{rank}").read_text() for rank in (0, 1)] == ["1", "1"]
    assert_same(run, runs / "stage2-plain-poison", steps=4)


# ---- another number of processes --------------------------------------------------------------------------


def test_shards_of_two_processes_lie_under_one_manifest(runs: Path) -> None:
    newest = checkpoint.newest(runs / "stage2-fsdp2" / "checkpoints")
    assert newest is not None and checkpoint.verify(newest) is None
    listed = [entry["path"] for entry in checkpoint.read_manifest(newest)["files"]]
    assert "student/shard-00001-of-00002.safetensors" in listed and "ema/shard-00002-of-00002.safetensors" in listed
    halves = [path.stat().st_size for path in (newest / "student").iterdir()]
    assert max(halves) < 1.2 * min(halves)


@pytest.mark.parametrize("case", RESUMED)
def test_a_checkpoint_of_one_process_goes_on_in_two(runs: Path, case: str) -> None:
    assert_same(runs / case, runs / "stage2-plain", steps=10)
    assert "resuming from" in (runs / case / "log.txt").read_text()


@pytest.mark.parametrize("giver", ["fsdp2", "zero2", "zero3"])
def test_a_checkpoint_of_two_processes_goes_on_in_one(runs: Path, giver: str) -> None:
    case = f"stage2-plain-from_{giver}"
    hand_over(runs / f"stage2-{giver}", runs / case)
    spread.VARIANTS[f"from_{giver}"] = ([], {})
    spread.trainer(runs, case, seed=50).fit(spread.gauge)
    assert_same(runs / case, runs / "stage2-plain", steps=10)


def test_a_sharded_checkpoint_consolidates_to_what_one_process_writes(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = checkpoint.newest(runs / "stage3-zero3" / "checkpoints")
    said = consolidate.consolidate(Options(parent=str(newest)))
    target = runs / "stage3-zero3" / f"consolidated-{newest.name}"
    assert str(target) in said and checkpoint.verify(target) is None
    assert {path.name for path in target.iterdir() if path.is_dir()} == {"student", "critic", "ema"}
    assert [path.name for path in (target / "ema").iterdir()] == ["model.safetensors"]
    one = {part: checkpoint.load(target, part) for part in ("student", "critic", "ema")}
    monkeypatch.setattr(consolidate, "LIMIT", 20_000)  # bytes, for 5 GB
    consolidate.consolidate(Options(parent=str(newest)))
    files = sorted(path.name for path in (target / "ema").iterdir())
    assert "model.safetensors.index.json" in files and files[0].startswith("model-00001-of-000")
    for part, tensors in one.items():
        several, sharded = checkpoint.load(target, part), checkpoint.load(newest, part)
        assert tensors.keys() == several.keys() == sharded.keys()
        for name in tensors:
            assert torch.equal(tensors[name], several[name]) and torch.equal(tensors[name], sharded[name])
    manifest = checkpoint.read_manifest(target)
    assert manifest["stage"] == "stage3" and manifest["consolidated_from"] == checkpoint.file_hash(
        newest / checkpoint.MANIFEST
    )


def test_a_run_of_elements_is_read_from_any_layout(runs: Path) -> None:
    for case in ("stage2-plain", "stage2-fsdp2", "stage2-zero2", "stage2-zero3"):
        newest = checkpoint.newest(runs / case / "checkpoints")
        part = Part(newest / "student")
        for name, shape in list(part.names.items())[:20]:
            flat = checkpoint.load(newest, "student")[name].flatten()
            for start, stop in ((0, 1), (len(flat) // 3, len(flat) // 3 + 2), (len(flat) // 2 - 1, len(flat))):
                assert torch.equal(part.read(name, start, stop), flat[start:stop]), (case, name, shape)


# ---- death ------------------------------------------------------------------------------------------------


def test_a_signal_to_one_process_stops_both_after_the_same_step(runs: Path) -> None:
    """The second process alone was sent SIGTERM in step 3; the exit status was 75 (the fixture asserts it)."""
    run = runs / STOPPED
    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None and newest.name == "step_00000003" and checkpoint.verify(newest) is None
    assert len(list((newest / "student").iterdir())) == 2
    spread.VARIANTS["from_stop"] = ([], {})
    hand_over(run, runs / "stage2-plain-from_stop", newest.name)
    spread.trainer(runs, "stage2-plain-from_stop", seed=50).fit(spread.gauge)
    assert_same(runs / "stage2-plain-from_stop", runs / "stage2-plain", steps=10)


def test_when_one_process_dies_the_others_end_soon_and_say_so(tmp_path: Path) -> None:
    began = time.monotonic()
    done = processes(tmp_path, "stage2-fsdp2-kill")
    assert done.returncode == ExitCode.STOPPED
    assert "Process 1 died of SIGKILL" in done.stderr and "goes on from the last checkpoint" in done.stderr
    assert "Another process of this run has gone" in done.stderr
    assert time.monotonic() - began < 400
