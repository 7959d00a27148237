"""`make doctor`: is this machine fit? One line per check, OK, WARN or FAIL, with the remedy.

Exit status 0 unless something is FAIL; a WARN costs time or a feature, a FAIL stops `make online-lpm`.
"""

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from distill.errors import ExitCode, UserError
from distill.options import Options

Finding = tuple[str, str]  # OK | WARN | FAIL, text
DISK_GB, MEMORY_GB = 5, 6
KEPT_TEACHER = Path("recipes/tiny/teacher")
SPEECH = {"piper": "piper-tts", "espeakng_loader": "espeakng-loader"}


def examine(options: Options) -> int:
    """Print every finding; 0, or 2 when one of them is FAIL."""
    checks: list[Callable[[], Finding]] = [python, torch, threads, disk, memory, writable, voices, kept_teacher]
    findings = [(check.__name__.replace("_", " "), *check()) for check in checks]
    for name, verdict, text in findings:
        print(f"{verdict:4} {name:13} {text}")
    return ExitCode.USAGE if any(verdict == "FAIL" for _, verdict, _ in findings) else ExitCode.DONE


def python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return ("OK", version) if sys.version_info >= (3, 10) else ("FAIL", f"{version}: install Python 3.10 or newer")


def torch() -> Finding:
    try:
        import torch as library
    except ImportError as error:
        return "FAIL", f"{error}: run `make clean-venv` and the command again"
    device = library.cuda.get_device_name() if library.cuda.is_available() else "CPU"
    return "OK", f"{library.__version__} on {device}"


def threads() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS")
    if wanted and wanted.isdigit() and int(wanted) < cores:
        return "WARN", f"OMP_NUM_THREADS={wanted} leaves cores of {cores} idle: unset it"
    if cores < 2:
        return "WARN", f"{cores} core: everything takes twice as long as the README says"
    return "OK", f"{cores} cores"


def disk() -> Finding:
    free = shutil.disk_usage(".").free / 1e9
    if free < 1:
        return "FAIL", f"{free:.1f} GB free here: make room for {DISK_GB} GB"
    return ("OK" if free >= DISK_GB else "WARN"), f"{free:.0f} GB free, {DISK_GB} GB wanted"


def memory() -> Finding:
    import psutil  # comes with accelerate

    free = psutil.virtual_memory().available / 1e9
    if free < MEMORY_GB:
        return "WARN", f"{free:.1f} GB available, {MEMORY_GB} GB wanted: close something or lower train.batch_size"
    return "OK", f"{free:.0f} GB available"


def writable() -> Finding:
    for name in ("runs", "data"):
        folder = Path(name) if Path(name).is_dir() else Path(".")
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            return "FAIL", f"{folder.resolve()} cannot be written ({error.strerror}): change its owner or its rights"
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
        ("OK", f"{KEPT_TEACHER} is whole") if reason is None else ("FAIL", f"{KEPT_TEACHER}: {reason}: fetch it again")
    )
