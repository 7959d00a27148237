"""`make consolidate PARENT=...`: the weights of a checkpoint as whole tensors in plain safetensors.

Whatever engine wrote it; parts above 5 GB become several files with an index. The new folder keeps the manifest of the
old one (stage, recipe, parent), names it, and is read by the next stage, export and evaluation through PARENT=.
"""

from __future__ import annotations

from distill.errors import UserError
from distill.options import Options
from distill.runs import run_folder
from distill.state import checkpoint, lineage
from distill.state.shards import Part, write_whole

LIMIT = 5 * 10**9  # bytes of one file


def consolidate(options: Options) -> str:
    """Write it beside the checkpoint's folder; returns what was written."""
    given = options.parent or _newest(options)
    source = lineage.read(given)
    reason = checkpoint.verify(source.path)
    if reason is not None:
        raise UserError(f"{source.path} is not whole ({reason}).")
    parts = [path for path in sorted(source.path.iterdir()) if path.is_dir() and not path.name.startswith("optimizer_")]
    holder = source.path.parent.parent if source.path.parent.name == "checkpoints" else source.path.parent
    target = holder / f"consolidated-{source.path.name}"
    meta = {key: value for key, value in source.data.items() if key != "files"} | {"consolidated_from": source.hash}
    size = sum(path.stat().st_size for part in parts for path in part.iterdir())
    with checkpoint.committed(target, meta, size) as folder:
        for part in parts:
            write_whole(folder / part.name, Part(part), LIMIT)
    return f"Wrote {target}: {', '.join(part.name for part in parts)}; use it with PARENT={target}."


def _newest(options: Options) -> str:
    """The newest stage of the run."""
    folder = run_folder(options.run)
    for stage in ("stage4", "stage3", "stage2", "stage1", "teacher"):
        if (folder / stage / "checkpoints").is_dir():
            return str(folder / stage)
    raise UserError(f"{folder} has no checkpoint: give PARENT=path.")
