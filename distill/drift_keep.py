"""Measure rows of a drift table group by group, and keep what is finished: an interrupted measurement goes on.

A group is GROUP characters; what is kept of it lies under a key of all that it depends on. Rows of a run are kept in
its report, controls beside the data: they are the same for every run. Case and rows -> Windows [N, R, ...] by row.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill import drift_rows
from distill.data import recurrent
from distill.data.dataset import LatentDataset
from distill.data.recurrent import Case, Plan, recurrent_case
from distill.data.version import source_hash
from distill.drift_rows import Source
from distill.evaluate import stills
from distill.tracking import progress
from evaluation import geometry, outlines, quality, windows
from evaluation.judge import Judge
from evaluation.windows import Look, Windows, joined

GROUP = 8  # characters that stream together
CODE = (recurrent, drift_rows, windows, geometry, outlines, quality)


@dataclass
class Keeper:
    """Where windows are made and kept. `rows` [N] are the characters; `seconds` is what each row cost in this call:
    (by the clock, CPU, windows)."""

    dataset: LatentDataset
    rows: Tensor
    plan: Plan
    judge: Judge
    report: Path  # of the run
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self):
        self.groups = self.rows.split(GROUP)
        self._case = lru_cache(maxsize=1)(lambda number: recurrent_case(self.dataset, self.groups[number], self.plan))

    def driven(self) -> tuple[Tensor, Tensor]:
        """What the audio drives, mouth and nod [N, A]."""
        parts = []
        for number in range(len(self.groups)):
            path = self._shelf("driven", self._beside()) / f"group-{self._name(number)}.safetensors"
            if not path.is_file():
                case = self.case(number)
                save_file({"mouth": case.driven_mouth.contiguous(), "nod": case.driven_nod.contiguous()}, path)
            parts.append(load_file(path))
        return torch.cat([part["mouth"] for part in parts]), torch.cat([part["nod"] for part in parts])

    def case(self, number: int) -> Case:
        """The streams of a group; the last one asked for is held."""
        return self._case(number)

    def references(self, number: int) -> tuple[Tensor, Tensor]:
        """Reference images [N, R, 3, S, S] of a group as networks get them, and which are there [N, R]."""
        batch = self.dataset.all().select(self.groups[number])
        return stills(batch, self.dataset.codec()), batch.cond.ref_mask

    def measure(self, sources: Sequence[Source], beside_data: bool = False) -> dict[str, Windows]:
        """Every row of these, group after group, so that each group's streams are laid out once."""
        root = self._beside() if beside_data else self.report / "drift"
        shelves = {source.name: self._shelf(source.name, root, source) for source in sources}
        jobs = [(number, source) for number in range(len(self.groups)) for source in sources]
        paths = {
            (number, source.name): shelves[source.name] / f"group-{self._name(number)}.safetensors"
            for number, source in jobs
        }
        missing = [(number, source) for number, source in jobs if not paths[number, source.name].is_file()]
        total = sum(len(self._spans(source)) for _, source in missing)
        what = "controls" if beside_data else ", ".join(source.name for source in sources)
        for _ in progress(self._play(missing, paths), f"drift: {what}", total):
            pass
        return {
            source.name: self._whole(
                source, joined([Windows.load(paths[number, source.name]) for number in range(len(self.groups))])
            )
            for source in sources
        }

    def _play(self, jobs: list[tuple[int, Source]], paths: dict[tuple[int, str], Path]) -> Iterator[None]:
        """Play what is missing and keep it; yields once per window."""
        for number, source in jobs:
            case, spans = self.case(number), self._spans(source)
            look = Look(self.judge, *self.references(number), source.chunk_frames)
            cost = self.seconds.setdefault(source.name, [0.0, 0.0, 0.0])
            wall, cpu = time.perf_counter(), time.process_time()
            frames = source.play(case, [(0, recurrent.HALF), *spans])
            look.sink(next(frames))
            for (start, _), shown in zip(spans, frames, strict=True):
                look.window(start, shown)
                yield
            look.windows(len(self.plan.parts())).save(paths[number, source.name])
            cost[0] += time.perf_counter() - wall
            cost[1] += time.process_time() - cpu
            cost[2] += len(spans)

    def _spans(self, source: Source) -> list[tuple[int, int]]:
        spans = self.plan.spans()
        return spans[: source.returns * len(self.plan.parts())] if source.returns else spans

    def _whole(self, source: Source, found: Windows) -> Windows:
        return found.repeated(self.plan.returns) if source.still else found

    def _name(self, number: int) -> str:
        """A group by its characters: another number of them finds the groups that they have in common."""
        group = self.groups[number]
        return f"{int(group[0]):04d}-{len(group)}"

    def _key(self) -> dict[str, object]:
        return {
            "plan": asdict(self.plan),
            "data": self.dataset.fingerprint,
            "code": source_hash((*CODE, sys.modules[__name__])),
            "judge": self.judge.about.get("content"),
        }

    @property
    def measured_by(self) -> str:
        """A hash of how it is measured: plan, data, code, judge. Rows of one and the same can be compared."""
        return hashlib.sha256(json.dumps(self._key(), sort_keys=True).encode()).hexdigest()[:12]

    def _beside(self) -> Path:
        return self.dataset.folder / "drift" / f"controls-{self.measured_by}"

    def _shelf(self, name: str, root: Path, source: Source | None = None) -> Path:
        """The folder of a row's groups; one that holds other windows is emptied first."""
        told = self._key()
        if source is not None:
            told |= {"source": source.source, "chunk": source.chunk_frames, "returns": source.returns}
        key, folder = json.dumps(told, sort_keys=True), root / name.replace(" ", "-")
        if not (folder / "key.json").is_file() or (folder / "key.json").read_text(encoding="utf-8") != key:
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("group-*.safetensors"):
                old.unlink()
            (folder / "key.json").write_text(key, encoding="utf-8")
        return folder
