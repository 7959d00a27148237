"""One part of a checkpoint, read by slices, however it was written.

    model.safetensors                                       whole
    model-00001-of-00003.safetensors + ...index.json        whole, in several files (`make consolidate` above 5 GB)
    shard-00001-of-00008.safetensors                        every process's pieces: flat runs of elements, with
                                                            {name: [start, shape]} in the file's metadata

A run that resumes on another number of processes, or on one, reads the runs that it needs from whoever wrote them.
torch's own sharded format and DeepSpeed's keep pickles, which nothing here reads.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill.errors import ExitCode, UserError

TENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
Flat = tuple[str, tuple[int, ...], int, Tensor]  # name, shape of the whole, first element, elements [n]


class Part:
    """`names` -> shapes; `read` gives elements, `whole` a tensor."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.names: dict[str, tuple[int, ...]] = {}
        self._runs: dict[str, list[tuple[int, int, Path, bool]]] = defaultdict(list)  # start, stop, file, whole
        self._open: dict[Path, safe_open] = {}
        shards = sorted(self.folder.glob("shard-*-of-*.safetensors"))
        if shards:
            self._take_shards(shards)
        else:
            self._take_whole()

    def _take_shards(self, files: list[Path]) -> None:
        expected = int(files[0].stem.rpartition("-")[2])
        if len(files) != expected:
            raise UserError(f"{self.folder} has {len(files)} of {expected} shards.", ExitCode.CHECKPOINT)
        for file in files:
            handle = self._handle(file)
            for name, (start, shape) in json.loads(handle.metadata()["pieces"]).items():
                count = prod(handle.get_slice(name).get_shape())
                self.names[name] = tuple(shape)
                self._runs[name].append((start, start + count, file, False))
        for name, shape in self.names.items():
            self._runs[name].sort()
            end = 0
            for start, stop, _, _ in self._runs[name]:
                end = stop if start == end else -1
            if end != prod(shape):
                raise UserError(f"The shards in {self.folder} do not make up {name}.", ExitCode.CHECKPOINT)

    def _take_whole(self) -> None:
        index = self.folder / INDEX
        if index.is_file():
            files = sorted({self.folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        else:
            files = [self.folder / TENSORS]
        for file in files:
            if not file.is_file():
                raise UserError(
                    f"The checkpoint {self.folder.parent} has no part '{self.folder.name}'.", ExitCode.CHECKPOINT
                )
            handle = self._handle(file)
            for name in handle.keys():  # noqa: SIM118 (a handle is no mapping)
                self.names[name] = tuple(handle.get_slice(name).get_shape())
                self._runs[name].append((0, prod(self.names[name]), file, True))

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor."""
        found = []
        for first, last, file, whole in self._runs[name]:
            low, high = max(start, first), min(stop, last)
            if low < high:
                handle = self._handle(file)
                found.append(
                    _elements(handle, name, self.names[name], low, high)
                    if whole
                    else handle.get_slice(name)[low - first : high - first]
                )
        return torch.cat(found) if len(found) != 1 else found[0]

    def whole(self, name: str) -> Tensor:
        """The tensor in its shape."""
        shape = self.names[name]
        if [run[3] for run in self._runs[name]] == [True]:
            return self._handle(self._runs[name][0][2]).get_tensor(name)
        return self.read(name, 0, prod(shape)).reshape(shape)

    def _handle(self, file: Path) -> safe_open:
        if file not in self._open:
            self._open[file] = safe_open(file, "pt")
        return self._open[file]


def _elements(handle: safe_open, name: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
    """Only the rows that hold them are read."""
    if not shape:
        return handle.get_tensor(name).reshape(1)
    row = prod(shape[1:])
    first, last = start // row, -(-stop // row)
    return handle.get_slice(name)[first:last].flatten()[start - first * row : stop - first * row]


def write_pieces(folder: Path, pieces: Iterable[Flat], index: int, count: int) -> Path:
    """This process's shard (`index` of `count`, from 0) of a part."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, places = {}, {}
    for name, shape, start, tensor in pieces:
        tensors[name] = tensor.detach().cpu().contiguous().clone()
        places[name] = [start, list(shape)]
    path = folder / f"shard-{index + 1:05d}-of-{count:05d}.safetensors"
    save_file(tensors, path, {"pieces": json.dumps(places)})
    return path


def write_whole(folder: Path, part: Part, limit: int) -> None:
    """The part as whole tensors, in one file, or in several of at most `limit` bytes (a tensor at least) with an
    index. No more than one file is in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    files: list[list[str]] = [[]]
    total = size = 0
    for name in part.names:
        needed = part.read(name, 0, 1).element_size() * prod(part.names[name])
        if files[-1] and size + needed > limit:
            files.append([])
            size = 0
        files[-1].append(name)
        size, total = size + needed, total + needed
    where: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        file = TENSORS if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file({name: part.whole(name).contiguous() for name in names}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    if len(files) > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1))
