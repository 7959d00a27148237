"""Where and how the arithmetic runs: devices, precision, processes. `Engine` is one process; its subclasses spread the
same interface over many. Nothing outside distill/engine knows about distribution.

`place` takes the networks, `backward` .. `zero_grad` make one update of one role, `pieces` and `moments` show what of a
role's state lies in this process, and `fill` puts there what a checkpoint holds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from distill.config import OptimConfig
from distill.contracts import Roles
from distill.engine.config import EngineConfig
from distill.engine.pieces import Pieces
from distill.state.ema import EMA
from teacher.blocks import Block

Value = TypeVar("Value")


class Engine:
    """One process: fp32 master weights, autocast compute, clipping."""

    sharded = False  # whether a network lies in pieces, so that all processes must run it together

    def __init__(self, precision: str = "fp32", config: EngineConfig | None = None):
        self.config, self.precision = config or EngineConfig(), precision
        AcceleratorState._reset_state()  # stages of one process may differ in precision; the process group stays
        self.accelerator = Accelerator(
            mixed_precision="bf16" if precision == "bf16" else "no", cpu=not torch.cuda.is_available()
        )
        self.models: dict[str, nn.Module] = {}
        self.optimizers: dict[str, Any] = {}

    # ---- who and where ------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def processes(self) -> int:
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[None]:
        return self.accelerator.autocast()

    def __str__(self) -> str:
        return f"{self.config.kind}, {self.device.type}, {self.precision}"

    # ---- networks -----------------------------------------------------------------------------------------

    def empty(self, trained: bool) -> AbstractContextManager[Any] | None:
        """Where networks are made when they are too large to be whole in each process: a context in which their
        construction allocates (almost) nothing, to be filled from the checkpoint later. None: make them whole."""
        return None

    def place(self, models: dict[str, nn.Module], configs: dict[str, OptimConfig], clip: float, compile: bool) -> None:
        """Put every network where it computes and give each role in `configs` its optimizer."""
        self.models = models
        for role, model in models.items():
            model.requires_grad_(role in configs)
            if compile and role in configs:
                self.compile(model)
        for model in models.values():
            model.to(self.device)
        self.optimizers = {role: self.optimizer(models[role], config) for role, config in configs.items()}

    def optimizer(self, module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
        """AdamW over fp32 masters. At the learning rates of distillation a bf16 weight would not move at all."""
        wrong = [name for name, p in module.named_parameters() if p.dtype not in (torch.float32, torch.float64)]
        if wrong:
            raise ValueError(f"Trained weights must be fp32 masters, {wrong[0]} is not: load the network in fp32.")
        return torch.optim.AdamW(
            module.parameters(), config.lr, config.betas, config.eps, config.weight_decay, fused=True
        )

    def compile(self, model: nn.Module) -> None:
        """Compile a network block by block, in place; names of weights stay. A quarter off a step on a CPU."""
        for module in model.modules():
            if isinstance(module, Block):
                module.compile()

    # ---- one update ---------------------------------------------------------------------------------------

    def backward(self, role: str, loss: Tensor, last: bool = True) -> None:
        """Add the gradients of `loss`; `last` says that the update's micro-steps end here."""
        self.accelerator.backward(loss)

    def clip(self, role: str, limit: float) -> Tensor:
        """Clip the joint gradient norm of the whole network to `limit` and return the norm before."""
        return self.accelerator.clip_grad_norm_(list(self.models[role].parameters()), limit)

    def step(self, role: str, rate: float) -> None:
        """Move the weights of `role` at this learning rate."""
        for group in self.optimizers[role].param_groups:
            group["lr"] = rate
        self.optimizers[role].step()

    def zero_grad(self, role: str) -> None:
        """Forget the gradients, used or not."""
        self.optimizers[role].zero_grad(set_to_none=True)

    # ---- state --------------------------------------------------------------------------------------------

    def average(self, role: str, decay: float, start_step: int) -> EMA:
        """A moving average of what this process holds of `role`."""
        return EMA(self.pieces(role) if self.sharded else self.models[role], decay, start_step)

    def update_average(self, ema: EMA, role: str, step: int) -> None:
        ema.update(self.pieces(role) if self.sharded else self.models[role], step)

    @contextmanager
    def averaged(self, roles: Roles, role: str, ema: EMA) -> Iterator[Roles]:
        """The roles with `role`'s averaged weights: a copy here, an exchange where networks lie in pieces."""
        copied = copy.deepcopy(self.models[role]).requires_grad_(False).eval()
        ema.copy_to(copied)
        yield replace(roles, models={**roles.models, role: copied})

    def pieces(self, role: str) -> Pieces:
        """The fp32 masters that lie in this process."""
        raise NotImplementedError("only where networks lie in pieces")

    def moments(self, role: str) -> tuple[dict[str, Pieces], dict[str, Tensor]]:
        """The optimizer's moments beside `pieces`, by name, and the step count of every parameter."""
        raise NotImplementedError("only where networks lie in pieces")

    def restore_moments(self, role: str, read: Callable[[str, int, int], Tensor | None]) -> None:
        """Fill the moments: `read("weight/exp_avg", start, stop)` gives elements, None where nothing was saved."""
        raise NotImplementedError("only where networks lie in pieces")

    def refresh(self, role: str) -> None:
        """To be called after `pieces` were written to: computation takes up the new masters."""

    # ---- agreement ----------------------------------------------------------------------------------------

    def mean(self, values: dict[str, Any]) -> dict[str, Any]:
        """Scalars averaged over the processes, which must all name the same."""
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process."""
        return flag

    def from_main(self, value: Value) -> Value:
        """Rank 0's value (plain data), everywhere."""
        return value

    def gather(self, value: Value) -> list[Value]:
        """The values (plain data) of all processes, in order, everywhere."""
        return [value]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The block runs in rank 0 first and in the others after it."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()
