"""DeepSpeed ZeRO-1, 2 and 3: one engine per trained role, driven from outside its forward().

Students are run through `DiT.run`, so DeepSpeed's own forward() and step() never are: `backward` announces itself to
the optimizer, `clip` asks it for the norm over all shards, `step` moves it. Under ZeRO-3 weights are gathered submodule
by submodule, without the prefetching that expects the same order of calls at every step; the parameters that another
module reads are registered with their reader. Frozen networks are whole under ZeRO-1 and 2 and sharded as under FSDP2
under ZeRO-3.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distill.config import OptimConfig
from distill.engine.config import EngineConfig
from distill.engine.fsdp import FSDP2, in_pieces, inner
from distill.engine.pieces import Piece, Pieces
from distill.engine.plain import Engine
from distill.engine.replicated import BUCKET
from distill.errors import UserError
from teacher.blocks import Block
from teacher.dit import DiT

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeRO(FSDP2):
    """Optimizer state (1), gradients (2) and weights (3) of every trained role over all processes."""

    def __init__(self, precision: str, config: EngineConfig):
        super().__init__(precision, config)
        self.stage = int(config.kind[-1])
        self.deepspeed = _import(self.device.type)
        self.norms: dict[str, Tensor] = {}
        self.engines: dict[str, Any] = {}

    def empty(self, trained: bool) -> AbstractContextManager[Any] | None:
        if self.stage < 3:
            return None
        if not trained:
            return torch.device("meta")
        # The settings say the dtype: one given beside them is passed over on a CPU without fp16 (DeepSpeed 0.19).
        return self.deepspeed.zero.Init(config_dict_or_path=self.settings(1.0))

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def place(self, models: dict[str, nn.Module], configs: dict[str, OptimConfig], clip: float, compile: bool) -> None:
        self.models = models
        in_pieces(models)
        for role, model in models.items():
            trained = role in configs
            model.requires_grad_(trained)
            if compile and trained:
                self.compile(model)
            if trained:
                self._engine(role, model, configs[role], clip)
            elif self.stage == 3:
                self.shard(model, self.config.offload_frozen)
            else:
                model.to(self.device)

    def _engine(self, role: str, model: nn.Module, config: OptimConfig, clip: float) -> None:
        whole = {name: p.data for name, p in model.named_parameters() if not hasattr(p, "ds_id")}
        given = Engine.optimizer(self, model, config) if self.dtype == torch.float32 else _adamw(model, config)
        engine, optimizer, _, _ = self.deepspeed.initialize(
            model=model, optimizer=given, config=self.settings(clip), dist_init_required=False
        )
        if engine.zero_optimization_stage() != self.stage or not hasattr(optimizer, "dp_process_group"):
            raise RuntimeError(f"DeepSpeed set up {type(optimizer).__name__} instead of ZeRO-{self.stage}.")
        self.mixed(inner(model))
        if self.stage == 3:
            offload = optimizer.parameter_offload
            offload.fwd_pre_hook.remove()  # it records the order of calls, which differs from rollout to rollout
            _keep_while_repeating(offload.get_param_coordinator())
            self._register(inner(model))
        self.engines[role], self.optimizers[role] = engine, optimizer
        if self.dtype != torch.float32 and whole:
            self._exact(role, whole)

    @torch.no_grad()
    def _exact(self, role: str, whole: dict[str, Tensor]) -> None:
        """DeepSpeed makes its masters from bf16 weights: put back the fp32 weights that a network came with."""
        for piece in self.pieces(role):
            start = piece.start
            piece.tensor.copy_(whole[piece.name].flatten()[start : start + len(piece.tensor)])
        self.refresh(role)

    def _register(self, dit: DiT) -> None:
        """Tell DeepSpeed of parameters that are read outside the module they belong to. A block is handed the audio
        offsets as an input and has to find them gathered when it starts."""
        blocks = [module for module in dit.modules() if isinstance(module, Block)]
        for index, block in enumerate(blocks):
            offsets = (dit.speak_embedding, dit.listen_embedding)[index % 2].offsets
            listener = block.cross_attn
            for parameter in (listener.audio_k.weight, listener.audio_v.weight, offsets):
                self.deepspeed.zero.register_external_parameter(listener, parameter)
            self.deepspeed.zero.register_external_parameter(block, offsets)

    def settings(self, clip: float) -> dict[str, Any]:
        """DeepSpeed's configuration: what follows from recipe and engine, the file's `deepspeed` block laid over it."""
        zero: dict[str, Any] = {"stage": self.stage, "overlap_comm": self.device.type == "cuda"}
        zero["reduce_bucket_size"] = BUCKET  # its own default would cost every trained network 1 GB of bf16
        if self.stage == 3:
            zero |= {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
            # Its thrifty linear layer would replace torch's for every network of the process.
            zero |= {"stage3_param_persistence_threshold": 0, "memory_efficient_linear": False}
        if self.config.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        given = dict(self.config.deepspeed)
        zero |= given.pop("zero_optimization", {})
        return {
            "train_micro_batch_size_per_gpu": 1,  # only counted with; batches are made elsewhere
            "gradient_clipping": clip,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
            "bf16": {"enabled": self.precision == "bf16", "check_grad_overflow": True},
            "zero_optimization": zero,
            **given,
        }

    # ---- one update ---------------------------------------------------------------------------------------

    def backward(self, role: str, loss: Tensor, last: bool = True) -> None:
        if not _reaches(loss, self.models[role]):  # as the first pass of a replayed rollout, which ends at x0
            loss.backward()
            return
        engine, optimizer = self.engines[role], self.optimizers[role]
        running = self.deepspeed.runtime.zero.parameter_offload.FWD_MODULE_STACK
        depth = len(running)
        engine.set_gradient_accumulation_boundary(last)
        optimizer.clear_backward_seen_flag()
        # What engine.forward() would have hung on its output.
        loss.register_hook(lambda gradient: engine._backward_prologue())
        engine.backward(loss, scale_wrt_gas=False)
        engine.micro_steps += 1
        del running[depth:]  # blocks that checkpointing repeated only as far as their values were needed

    def clip(self, role: str, limit: float) -> Tensor:
        """The norm; `step` clips by it."""
        optimizer = self.optimizers[role]
        groups = optimizer._get_norm_groups() if self.stage == 3 else [optimizer.scaled_global_norm()]
        self.norms[role] = norm = torch.stack([torch.as_tensor(group).float() for group in groups]).norm()
        # DeepSpeed's sign of a norm that is not finite is -1, or inf for nan.
        invalid = any(float(group) < 0 or not math.isfinite(float(group)) for group in groups)
        return torch.full_like(norm, torch.nan) if invalid else norm

    def step(self, role: str, rate: float) -> None:
        for group in self.optimizers[role].param_groups:
            group["lr"] = rate
        with self._norm(role, self.norms[role]):
            self.optimizers[role].step()

    def zero_grad(self, role: str) -> None:
        """After a step nothing is left; after none, DeepSpeed is told of an overflow, which clears everything."""
        optimizer = self.optimizers[role]
        if any(value is not None for value in optimizer.averaged_gradients.values()):
            with self._norm(role, torch.tensor(-1.0)):
                optimizer.step()
        self.engines[role].zero_grad()

    @contextmanager
    def _norm(self, role: str, norm: Tensor) -> Iterator[None]:
        """Let the optimizer's step find this gradient norm instead of reducing it again."""
        optimizer = self.optimizers[role]
        name = "_get_norm_groups" if self.stage == 3 else "scaled_global_norm"
        setattr(optimizer, name, lambda *_: [norm] if self.stage == 3 else norm)
        try:
            yield
        finally:
            delattr(optimizer, name)

    # ---- state --------------------------------------------------------------------------------------------

    def pieces(self, role: str) -> Pieces:
        if role not in self.engines:
            return super().pieces(role)
        flats = self._flats(role)
        return Pieces(
            Piece(name, shape, start, flats[group].detach().narrow(0, offset, count))
            for name, shape, start, group, offset, count in self._places(role)
        )

    def moments(self, role: str) -> tuple[dict[str, Pieces], dict[str, Tensor]]:
        flats, state = self._flats(role), self.optimizers[role].optimizer.state
        parts, counts = {key: Pieces() for key in MOMENTS}, {}
        for name, shape, start, group, offset, count in self._places(role):
            if "exp_avg" not in state.get(flats[group], {}):
                continue
            counts[name] = state[flats[group]]["step"]
            for key in MOMENTS:
                parts[key].append(Piece(name, shape, start, state[flats[group]][key].narrow(0, offset, count)))
        return parts, counts

    def restore_moments(self, role: str, read: Callable[[str, int, int], Tensor | None]) -> None:
        flats, state = self._flats(role), self.optimizers[role].optimizer.state
        for name, _, start, group, offset, count in self._places(role):
            step = read(f"{name}/step", 0, 1)
            if step is None:  # a parameter that never had a gradient: its moments are zero
                continue
            flat = flats[group]
            if flat not in state:
                state[flat] = {"step": step.reshape(()).to(flat.device)}
                state[flat] |= {key: torch.zeros_like(flat.detach()) for key in MOMENTS}
            for key in MOMENTS:
                saved = read(f"{name}/{key}", start, start + count)
                assert saved is not None
                state[flat][key].narrow(0, offset, count).copy_(saved)

    @torch.no_grad()
    def refresh(self, role: str) -> None:
        if role not in self.engines:
            super().refresh(role)
            return
        optimizer = self.optimizers[role]
        if self.stage < 3:
            optimizer.update_lp_params()
            return
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer._partition_all_parameters()
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def _flats(self, role: str) -> list[Tensor]:
        """The long fp32 buffers of masters, one per group."""
        optimizer = self.optimizers[role]
        return optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups

    def _places(self, role: str) -> Iterator[tuple[str, tuple[int, ...], int, int, int, int]]:
        """Where parameters lie: (name, shape, start in the parameter, group, offset in its buffer, elements)."""
        optimizer = self.optimizers[role]
        names = {id(p): name for name, p in self.models[role].named_parameters()}
        if self.stage == 3:
            for p, (group, offset, size) in (
                (p, optimizer.grad_position[optimizer.get_param_id(p)]) for g in optimizer.fp16_groups for p in g
            ):
                start = self.rank * size
                count = min(size, p.ds_numel - start)  # the last slices are padded
                if count > 0:
                    yield names[id(p)], tuple(p.ds_shape), start, group, offset, count
            return
        for group, parameters in enumerate(optimizer.bit16_groups):
            for p in parameters:
                if (part := p._hp_mapping) is not None:
                    here, there = part.lp_fragment_address, part.hp_fragment_address
                    yield names[id(p)], tuple(p.shape), here.start, group, there.start, here.numel


