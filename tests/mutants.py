"""Break one thing at a time and see that a test notices: `python tests/mutants.py [word ...]`.

Each mutant replaces one piece of code in a copy of the packages and runs the tests of that area until the first
failure. Prints a line per mutant and `mutants: N, caught: N`; the exit status is 1 when one survives. A word selects
the mutants whose file or description holds it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mutants_comparing import COMPARING
from mutants_drift import DRIFT
from mutants_health import HEALTH
from mutants_long import LONG
from mutants_networks import NETWORKS
from mutants_objectives import OBJECTIVES
from mutants_streaming import STREAMING
from mutants_training import TRAINING

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("teacher", "student", "evaluation", "distill", "recipes", "tests")

# (file, areas whose tests must notice): what is there, what the mutant puts in its place, what that breaks
MUTANTS = NETWORKS | STREAMING | TRAINING | COMPARING | OBJECTIVES | DRIFT | LONG | HEALTH


def run(folder: Path, areas: str) -> bool:
    """Do the tests of these areas pass on the copy?"""
    files = [f"tests/test_{area}.py" for area in areas.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True).returncode == 0


def main(words: list[str]) -> int:
    every = [(path, areas, *mutant) for (path, areas), mutants in MUTANTS.items() for mutant in mutants]
    chosen = [mutant for mutant in every if not words or any(word in mutant[0] + mutant[4] for word in words)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in (*PACKAGES, "docs"):  # a test reads the table of objectives
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
        codec = Path("recipes/tiny/teacher/codec")  # small, and a test asks for its hash
        shutil.copytree(ROOT / codec, folder / codec, dirs_exist_ok=True)
        for name in ("pyproject.toml", "Makefile", "README.md"):
            shutil.copy(ROOT / name, folder)
        if not run(folder, " ".join(dict.fromkeys(" ".join(mutant[1] for mutant in chosen).split()))):
            print("The tests fail without any mutant: mend them first.")
            return 1
        caught = sum(notice(folder, *mutant) for mutant in chosen)
    print(f"mutants: {len(chosen)}, caught: {caught}")
    return int(caught < len(chosen))


def notice(folder: Path, path: str, areas: str, old: str, new: str, about: str) -> bool:
    """Make one mutant in the copy, run its tests, mend it again: was it caught?"""
    file = folder / path
    text = file.read_text(encoding="utf-8")
    if text.count(old) != 1:
        print(f"STALE     {path}: {about}: its piece of code is there {text.count(old)} times", flush=True)
        return False
    file.write_text(text.replace(old, new), encoding="utf-8")
    caught = not run(folder, areas)
    file.write_text(text, encoding="utf-8")
    print(f"{'caught' if caught else 'SURVIVED':9} {path}: {about}", flush=True)
    return caught


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
