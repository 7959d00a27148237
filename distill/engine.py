"""Where and how the arithmetic runs: the one file that knows about accelerate, devices, precision and processes."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from distill.config import OptimConfig
from teacher.blocks import Block


class Engine:
    """A thin layer over accelerate: fp32 master weights, autocast compute, clipping, rank and barrier."""

    def __init__(self, precision: str = "fp32"):
        mixed = "bf16" if precision == "bf16" else "no"
        AcceleratorState._reset_state()  # stages of one process may differ in precision; the process group stays
        self.accelerator = Accelerator(mixed_precision=mixed, cpu=not torch.cuda.is_available())

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def autocast(self) -> AbstractContextManager[None]:
        return self.accelerator.autocast()

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

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        """Clip the joint gradient norm to `limit` and return the norm before."""
        return self.accelerator.clip_grad_norm_(list(parameters), limit)

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()
