"""`make doctor` finds what is wrong with a machine, and every line that is not OK ends with what mends it."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distill import cli, doctor
from distill.errors import ExitCode

Patch = pytest.MonkeyPatch
MENDS = re.compile(r"`[^`]+`|SET='|install |unset |make ")


def disk_of(**gigabytes: float) -> Callable[[object], SimpleNamespace]:
    return lambda place: SimpleNamespace(free=gigabytes["free"] * 1e9, total=gigabytes.get("total", 100) * 1e9)


def card(patch: Patch, usable: bool, cuda: str | None = "13.0", free: float = 70.0) -> None:
    patch.setattr(doctor, "_driver", lambda: "580.1")
    patch.setattr(torch.cuda, "is_available", lambda: usable)
    patch.setattr(torch.cuda, "get_device_name", lambda: "A card")
    patch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * 2**30), 80 * 2**30))
    patch.setattr(torch.version, "cuda", cuda)


BROKEN: dict[str, tuple[Callable[[], doctor.Finding], str, Callable[[Patch], None]]] = {
    "old python": (doctor.python, "FAIL", lambda p: p.setattr(sys, "version_info", (3, 9, 1))),
    "full card": (doctor.gpu, "WARN", lambda p: card(p, True, free=3.0)),
    "torch for the CPU beside a card": (doctor.gpu, "WARN", lambda p: card(p, False, cuda=None)),
    "driver too old": (doctor.gpu, "WARN", lambda p: card(p, False)),
    "idle cores": (doctor.threads, "WARN", lambda p: (p.setenv("OMP_NUM_THREADS", "1"), two_cores(p)) and None),
    "full disk": (doctor.disk, "FAIL", lambda p: p.setattr(shutil, "disk_usage", disk_of(free=0.5))),
    "little disk": (doctor.disk, "WARN", lambda p: p.setattr(shutil, "disk_usage", disk_of(free=3))),
    "little shared memory": (
        doctor.shared_memory,
        "WARN",
        lambda p: p.setattr(shutil, "disk_usage", disk_of(free=0, total=0.064)),
    ),
    "no voices": (doctor.voices, "FAIL", lambda p: p.setattr(doctor.importlib.util, "find_spec", lambda name: None)),
    "no teacher": (doctor.kept_teacher, "WARN", lambda p: p.setattr(doctor, "KEPT_TEACHER", Path("nowhere"))),
}


def two_cores(patch: Patch) -> bool:
    patch.setattr(doctor.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    return True


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_found_and_the_line_says_what_mends_it(name: str, monkeypatch: Patch) -> None:
    check, verdict, damage = BROKEN[name]
    damage(monkeypatch)
    found, text = check()
    assert found == verdict
    assert MENDS.search(text), text


def test_a_folder_that_cannot_be_written_is_a_failure(monkeypatch: Patch) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    verdict, text = doctor.writable()
    assert verdict == "FAIL" and "Permission denied" in text and "chown" in text


def test_a_damaged_kept_teacher_is_a_failure(tmp_path: Path, monkeypatch: Patch) -> None:
    copy = shutil.copytree(doctor.KEPT_TEACHER, tmp_path / "teacher")
    with open(next((copy / "ema").iterdir()), "r+b") as file:
        file.seek(1000)
        file.write(b"!!!!")
    monkeypatch.setattr(doctor, "KEPT_TEACHER", copy)
    assert doctor.kept_teacher()[0] == "FAIL"


def test_one_failure_makes_the_exit_status_and_warnings_do_not(
    monkeypatch: Patch, capsys: pytest.CaptureFixture
) -> None:
    for name in ("voices", "kept_teacher", "disk", "memory", "shared_memory", "threads", "gpu", "writable"):
        monkeypatch.setattr(doctor, name, type(name, (), {"__name__": name, "__call__": lambda self: ("WARN", "x")})())
    assert cli.main(["doctor"]) == ExitCode.DONE
    assert capsys.readouterr().out.count("WARN") == 8
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    assert cli.main(["doctor"]) == ExitCode.USAGE
