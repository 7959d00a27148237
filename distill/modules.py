"""Find the file of a loss or a rollout by its name: in recipes/, or beside the YAML file that names it.

A user's own loss needs no place in the repository: `my_loss.py` in the folder of the recipe (or of a recipe that it
extends) is `my_loss` in its phases. Only files that are asked for are imported; a name that recipes/ has as well is
refused. `source` is the file's path, "" for what comes with the repository.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from distill.errors import UserError


def shipped() -> list[str]:
    """Names of the modules in recipes/."""
    return [info.name for info in pkgutil.iter_modules(importlib.import_module("recipes").__path__)]


def beside(folders: Sequence[Path]) -> dict[str, Path]:
    """Files beside the recipe by name, the nearest folder first; what lies in recipes/ itself is shipped."""
    ours = {Path(folder).resolve() for folder in importlib.import_module("recipes").__path__}
    found: dict[str, Path] = {}
    for folder in folders:
        for path in [] if folder.resolve() in ours else sorted(folder.glob("*.py")):
            if path.stem.isidentifier():
                found.setdefault(path.stem, path)
    return found


def find(name: str, shipped_names: Sequence[str], folders: Sequence[Path]) -> str | None:
    """Where `name` is: its path, "" for a shipped one, None when nowhere; UserError when it is in both places."""
    own = beside(folders).get(name)
    if own is not None and name in shipped_names:
        raise UserError(f"{own} has the name of a module in recipes/: give it another name.")
    return "" if name in shipped_names else None if own is None else str(own)


def load(name: str, source: str = "") -> ModuleType:
    """The module; a file of the user's that cannot be imported is a UserError with its place."""
    if not source:
        return importlib.import_module(f"recipes.{name}")
    text = Path(source).read_bytes()
    digest = hashlib.sha256(str(Path(source).resolve()).encode() + b"\0" + text).hexdigest()
    known = f"own_{digest[:16]}_{name}"  # an edited file is another module
    if known in sys.modules:
        return sys.modules[known]
    spec = importlib.util.spec_from_file_location(known, source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[known] = module  # dataclasses look their module up while it is being made
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[known]
        raise UserError(f"{_place(error, source)} cannot be imported: {type(error).__name__}: {error}.") from None
    return module


def _place(error: Exception, source: str) -> str:
    """file:line of the user's code at fault."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    lines, trace = [], error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == source:
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f"{source}:{lines[-1]}" if lines else source
