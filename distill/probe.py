"""A training step without arithmetic: the recipe's own rollouts and losses over networks that only note what they are
asked, so that the plan follows the code, a loss of the user's own included.

A `Shadow` stands in for a DiT. Its `run` writes down a `Call`, holds the bytes that the real one would (`Meter`), and
hands on tensors with a graph behind them: how long activations and keys live is decided by the same autograd that will
decide it in training. Heads on a network's features run as they are, on the meta device. Latents, noise and conditions
are real and small.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from distill.batches import Clip, batch_like
from distill.config import Phase, Recipe, TermSpec, rollout_function, term_function
from distill.contracts import Roles, Roll
from distill.costs import (
    RESIDUAL,
    Call,
    Machine,
    at_work,
    backward_at_work,
    block_parameters,
    flops,
    kept_for_velocity,
    kept_per_block,
    outside_blocks,
)
from distill.errors import UserError
from distill.heads import imagined_heads
from distill.meter import Meter
from student.causal_dit import CausalDiT
from teacher.attention import KV, Blocks
from teacher.codec import PCACodec
from teacher.conditions import Conditions
from teacher.dit import DiT, DiTConfig
from teacher.embedder import IdentityEmbedder
from teacher.lora import LoRAConfig


@dataclass(frozen=True)
class State:
    """Bytes of a role's gradients, and of a block's weights gathered from shards, on one device."""

    gradients: float
    gathered: float = 0.0


class Shadow(DiT):
    """A network that keeps the books: the keys and values of all its blocks are one pair, as large as all together."""

    def __init__(
        self, config: DiTConfig, role: str, machine: Machine, meter: Meter, state: State, lora: LoRAConfig | None
    ):
        nn.Module.__init__(self)
        self.config, self.role, self.machine, self.meter = config, role, machine, meter
        self.state, self.lora = state, lora
        self.gate = nn.Parameter(torch.zeros(()))  # makes outputs ask for a gradient when the role learns
        self.calls: list[Call] = []
        self.gradients: Tensor | None = None
        self.cast: Tensor | None = None
        self.heads = nn.ModuleDict()

    def get_submodule(self, target: str) -> nn.Module:
        try:
            return super().get_submodule(target)
        except AttributeError:
            raise UserError(
                f"A loss of this recipe looks inside the {self.role} ({target}), which the plan cannot follow."
            ) from None

    def run(
        self,
        x: Tensor,
        t: Tensor,
        cond: Conditions | None,
        positions: Tensor,
        context: list[list[KV]] | None,
        mask: Blocks | None = None,
        r: Tensor | None = None,
        keep: bool = True,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        rows, columns = self.token_grid(x)
        before = [kv for layer in context or [] for kv in layer]
        looked = sum(kv.k.shape[1] for kv in (context[0] if context else []))
        tokens = x.shape[1] * rows * columns
        blocks = (
            (tokens + looked,)
            if mask is None
            else tuple(sum(span.stop - span.start for span in mask.spans(row)) for row in range(len(mask.visible)))
        )
        asks = torch.is_grad_enabled() and (
            self.gate.requires_grad or x.requires_grad or any(kv.k.requires_grad for kv in before)
        )
        call = Call(
            self.role,
            items=len(x),
            frames=x.shape[1],
            tokens=tokens,
            context=looked,
            rows=blocks,
            text=0 if cond is None else cond.text.shape[1],
            kept=keep,
            graph=asks,
            trained=asks and self.gate.requires_grad,
            inner=asks and x.requires_grad,
        )
        self.calls.append(call)
        if self.machine.bf16 and not self.machine.gathered and self.gate.requires_grad and self.cast is None:
            # Autocast's copies of weights that learn: made once, kept until the backward pass is through.
            self.cast = self.meter.hold(self.state.gradients / 2, "activations")
        flat = [tensor for kv in before for tensor in (kv.k, kv.v)]
        out = _Run.apply(self, call, x, self.gate, *flat)
        v, layers = (_Tail.apply(self, call, out[0]) if asks else out[0]), out[1:]
        return v, [(layers[0], layers[1])] if keep else []


class _Run(torch.autograd.Function):
    """Forward and backward of one call, in bytes."""

    @staticmethod
    def forward(ctx: Any, net: Shadow, call: Call, x: Tensor, gate: Tensor, *context: Tensor) -> Any:
        config, machine, meter = net.config, net.machine, net.meter
        n = call.items * call.tokens * config.dim
        ctx.net, ctx.call, ctx.held, ctx.shapes = net, call, [], (x, [tuple(t.shape) for t in context])
        if call.graph:
            input_bytes = float(RESIDUAL * n * config.depth)
            if config.checkpoint_blocks:
                kept = input_bytes
                ctx.held = list(context)
            else:
                kept = input_bytes + sum(blocks_of(net, call)) - tail_of(net, call)
            ctx.held.append(meter.hold(kept + outside_blocks(config, call), "activations"))
        shape = (call.items, call.tokens, config.dim)
        size = machine.compute * n
        layers = [meter.hold(size * config.depth, "KV cache", shape) for _ in range(2 * call.kept)]  # of all blocks
        if config.checkpoint_blocks or not call.graph:  # else what is at work is what is kept
            meter.touch(activations=at_work(config, call, machine), buffers=net.state.gathered)
        return (torch.zeros_like(x), *layers)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        net, call, meter = ctx.net, ctx.call, ctx.net.meter
        config, machine = net.config, net.machine
        again = max(blocks_of(net, call)) if config.checkpoint_blocks else 0.0
        if again and call.trained and net.lora is None and machine.bf16 and not machine.gathered:
            again += 2 * block_parameters(config)
        work = again + backward_at_work(config, call, machine)
        meter.touch(activations=work, buffers=net.state.gathered)
        ctx.held.clear()
        if call.trained and net.gradients is None:
            net.gradients = meter.hold(net.state.gradients, "gradients")
        meter.touch(activations=work, buffers=net.state.gathered)
        x, shapes = ctx.shapes
        size = machine.compute * call.items * config.dim * config.depth
        asked = zip(shapes, ctx.needs_input_grad[4:], strict=True)  # history is mostly detached
        back = [meter.hold(size * shape[1], "activations", shape) if needed else None for shape, needed in asked]
        return None, None, torch.zeros_like(x) if call.inner else None, torch.zeros(()), *back


class _Tail(torch.autograd.Function):
    """What is kept for the velocity alone: gone when only keys and values of the call are used."""

    @staticmethod
    def forward(ctx: Any, net: Shadow, call: Call, v: Tensor) -> Any:
        ctx.held = [net.meter.hold(tail_of(net, call), "activations")]
        return v.view_as(v)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, None, gradients[0]


class ShadowHead(nn.Module):
    """A term's head without numbers: autograd keeps what it would keep, the meter counts it, logits are zero."""

    def __init__(self, head: nn.Module, meter: Meter):
        super().__init__()
        self.head, self.meter, self.flops = head, meter, 0.0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Inputs as the network's shadow gives them -> real zeros in the shape of the head's output."""
        features = [value.to("meta") for value in (*inputs, *named.values())]
        with FlopCounterMode(display=False) as counted, saved_tensors_hooks(self._keep, lambda kept: kept):
            out = self.head(*features[: len(inputs)], **dict(zip(named, features[len(inputs) :], strict=True)))
        trained = any(p.requires_grad for p in self.parameters())
        passes = 1 + (trained + any(value.requires_grad for value in features)) * out.requires_grad
        self.flops += passes * counted.get_total_flops()
        return _Told.apply(out)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage, weights = tensor.untyped_storage(), {p.untyped_storage() for p in self.parameters()}
        if storage not in self.known and storage not in weights:
            self.known.add(storage)
            self.meter.track(tensor, storage.nbytes(), "activations")
        return tensor


class _Told(torch.autograd.Function):
    """From the meta device to numbers, zeros, and back."""

    @staticmethod
    def forward(ctx: Any, told: Tensor) -> Tensor:
        return torch.zeros(told.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0].to("meta")


def tail_of(net: Shadow, call: Call) -> float:
    """Bytes of the last block that only the velocity needs; checkpointing keeps none of them."""
    return 0.0 if net.config.checkpoint_blocks else kept_for_velocity(net.config, call, net.machine, net.lora)


def blocks_of(net: Shadow, call: Call) -> list[float]:
    """Bytes that each block keeps."""
    pair = [kept_per_block(net.config, call, net.machine, net.lora, index) for index in range(2)]  # speak, listen
    return [pair[index % 2] for index in range(net.config.depth)]


class Paths:
    """Stands in for stored trajectories."""

    def __init__(self, steps: int, latents: Tensor):
        self.steps, self.latents = steps, latents

    def states(self, index: Tensor) -> Tensor:
        return torch.randn(len(index), self.steps + 1, *self.latents.shape[1:]).to(self.latents.device)


@dataclass(frozen=True)
class Step:
    """What one update of one role asks for: calls with their (forward, backward) FLOPs, and those of heads."""

    role: str
    calls: tuple[Call, ...]
    heads: float = 0.0

    def flops(self, recipe: Recipe, executed: bool) -> float:
        """Of one micro-step. executed: with what checkpointing repeats; otherwise what the mathematics needs."""
        total = self.heads
        for call in self.calls:
            lora = recipe.lora.of(call.role) if recipe.lora else None
            forward, backward = flops(recipe.model, call, lora)
            total += forward + backward
            total += forward * (executed and call.graph and recipe.model.checkpoint_blocks)
        return total


def shadows(recipe: Recipe, clip: Clip, machine: Machine, meter: Meter, states: Callable[[str], State]) -> Roles:
    """Roles of books instead of networks."""
    model: DiTConfig = recipe.model
    trained = list(dict.fromkeys(phase.update for phase in recipe.phases))
    names = dict.fromkeys(["teacher", *trained, *(["backbone"] if "refiner" in trained else [])])
    models: dict[str, nn.Module] = {}
    for role in names:
        lora = recipe.lora.of(role) if recipe.lora else None
        shadow = Shadow(model, role, machine, meter, states(role), lora)
        if role == "critic":
            shadow.heads.update({name: ShadowHead(head, meter) for name, head in imagined_heads(recipe).items()})
        models[role] = shadow if role in ("teacher", "critic") else CausalDiT(shadow, recipe.student)
        models[role].requires_grad_(False)
    codec = PCACodec(torch.zeros(768), torch.eye(768, model.channels), torch.ones(model.channels))
    embedder = IdentityEmbedder(model.channels, clip.rows, clip.columns).requires_grad_(False)
    product = next((role for role in trained if role != "critic"), None)
    average: dict[str, Tensor] | None = dict(models[product].named_parameters()) if product else None
    return Roles(models, recipe.student, codec, embedder, average=average)


def simulate(
    recipe: Recipe, clip: Clip, machine: Machine, meter: Meter, states: Callable[[str], State], draws: int = 8
) -> list[Step]:
    """Every phase `draws` times (rollouts draw their length and exit step), with `meter` following; the steps' calls.
    The networks' standing state (weights, moments, averages) is the caller's to put on the meter."""
    steps = []
    roles = shadows(recipe, clip, machine, meter, states)
    for draw in range(draws):
        # Buffers are small beside the rest, and counting them is slow: once is enough.
        with meter.counting() if draw == 0 else nullcontext():
            for index, phase in enumerate(recipe.phases):
                steps.append(_update(recipe, clip, replace(roles, key=(0, 0, draw, 0, index)), phase, meter))
    return steps


def shadow_of(model: nn.Module) -> Shadow:
    """The book-keeping network of a role."""
    dit = model.dit if isinstance(model, CausalDiT) else model
    assert isinstance(dit, Shadow)
    return dit


def heads_of(model: nn.Module) -> list[ShadowHead]:
    """What terms learn on a network's features."""
    return [module for module in model.modules() if isinstance(module, ShadowHead)]


