"""FSDP2: parameters, gradients and moments of every network in shards, block by block (`torch.distributed.fsdp`).

A block's weights are gathered for its forward and backward pass and freed after. Students are run through `DiT.run`,
which is therefore registered as a forward method. Compute weights are gathered in bf16 from fp32 masters when the
recipe says bf16; autocast does the rest, so that float64 times stay what they are (`cast_forward_inputs=False`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from distill.config import OptimConfig
from distill.contracts import Roles
from distill.engine.config import EngineConfig
from distill.engine.pieces import Piece, Pieces
from distill.engine.replicated import Replicated
from distill.state.ema import EMA
from student.causal_dit import CausalDiT
from teacher.adapted import AdaptedDiT
from teacher.dit import DiT


class Pieced(Replicated):
    """What FSDP2 and ZeRO share: averages by exchange, one norm over all shards."""

    sharded = True

    @contextmanager
    def averaged(self, roles: Roles, role: str, ema: EMA) -> Iterator[Roles]:
        """Masters and averages change places for the length of the block: no second network is needed."""
        self._exchange(role, ema)
        try:
            yield roles
        finally:
            self._exchange(role, ema)

    def mixed(self, dit: DiT) -> None:
        """Weights that computation sees are bf16 where the recipe says so: every run of the network is autocast then,
        those for samples included, which a trainer with whole networks makes in fp32."""
        if self.precision == "bf16":
            run = dit.run

            def autocast_run(*arguments: Any, **named: Any) -> Any:
                with self.autocast():
                    return run(*arguments, **named)

            setattr(dit, "run", autocast_run)  # noqa: B010

    @torch.no_grad()
    def _exchange(self, role: str, ema: EMA) -> None:
        for name, master in self.pieces(role).named_parameters():
            kept = master.clone()
            master.copy_(ema.average[name])
            ema.average[name].copy_(kept)
        self.refresh(role)


class FSDP2(Pieced):
    """All roles sharded over all processes."""

    def __init__(self, precision: str, config: EngineConfig):
        super().__init__(precision, config)
        # A block's output is a view; torch warns of in-place operations on it, of which there are none.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        self.mesh = init_device_mesh(self.device.type, (self.processes,))

    def empty(self, trained: bool) -> AbstractContextManager[Any] | None:
        return torch.device("meta")

    def place(self, models: dict[str, nn.Module], configs: dict[str, OptimConfig], clip: float, compile: bool) -> None:
        self.models = models
        in_pieces(models)
        for role, model in models.items():
            trained = role in configs
            model.requires_grad_(trained)
            if compile and trained:
                self.compile(model)
            offload = self.config.offload_optimizer if trained else self.config.offload_frozen
            self.shard(model, offload)
        self.optimizers = {role: self.optimizer(models[role], config) for role, config in configs.items()}

    def shard(self, model: nn.Module, offload: bool) -> None:
        """Shard one network in place; one made on the meta device stays to be filled."""
        dit = inner(model)
        policy: dict[str, Any] = {
            "mesh": self.mesh,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=torch.bfloat16 if self.precision == "bf16" else None,
                reduce_dtype=torch.float32 if self.precision == "bf16" else None,
                cast_forward_inputs=False,
            ),
            "offload_policy": CPUOffloadPolicy() if offload and self.device.type == "cuda" else OffloadPolicy(),
            "reshard_after_forward": self.config.reshard,
        }
        is_meta = next(dit.parameters()).is_meta
        if not is_meta:
            dit.to(self.device)
        heads = getattr(dit, "heads", None)
        # A view has adapters alone, its base is sharded as a network of its own.
        blocks: list[nn.Module] = list(dit.adapters.layers.values() if isinstance(dit, AdaptedDiT) else dit.blocks)
        for module in [*blocks, *(heads.children() if heads is not None else [])]:
            fully_shard(module, **policy)
        fully_shard(dit, **policy)
        self.mixed(dit)
        register_fsdp_forward_method(dit, "run")
        if is_meta:
            dit.to_empty(device="cpu" if offload else self.device)
        wrong = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
        if wrong or not isinstance(dit, FSDPModule):
            raise RuntimeError(f"FSDP2 left {wrong[:1]} whole.")

    def clip(self, role: str, limit: float) -> Tensor:
        norm = nn.utils.clip_grad_norm_(self.models[role].parameters(), limit)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def backward(self, role: str, loss: Tensor, last: bool = True) -> None:
        loss.backward()
        # A recomputed layer that no gradient reaches, as the last block's behind references, stays gathered.
        self.refresh(role)

    def pieces(self, role: str) -> Pieces:
        return Pieces(_piece(name, p, p) for name, p in self.models[role].named_parameters() if _rows(p))

    def moments(self, role: str) -> tuple[dict[str, Pieces], dict[str, Tensor]]:
        state = self.optimizers[role].state
        named = [(name, p) for name, p in self.models[role].named_parameters() if p in state]
        parts = {
            key: Pieces(_piece(name, p, state[p][key]) for name, p in named if _rows(p))
            for key in ("exp_avg", "exp_avg_sq")
        }
        return parts, {name: _local(state[p]["step"]) for name, p in named}

    def restore_moments(self, role: str, read: Callable[[str, int, int], Tensor | None]) -> None:
        state = self.optimizers[role].state
        for name, p in self.models[role].named_parameters():
            count = read(f"{name}/step", 0, 1)
            if count is None:
                continue
            state[p] = {"step": count.reshape(()).to(_local(p).device)}
            for key in ("exp_avg", "exp_avg_sq"):
                state[p][key] = torch.zeros_like(p.detach())
                if _rows(p):
                    piece = _piece(name, p, state[p][key])
                    saved = read(f"{name}/{key}", piece.start, piece.start + len(piece.tensor))
                    assert saved is not None
                    piece.tensor.copy_(saved)

    def refresh(self, role: str) -> None:
        for module in self.models[role].modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def in_pieces(models: dict[str, nn.Module]) -> None:
    """Tell students that streams, too, go through `DiT.run`: there weights are gathered and precision is chosen."""
    for model in models.values():
        if isinstance(model, CausalDiT):
            model.whole = False


def inner(model: nn.Module) -> DiT:
    """The DiT of a role, causal or not."""
    dit = model.dit if isinstance(model, CausalDiT) else model
    assert isinstance(dit, DiT)
    return dit


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _rows(parameter: Tensor) -> int:
    return len(_local(parameter)) if parameter.ndim else 1


def _piece(name: str, parameter: Tensor, value: Tensor) -> Piece:
    """Shards are whole rows, `ceil(rows / processes)` of them in each process but the last ones."""
    assert isinstance(parameter, DTensor)
    per_process = -(-parameter.shape[0] // parameter.device_mesh.size())
    row = parameter.shape[1:].numel()
    start = parameter.device_mesh.get_local_rank() * per_process * row
    return Piece(name, tuple(parameter.shape), start, _local(value.detach()).flatten())
