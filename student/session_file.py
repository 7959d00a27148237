"""A running session on disk: one safetensors file whose header carries the rest as JSON, replaced in one rename.

Kept is what is true after the last delivered chunk (caches, heard audio) and the audio that still waits; a chunk made
ahead is made again, from the same noise. Keys and values of the references are computed again from their latents. A
promised chunk stays a promise: written now, it would differ in its last bits from what the next step makes of it.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from student.hearing import Heard
from student.kv_cache import ChunkKV, KVCache
from student.promise import Cache, Promise

if TYPE_CHECKING:
    from student.online import OnlineLPM
    from student.session import Session

NAME, VERSION = "session.safetensors", 2
CACHES = {"draft_cache": "_backbone", "final_cache": "_refiner"}
TOLD = ("speak", "listen", "text", "text_mask")  # conditions of a promised chunk; its references are the session's


def save(session: Session, folder: Path) -> Path:
    """folder/session.safetensors; returns the folder."""
    caches: dict[str, dict[str, Any]] = {}
    facts = {
        "version": VERSION,
        "model": session.model.fingerprint(),
        "index": session.index,
        "seed": session.seed,
        "look_ahead": session.look_ahead,
        "texts": session.texts,
        "frames": session.heard.frames,
        "caches": caches,
    }
    tensors = {
        "refs": session.refs,
        "heard.features": session.heard.features,
        "heard.samples": session.heard.samples,
        "waiting": session.waiting.look(0, session.waiting.length),
    }
    for name in CACHES:
        cache: Cache | None = getattr(session, name)
        if cache is None:  # no refiner
            continue
        promised = isinstance(cache, Promise)
        if isinstance(cache, Promise):
            tensors |= {f"{name}.promise.x": cache.x, f"{name}.promise.t": cache.t}
            tensors |= {f"promise.{field}": getattr(cache.cond, field) for field in TOLD}  # one chunk, of both
            cache = cache.before
        every = (cache, *cache.later)
        shapes = [{"sink": len(one.sink), "window": len(one.window)} for one in every]
        caches[name] = {"seen": cache.seen, "steps": shapes, "promised": promised}
        for step, one in enumerate(every):
            for place, chunks in (("sink", one.sink), ("window", one.window)):
                for number, chunk in enumerate(chunks):
                    for layer, (k, v) in enumerate(chunk):
                        prefix = f"{name}.{step}.{place}.{number}.{layer}"
                        tensors |= {f"{prefix}.k": k, f"{prefix}.v": v}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{NAME}.{os.getpid()}.partial"
    save_file(
        {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()},
        temporary,
        {"session": json.dumps(facts)},
    )
    os.replace(temporary, folder / NAME)
    return folder


def resume(model: OnlineLPM, folder: Path) -> Session:
    """The session back, on the model's device. ValueError when the file is missing, damaged, or of another model."""
    from student.session import Session

    path = folder / NAME
    if not path.is_file():
        raise ValueError(f"{folder} holds no saved session: {NAME} is missing.")
    try:
        with safe_open(path, "pt", device=str(model.device)) as file:
            facts = json.loads((file.metadata() or {})["session"])
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no saved session or is damaged ({error}).") from None
    if facts.get("version") != VERSION:
        raise ValueError(f"{path} was saved by another version ({facts.get('version')}, this one reads {VERSION}).")
    if facts["model"] != model.fingerprint():
        raise ValueError(f"{path} belongs to another model: load the one it was saved with.")
    session = Session(model, tensors["refs"], seed=facts["seed"], look_ahead=facts["look_ahead"])
    session.index = facts["index"]
    session.texts = [(int(first), str(text)) for first, text in facts["texts"]]
    session.heard = Heard(tensors["heard.features"].cpu(), tensors["heard.samples"].cpu(), facts["frames"])
    session.waiting.push(tensors["waiting"].cpu())
    depth = model.backbone.dit.config.depth
    for name, shape in facts["caches"].items():
        blank: KVCache = getattr(session, name)
        filled = []
        for step, one in enumerate((blank, *blank.later)):
            parts: dict[str, Any] = {
                place: tuple(
                    _chunk(tensors, f"{name}.{step}.{place}.{number}", depth)
                    for number in range(shape["steps"][step][place])
                )
                for place in ("sink", "window")
            }
            filled.append(replace(one, seen=shape["seen"], **parts))
        cache = replace(filled[0], later=tuple(filled[1:]))
        setattr(session, name, _promise(session, name, tensors, cache) if shape["promised"] else cache)
    return session


def _promise(session: Session, name: str, tensors: dict[str, Tensor], before: KVCache) -> Promise:
    told = {field: tensors[f"promise.{field}"] for field in TOLD}
    cond = replace(session.told(session.heard.features, ""), **told)
    x, t = (tensors[f"{name}.promise.{what}"] for what in "xt")
    return Promise(getattr(session, CACHES[name]), x, t, cond, before)


def _chunk(tensors: dict[str, Tensor], prefix: str, depth: int) -> ChunkKV:
    return [(tensors[f"{prefix}.{layer}.k"], tensors[f"{prefix}.{layer}.v"]) for layer in range(depth)]