def _followed(term: TermSpec, roll: Roll, roles: Roles) -> Tensor:
    """The value of a term on networks without numbers; a loss may ask of them what only real ones have."""
    try:
        return term_function(term.name)(roll, roles, term.config).value
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"plan: the term {term.name} cannot be followed without a network's numbers ({type(error).__name__}: "
            f"{error}); run it with SMOKE=1, which says its seconds per step, and in STATUS.json the peak memory."
        ) from error


def _update(recipe: Recipe, clip: Clip, roles: Roles, phase: Phase, meter: Meter) -> Step:
    """The trainer's update of one role: roll out, add up the terms, backward, step."""
    spec = recipe.rollout
    assert spec is not None
    for role, model in roles.models.items():
        shadow_of(model).requires_grad_(role == phase.update)
        shadow_of(model).calls.clear()
        for head in heads_of(model):
            head.flops = 0.0
    own = shadow_of(roles.models[phase.update])
    if recipe.train.grad_accumulation > 1:  # from the second micro-step on they are there all the time
        own.gradients = meter.hold(own.state.gradients, "gradients")
    batch = batch_like(recipe.model, clip, recipe.train.batch_size)
    assert batch.latents is not None
    roles.trajectories = Paths(len(recipe.student.steps), batch.latents)
    with torch.set_grad_enabled(phase.update != "critic"):
        roll = rollout_function(spec.kind)(batch, roles, spec.config)
    total = torch.zeros(())
    for term in phase.terms:
        total = total + term.weight * _followed(term, roll, roles)
    if recipe.model.checkpoint_blocks:
        own.cast = None  # the backward pass makes them again, block by block
    total.backward()
    for part in roll.again():
        part.backward()
    own.cast = own.gradients = None
    nets = [shadow_of(model) for model in roles.models.values()]
    flops = sum(head.flops for net in nets for head in heads_of(net))
    return Step(phase.update, tuple(call for net in nets for call in net.calls), flops)