def _reaches(loss: Tensor, model: nn.Module) -> bool:
    """Whether the backward pass of `loss` comes to a weight of `model`: where none is, DeepSpeed finds no bucket to
    reduce. A weight lies at the end of any path that goes deep, so the search is short where there is one."""
    weights, seen, waiting = {id(p) for p in model.parameters()}, set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if id(getattr(node, "variable", None)) in weights:
            return True
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)
    return False


def _keep_while_repeating(coordinator: Any) -> None:
    """Checkpointing repeats a block within the backward pass, which may have gathered one of its layers just before:
    DeepSpeed would let go of that layer when its repetition ends, and its gradient would find no weight. Here layers
    are let go after their backward pass alone."""
    release = coordinator.release_sub_module

    def release_after(module: nn.Module, forward: bool = False) -> None:
        if not (forward and torch._C._current_graph_task_id() != -1):
            release(module, forward)

    coordinator.release_sub_module = release_after


def _adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """bf16 compute weights: DeepSpeed keeps the fp32 masters itself."""
    return torch.optim.AdamW(model.parameters(), config.lr, config.betas, config.eps, config.weight_decay, fused=True)


def _import(device: str) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device == "cuda" else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        import deepspeed
    except ImportError:
        raise UserError("ZeRO needs deepspeed: `make gpu`, or pip install deepspeed.") from None
    # On a CPU DeepSpeed would compile an all-reduce of its own at the first start, minutes long, that only its
    # inference engine calls; a start that is killed meanwhile leaves a lock on which the next one waits for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed()  # takes up torch's process group
    return deepspeed
