"""Checkpoints are whole or absent, resume takes the newest whole one, and lineage refuses the wrong parent."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from distill.errors import ExitCode, UserError
from distill.state import checkpoint, lineage
from distill.state.ema import EMA

Parts = dict[str, dict[str, Tensor]]


def parts(value: float = 1.0) -> Parts:
    return {"student": {"w": torch.full((4, 3), value)}, "ema": {"w": torch.full((4, 3), value / 2)}}


def fill(root: Path, *steps: int, keep: int = 9, best: int | None = None) -> None:
    for step in steps:
        checkpoint.save(root, step, parts(step), {"stage": "stage1", "scale": "tiny"}, keep, {"seen": step}, best)


def steps_in(root: Path) -> list[int]:
    return [int(path.name[5:]) for path in sorted(root.glob("step_????????"))]


def quiet(text: str) -> None:
    pass


def test_a_checkpoint_gives_back_what_was_saved(tmp_path: Path) -> None:
    fill(tmp_path, 5)
    found = checkpoint.latest(tmp_path, quiet)
    assert found is not None and found.step == 5 and found.progress == {"seen": 5}
    assert torch.equal(checkpoint.load(found.path, "student")["w"], parts(5)["student"]["w"])
    assert found.manifest["stage"] == "stage1"


def test_an_empty_folder_has_no_checkpoint_and_is_no_error(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path, quiet) is None
    assert checkpoint.latest(tmp_path / "never made", quiet) is None


def test_truncated_checkpoint_is_set_aside_and_the_previous_one_resumes(tmp_path: Path) -> None:
    fill(tmp_path, 5, 10)
    broken = tmp_path / "step_00000010" / "student" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-7])
    said: list[str] = []
    found = checkpoint.latest(tmp_path, said.append)
    assert found is not None and found.step == 5
    assert (tmp_path / "step_00000010.bad").is_dir()
    assert "set aside" in said[0] and "bytes" in said[0]


@pytest.mark.parametrize("damage", ["flip", "missing", "manifest"])
def test_every_kind_of_damage_is_found(tmp_path: Path, damage: str) -> None:
    fill(tmp_path, 5)
    folder = tmp_path / "step_00000005"
    file = folder / "ema" / "model.safetensors"
    if damage == "flip":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "missing":
        file.unlink()
    else:
        (folder / "manifest.json").write_text('{"step": 5')
    assert checkpoint.verify(folder) is not None


def test_when_no_checkpoint_is_whole_resume_stops_with_code_6_twice(tmp_path: Path) -> None:
    fill(tmp_path, 5)
    (tmp_path / "step_00000005" / "manifest.json").unlink()
    for _ in range(2):  # the second time only the *.bad folder is left; still no silent start at 0
        with pytest.raises(UserError) as caught:
            checkpoint.latest(tmp_path, quiet)
        assert caught.value.code == ExitCode.CHECKPOINT


def test_kill_in_the_middle_of_a_save_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from distill.state import checkpoint as c\n"
        "root = sys.argv[1]; big = {'student': {'w': torch.ones(10)}}\n"
        "c.save(root, 1, big, {})\n"
        "seal = c._seal\n"
        "def slow(*a): print('sealing', flush=True); import time; time.sleep(60); seal(*a)\n"
        "c._seal = slow; c.save(root, 2, big, {})"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "sealing\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert list(tmp_path.glob(".step_*.partial"))
    found = checkpoint.latest(tmp_path, quiet)
    assert found is not None and found.step == 1
    fill(tmp_path, 2)
    assert not list(tmp_path.glob(".step_*.partial"))  # the next save sweeps up


def test_an_error_in_the_middle_of_a_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no more")

    monkeypatch.setattr(checkpoint, "_seal", fail)
    with pytest.raises(OSError, match="no more"):
        fill(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_prune_keeps_the_newest_two_and_the_best(tmp_path: Path) -> None:
    fill(tmp_path, 1, 2, 3, 4, 5, keep=2, best=2)
    assert steps_in(tmp_path) == [2, 4, 5]


def test_prune_counts_only_whole_checkpoints(tmp_path: Path) -> None:
    fill(tmp_path, 1, 2, 3)
    (tmp_path / "step_00000003" / "state.json").unlink()
    fill(tmp_path, 4, keep=2)
    assert steps_in(tmp_path) == [2, 3, 4] and checkpoint.verify(tmp_path / "step_00000002") is None


def test_the_same_step_can_be_saved_again(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    checkpoint.save(tmp_path, 3, parts(8.0), {})
    assert checkpoint.load(tmp_path / "step_00000003", "student")["w"][0, 0] == 8.0
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError) as caught:
        fill(tmp_path, 1)
    assert caught.value.code == ExitCode.USAGE and str(tmp_path) in caught.value.message
    assert list(tmp_path.iterdir()) == []


def _trained(steps: int, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(steps):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        network(x).square().mean().backward()
        optimizer.step()


def test_optimizer_state_survives_a_save_bitwise(tmp_path: Path) -> None:
    first = nn.Linear(3, 2)
    second = nn.Linear(3, 2)
    one, two = torch.optim.AdamW(first.parameters(), lr=0.1), torch.optim.AdamW(second.parameters(), lr=0.1)
    _trained(3, first, one)
    packed = checkpoint.pack_optimizer(one, first.named_parameters())
    path = checkpoint.save(tmp_path, 3, {"student": first.state_dict(), "optimizer_student": packed}, {})
    second.load_state_dict(checkpoint.load(path, "student"))
    checkpoint.unpack_optimizer(two, second.named_parameters(), checkpoint.load(path, "optimizer_student"))
    _trained(3, first, one)
    _trained(3, second, two)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_optimizer_state_of_another_network_is_refused() -> None:
    network = nn.Linear(3, 2)
    with pytest.raises(UserError, match="unknown here"):
        checkpoint.unpack_optimizer(
            torch.optim.AdamW(network.parameters()), network.named_parameters(), {"other/exp_avg": torch.zeros(1)}
        )


def test_ema_follows_its_equation_after_the_start_step() -> None:
    network = nn.Linear(1, 1, bias=False)
    average = EMA(network, decay=0.9, start_step=1)
    for step, value in [(1, 1.0), (2, 2.0), (3, 3.0)]:
        nn.init.constant_(network.weight, value)
        average.update(network, step)
    average.copy_to(network)
    expected = 0.9 * (0.9 * 1.0 + 0.1 * 2.0) + 0.1 * 3.0
    assert network.weight.item() == pytest.approx(expected, abs=1e-6)


def test_ema_stays_fp32_for_a_bf16_network() -> None:
    network = nn.Linear(2, 2).bfloat16()
    average = EMA(network, decay=0.999)
    nn.init.constant_(network.weight, 1.0)
    average.update(network, 1)
    assert average.state()["weight"].dtype == torch.float32
    average.copy_to(network)
    assert network.weight.dtype == torch.bfloat16


def _family(root: Path) -> tuple[lineage.Manifest, lineage.Manifest]:
    one = checkpoint.save(root / "stage1" / "checkpoints", 5, parts(), {"stage": "stage1", "scale": "tiny"})
    parent = lineage.read(one)
    link = {"path": str(parent.path), "manifest_sha256": parent.hash}
    meta = {"stage": "stage2", "scale": "tiny", "parent": link}
    return parent, lineage.read(checkpoint.save(root / "stage2" / "checkpoints", 9, parts(), meta))


def test_a_parent_is_found_in_its_run_and_named_by_hash(tmp_path: Path) -> None:
    parent, child = _family(tmp_path)
    found = lineage.find_parent(tmp_path, "stage1", "tiny")
    assert found.hash == parent.hash == child.parent_hash and found.step == 5


@pytest.mark.parametrize(
    ("stage", "scale", "override", "expected"),
    [
        ("stage1", "17b", None, "is of scale tiny but the recipe is of scale 17b"),
        ("stage1", "tiny", "stage2", "is a checkpoint of stage2 but stage1 is needed"),
        ("stage3", "tiny", None, "run `make distill-stage3` first or give PARENT=path"),
        ("stage1", "tiny", "nowhere", "does not exist: check PARENT"),
    ],
)
def test_wrong_parents_are_refused_in_one_sentence(
    tmp_path: Path, stage: str, scale: str, override: str | None, expected: str
) -> None:
    _family(tmp_path)
    with pytest.raises(UserError) as caught:
        lineage.find_parent(tmp_path, stage, scale, str(tmp_path / override) if override else None)
    assert expected in caught.value.message and "\n" not in caught.value.message
    assert caught.value.code == ExitCode.USAGE


def test_a_parent_with_another_hash_is_refused(tmp_path: Path) -> None:
    parent, child = _family(tmp_path)
    lineage.require(parent, stage="stage1", scale="tiny", hash=child.parent_hash)
    with pytest.raises(UserError, match="has changed since its child was trained"):
        lineage.require(parent, hash="0" * 64)


def test_lineage_tree_shows_a_changed_parent(tmp_path: Path) -> None:
    parent, child = _family(tmp_path)
    lines = lineage.tree(child.path).splitlines()
    assert lines[0].startswith("stage2 tiny step 9") and "stage1 tiny step 5" in lines[1]
    manifest = parent.path / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "step": 6}))
    assert "CHANGED" in lineage.tree(child.path)


def test_reading_a_stage_folder_touches_nothing(tmp_path: Path) -> None:
    _family(tmp_path)
    broken = tmp_path / "stage1" / "checkpoints" / "step_00000007"
    broken.mkdir()
    assert lineage.read(tmp_path / "stage1").step == 5
    assert broken.is_dir()
