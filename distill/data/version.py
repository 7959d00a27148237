"""Content hashes of source files: what a cache was made by. Comments, docstrings and layout do not count.

source files -> 16 hex digits; stale caches are rebuilt when code changes, and kept when only its words do.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@cache  # one answer per process, even when a file is edited meanwhile
def source_hash(modules: tuple[ModuleType, ...]) -> str:
    """Hash of the code of `modules`, in this order."""
    digest = hashlib.sha256()
    for module in modules:
        with open(str(module.__file__), encoding="utf-8") as file:
            digest.update(meaning(file.read()).encode())
    return digest.hexdigest()[:16]


def meaning(source: str) -> str:
    """The syntax tree of `source` as text, without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)


def made_by(facts: Mapping[str, Any]) -> str:
    """What a data set was made by, without what came out of it: speech is synthesized, and one CPU rounds otherwise
    than another. `facts` is its fingerprint.json."""
    inputs = {key: value for key, value in facts["inputs"].items() if key != "speech"}
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
