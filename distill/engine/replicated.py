"""Every process holds everything and computes on its part of the batch (data parallel).

Gradients are averaged by one explicit all-reduce after the last micro-step, not by torch's DDP wrapper: its hooks wait
for the module's forward(), and students are run through `velocity`, `remember` and `DiT.run`. Nothing overlaps with the
backward pass; where that matters, networks are large and sharded anyway.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distill.engine.config import EngineConfig
from distill.engine.plain import Engine

Value = TypeVar("Value")
BUCKET = 2**24  # elements that travel together


class Replicated(Engine):
    """DDP, and what all engines of several processes have in common."""

    def __init__(self, precision: str, config: EngineConfig):
        if not dist.is_initialized():
            backend = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo"
            alone: dict[str, Any] = {}
            if not dist.is_torchelastic_launched():  # one process: FSDP2 and ZeRO want a group nevertheless
                alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
            dist.init_process_group(backend, timeout=timedelta(minutes=config.timeout_minutes), **alone)
        super().__init__(precision, config)

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def processes(self) -> int:
        return dist.get_world_size()

    def __str__(self) -> str:
        return f"{super().__str__()}, {self.processes} processes over {dist.get_backend()}"

    def backward(self, role: str, loss: Tensor, last: bool = True) -> None:
        loss.backward()
        if last:
            all_reduce_mean([p.grad for p in self.models[role].parameters() if p.grad is not None])

    def mean(self, values: dict[str, Any]) -> dict[str, Any]:
        names = sorted(values)
        stacked = torch.stack([torch.as_tensor(values[name], dtype=torch.float32).cpu() for name in names])
        dist.all_reduce(stacked)
        return dict(zip(names, stacked / self.processes, strict=True))

    def any(self, flag: bool) -> bool:
        raised = torch.tensor(int(flag))
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return bool(raised)

    def from_main(self, value: Value) -> Value:
        box = [value]
        dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: Value) -> list[Value]:
        box: list[Any] = [None] * self.processes
        dist.all_gather_object(box, value)
        return box

    def barrier(self) -> None:
        dist.barrier()


def all_reduce_mean(tensors: list[Tensor]) -> None:
    """Average every tensor over the processes, in place, a bucket of them at a time."""
    bucket: list[Tensor] = []
    for index, tensor in enumerate(tensors):
        bucket.append(tensor)
        if index + 1 == len(tensors) or sum(t.numel() for t in bucket) >= BUCKET:
            flat = torch.cat([t.flatten() for t in bucket])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            for t, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                t.copy_(part.view_as(t))
            bucket = []
