"""Content hashes of source files: what a cache was made by. Comments, docstrings and layout do not count.

source files -> 16 hex digits; stale caches are rebuilt when code changes, and kept when only its words do.
"""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from types import ModuleType

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
