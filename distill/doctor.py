"""`make doctor`: is this machine fit? One line per check, OK, WARN or FAIL, with the remedy.

Exit status 0 unless something is FAIL; a WARN costs time or a feature, a FAIL stops `make online-lpm`.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from distill.errors import ExitCode, UserError
from distill.options import Options

Finding = tuple[str, str]  # OK | WARN | FAIL, text
DISK_GB, MEMORY_GB, SHARED_MB = 5, 6, 512
KEPT_TEACHER = Path("recipes/tiny/teacher")
SPEECH = {"piper": "piper-tts", "espeakng_loader": "espeakng-loader"}


def examine(options: Options) -> int:
    """Print every finding; 0, or 2 when one of them is FAIL."""
    checks: list[Callable[[], Finding]] = [
        python,
        torch,
        gpu,
        threads,
        disk,
        memory,
        shared_memory,
        writable,
        voices,
        kept_teacher,
    ]
    findings = [(check.__name__.replace("_", " "), *check()) for check in checks]
    for name, verdict, text in findings:
        print(f"{verdict:4} {name:13} {text}")
    return ExitCode.USAGE if any(verdict == "FAIL" for _, verdict, _ in findings) else ExitCode.DONE


def python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return (
        ("OK", version)
        if sys.version_info >= (3, 10)
        else ("FAIL", f"{version} is too old: install 3.10 or newer, then `make clean-venv`")
    )


def torch() -> Finding:
    try:
        import torch as library
    except ImportError as error:
        return "FAIL", f"{error}: run `make clean-venv` and the command again"
    return "OK", str(library.__version__)


def gpu() -> Finding:
    """The card, its driver, and whether this torch can use them."""
    import torch as library

    driver = _driver()
    if library.cuda.is_available():
        free, total = (part / 2**30 for part in library.cuda.mem_get_info())
        text = f"{library.cuda.get_device_name()}, {free:.0f} of {total:.0f} GiB free, driver {driver or 'unknown'}"
        return ("OK", text) if free > total / 2 else ("WARN", f"{text}: see who holds it with `nvidia-smi`")
    if driver is None:
        return "OK", "none: everything runs on the CPU"
    if library.version.cuda is None:
        remedy = "make clean-venv && make online-lpm TORCH='torch>=2.9'"
        return "WARN", f"driver {driver}, but this torch is built for the CPU: run `{remedy}`"
    return "WARN", f"driver {driver} does not serve CUDA {library.version.cuda}: update it, or see `nvidia-smi`"


def _driver() -> str | None:
    """The version of the NVIDIA driver; None where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "that does not answer"
    return said.stdout.strip().splitlines()[0] if said.returncode == 0 and said.stdout.strip() else None


def threads() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS")
    if wanted and wanted.isdigit() and int(wanted) < cores:
        return "WARN", f"OMP_NUM_THREADS={wanted} leaves cores of {cores} idle: run `unset OMP_NUM_THREADS`"
    if cores < 2:
        return "WARN", f"{cores} core: everything takes twice as long as the README says"
    return "OK", f"{cores} cores"


def disk() -> Finding:
    free = shutil.disk_usage(".").free / 1e9
    if free < 1:
        return (
            "FAIL",
            f"{free:.1f} GB free here, {DISK_GB} GB wanted: see what takes the room with `du -sh runs/* data/*`",
        )
    if free < DISK_GB:
        return "WARN", f"{free:.1f} GB free, {DISK_GB} GB wanted: see what takes the room with `du -sh runs/* data/*`"
    return "OK", f"{free:.0f} GB free, {DISK_GB} GB wanted"


def memory() -> Finding:
    import psutil  # comes with accelerate

    free = psutil.virtual_memory().available / 1e9
    if free < MEMORY_GB:
        return "WARN", f"{free:.1f} GB available, {MEMORY_GB} GB wanted: close something, or SET='train.batch_size=4'"
    return "OK", f"{free:.0f} GB available"


def shared_memory() -> Finding:
    """/dev/shm, through which processes on one machine hand each other tensors; containers often give it 64 MB."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return "OK", "this system has no /dev/shm"
    total = shutil.disk_usage(place).total / 2**20
    if total < SHARED_MB:
        return (
            "WARN",
            f"/dev/shm holds {total:.0f} MB: several GPUs need more, start the container with `--shm-size=8g`",
        )
    return "OK", f"/dev/shm holds {total / 1024:.0f} GB" if total >= 1024 else f"/dev/shm holds {total:.0f} MB"


def writable() -> Finding:
    for name in ("runs", "data"):
        folder = Path(name) if Path(name).is_dir() else Path(".")
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            remedy = f"sudo chown -R $USER {folder.resolve()}"
            return "FAIL", f"{folder.resolve()} cannot be written ({error.strerror}): run `{remedy}`"
    return "OK", "runs/ and data/"


def voices() -> Finding:
    missing = [package for module, package in SPEECH.items() if importlib.util.find_spec(module) is None]
    if missing:
        return "FAIL", f"{', '.join(missing)} is not installed: run `{Path(sys.executable).name} -m pip install -e .`"
    return "OK", "speak and listen voices are installed"


def kept_teacher() -> Finding:
    from distill.state.checkpoint import verify

    if not KEPT_TEACHER.is_dir():
        return "WARN", f"{KEPT_TEACHER} is absent: run `make teacher` first"
    try:
        reason = verify(KEPT_TEACHER)
    except UserError as error:
        reason = error.message
    return (
        ("OK", f"{KEPT_TEACHER} is whole")
        if reason is None
        else ("FAIL", f"{KEPT_TEACHER}: {reason}: run `git checkout -- {KEPT_TEACHER}`")
    )
