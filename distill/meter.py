"""Bytes by kind as they come and go, and the moment when there are most of them.

`Meter.hold` gives a tensor on the meta device that stands for so many bytes of a kind and counts until it is let go, so
that Python and autograd decide how long a fake activation lives, as they do for a real one. Inside `Meter.counting`
the storages of real tensors count as buffers.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = ("weights", "gradients", "optimizer", "EMA", "KV cache", "activations", "buffers")


class Meter:
    """live: bytes by kind now; peak: bytes by kind at the moment of the largest sum."""

    def __init__(self) -> None:
        self.live: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        self.peak: dict[str, float] = dict(self.live)

    @property
    def total(self) -> float:
        """Bytes at the peak."""
        return sum(self.peak.values())

    def hold(self, size: float, kind: str, shape: tuple[int, ...] = ()) -> Tensor:
        """A meta tensor of `shape` that counts as `size` bytes of `kind` for as long as its storage lives."""
        tensor = torch.empty(shape, device="meta")
        self.track(tensor, size, kind)
        return tensor

    def track(self, tensor: Tensor, size: float, kind: str) -> None:
        """Count `size` bytes until the storage of `tensor` is let go."""
        self.add(kind, size)
        weakref.finalize(tensor.untyped_storage(), self.add, kind, -size)

    def add(self, kind: str, size: float) -> None:
        """More (or less) bytes of a kind from now on."""
        self.live[kind] += size
        self.touch()

    def touch(self, **extra: float) -> None:
        """Note a moment at which there are `extra` bytes of activations or others besides what is live."""
        now = {kind: size + extra.get(kind, 0.0) for kind, size in self.live.items()}
        if sum(now.values()) > self.total:
            self.peak = now

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Within the block, new storages of tensors on real devices are buffers."""
        with _Storages(self):
            yield


class _Storages(TorchDispatchMode):
    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if storage not in self.known:
                    self.known.add(storage)
                    self.meter.track(tensor, storage.nbytes(), "buffers")
        return out
