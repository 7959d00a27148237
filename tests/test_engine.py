"""One process's share of a batch, engine files, shards on the disk, and the launcher's refusals: all in one process."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import at_step, batch_of, conditions, latents, normal, small_dit, small_roles
from torch import Tensor

from distill import cli, launch, tracking
from distill.contracts import Roles, Roll
from distill.data.batch import Batch
from distill.engine import Engine, load_engine
from distill.engine.config import KINDS
from distill.errors import UserError
from distill.rollout import _step_per_chunk
from distill.state.shards import Part, write_pieces, write_whole
from recipes import self_forcing
from student.causal_dit import StreamConfig
from teacher.draws import draw_rows
from teacher.flow import sample_time

STREAM = StreamConfig(chunk_frames=2, sink_chunks=1, window_chunks=1, steps=(1.0, 0.5))
SHIPPED = sorted(Path("recipes/accelerate").glob("*.yaml"))
ROOT = Path(__file__).resolve().parents[1]


# ---- rows -------------------------------------------------------------------------------------------------

DRAWS: dict[str, Callable[[Roles, int], Tensor]] = {
    "noise": lambda roles, count: roles.noise(normal(count, 3), "a"),
    "time": lambda roles, count: sample_time((count,), 3.0, roles.rows("a")),
    "time per frame": lambda roles, count: sample_time((count, 5), 3.0, roles.rows("a")),
    "columns": lambda roles, count: _columns(roles, count).T,
    "steps": lambda roles, count: _step_per_chunk(latents(4, count)[:, None], roles)[0],
}


def _columns(roles: Roles, count: int) -> Tensor:
    rows = roles.rows("a")
    return draw_rows(lambda n: torch.rand(3, n, generator=rows), count, rows, dim=1)


@pytest.mark.parametrize("draw", DRAWS)
def test_processes_with_a_part_each_draw_what_one_draws_for_all(draw: str) -> None:
    roles = at_step(small_roles(STREAM), 3)
    whole = DRAWS[draw](roles, 6)
    for processes in (2, 3):
        ranks = [replace(roles, key=(0, rank, 3, 0, 0), processes=processes) for rank in range(processes)]
        parts = [DRAWS[draw](part, 6 // processes) for part in ranks]
        assert torch.equal(torch.cat(parts), whole)
        assert not torch.equal(parts[0], parts[1])


def test_a_stream_of_draws_stays_in_step() -> None:
    one, two = (replace(small_roles(STREAM), key=(0, n - 1, 1, 0, 0), processes=n).rows("a") for n in (1, 2))
    for _ in range(3):
        whole = draw_rows(lambda n: torch.randn(n, generator=one), 4, one)
        mine = draw_rows(lambda n: torch.randn(n, generator=two), 2, two)
        assert torch.equal(whole[2:], mine)


def test_a_long_rollout_hears_its_neighbors_in_the_whole_batch() -> None:
    whole = conditions(4, batch=4, seed=2)
    expected = self_forcing.longer(whole, 11)
    for rank in (0, 1):
        own = whole.select(slice(2 * rank, 2 * rank + 2))
        got = self_forcing.longer(own, 11, whole, rank)
        assert torch.equal(got.speak, expected.speak[2 * rank : 2 * rank + 2])
        assert torch.equal(got.listen, expected.listen[2 * rank : 2 * rank + 2])


def test_the_parts_of_a_rollout_are_the_rollout_of_the_whole() -> None:
    roles, cond = at_step(small_roles(STREAM), 1), conditions(4, batch=4)
    cfg = self_forcing.Config(chunks=5, grad_chunks=1)

    def roll(batch: Batch, roles: Roles) -> Roll:
        with torch.no_grad():
            return self_forcing.roll_self(batch, roles, cfg)

    whole = roll(batch_of(cond), roles).x0
    for rank in (0, 1):
        rows = slice(2 * rank, 2 * rank + 2)
        part = replace(roles, key=(0, rank, 1, 0, 0), processes=2, whole=cond)
        torch.testing.assert_close(roll(batch_of(cond.select(rows)), part).x0, whole[rows])


# ---- engine files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_every_shipped_engine_file_is_valid(path: Path) -> None:
    assert load_engine(path).kind in KINDS


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind: fsdp2\noffload_optimiser: true", "engine.yaml:2: .*did you mean 'offload_optimizer'"),
        ("kind: fsdp3", "fsdp3.*did you mean 'fsdp2'"),
        ("kind: ddp\noffload_optimizer: true", "offload_optimizer needs fsdp2 or zero1-3, kind is ddp"),
        ("kind: zero2\noffload_frozen: true", "offload_frozen needs fsdp2 or zero3"),
        ("kind: fsdp2\ndeepspeed: {zero_optimization: {}}", "deepspeed is for zero1-3"),
        ("kind: zero3\ndeepspeed: {gradient_clipping: 1.0}", "gradient_clipping follows from the recipe"),
    ],
)
def test_a_wrong_engine_file_is_refused_in_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "engine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        load_engine(path)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"processes": "2"}, "Several processes need ACCELERATE="),
        ({"processes": "two", "accelerate": "recipes/accelerate/ddp.yaml"}, "--processes takes a whole number from 1"),
        ({"nodes": "2", "accelerate": "recipes/accelerate/ddp.yaml"}, "2 machines need MASTER=host:port"),
        (
            {"nodes": "2", "node-rank": "2", "master": "a:1", "accelerate": "recipes/accelerate/ddp.yaml"},
            "NODE_RANK= from 0 to 1",
        ),
        ({"processes": "2", "accelerate": "recipes/accelerate/zero4.yaml"}, "there is no file .*did you mean"),
    ],
)
def test_a_start_that_cannot_be_is_refused_before_it(own: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        launch.launch(own, ["-c", "raise SystemExit(9)"])


def test_the_command_line_starts_processes_and_takes_over_their_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[tuple[dict[str, str], list[str]]] = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(launch, "launch", lambda own, command: given.append((own, list(command))) or 75)
    arguments = ["stage2", "--accelerate", "recipes/accelerate/fsdp2.yaml", "--processes", "2", "--smoke"]
    assert cli.main(arguments) == 75
    own, command = given[0]
    assert own["processes"] == "2" and command == ["-m", "distill", *arguments]
    assert cli.main([*arguments, "--set", "train.batch_sice=2"]) == 2  # told here, once, and nothing was started
    assert "did you mean" in capsys.readouterr().err and len(given) == 1


def test_a_signal_that_the_launcher_repeats_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with tracking.StopSignal(said.append, repeated=True) as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.requested and len(said) == 1
        monkeypatch.setattr(tracking, "REPEAT_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("rank", "status", "late"), [("0", 0, False), ("0", 5, True), (None, 0, True)])
def test_only_a_worker_whose_work_is_done_ends_without_its_exit_handlers(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, status: int, late: bool
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    code = "import atexit; from distill.launch import leave; atexit.register(print, 'late'); print('said'); "
    done = subprocess.run([sys.executable, "-c", f"{code}leave({status})"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.split()) == (status, ["said", "late"] if late else ["said"]), done.stderr


# ---- compiled blocks --------------------------------------------------------------------------------------


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_give_the_velocities_and_gradients_of_eager_ones() -> None:
    def run(compiled: bool) -> list[Tensor]:
        model, engine = small_dit(1, dtype=torch.float32, depth=1), Engine("fp32")
        if compiled:
            engine.compile(model)
        v = model(
            latents(2, dtype=torch.float32), torch.tensor([0.3, 0.8]).double(), conditions(2, dtype=torch.float32)
        )
        v.square().sum().backward()
        called.append(model.blocks[0]._compiled_call_impl is not None)
        return [v.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    called: list[bool] = []
    eager, compiled = run(False), run(True)
    assert called == [False, True] and len(eager) == len(compiled)
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# ---- shards -----------------------------------------------------------------------------------------------


def test_pieces_of_three_processes_are_read_by_any_run_of_elements(tmp_path: Path) -> None:
    tensor = torch.arange(21.0).reshape(7, 3)
    for index, (start, stop) in enumerate([(0, 5), (5, 6), (6, 21)]):
        pieces = [("w", (7, 3), start, tensor.flatten()[start:stop])]
        pieces += [("count", (), 0, torch.ones(1))] if index == 1 else []
        write_pieces(tmp_path / "student", pieces, index, 3)
    part = Part(tmp_path / "student")
    assert torch.equal(part.whole("w"), tensor) and part.whole("count").shape == ()
    for start in range(21):
        for stop in range(start + 1, 22):
            assert torch.equal(part.read("w", start, stop), tensor.flatten()[start:stop])
    write_whole(tmp_path / "whole", part, 100)
    again = Part(tmp_path / "whole")
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) == 1 and torch.equal(again.whole("w"), tensor)
    assert torch.equal(again.read("w", 4, 11), tensor.flatten()[4:11])
    write_whole(tmp_path / "several", part, 84)
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert index["metadata"]["total_size"] == 88


def test_a_part_with_a_shard_or_elements_missing_is_refused(tmp_path: Path) -> None:
    write_pieces(tmp_path / "student", [("w", (4,), 0, torch.ones(2))], 0, 2)
    with pytest.raises(UserError, match="1 of 2 shards"):
        Part(tmp_path / "student")
    write_pieces(tmp_path / "student", [("w", (4,), 3, torch.ones(1))], 1, 2)
    with pytest.raises(UserError, match="do not make up w"):
        Part(tmp_path / "student")
