"""The three contracts: a loss is a pure function (`Term`), a rollout says where samples come from (`Roll`), and both
see the networks through `Roles`, which also hands out every random number.

    rollout(batch, roles, cfg) -> Roll          term(roll, roles, cfg) -> Term(value, logs)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distill.data.batch import keyed_generator
from student.causal_dit import CausalDiT, StreamConfig
from teacher.codec import PCACodec
from teacher.conditions import Conditions
from teacher.dit import DiT
from teacher.draws import RowGenerator, gaussian
from teacher.embedder import IdentityEmbedder


@dataclass(frozen=True)
class Term:
    """A loss: its differentiable value (scalar) and what is worth a curve."""

    value: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Clip:
    """Clean latents [B, T, C, H, W] of the data and their own conditions."""

    latents: Tensor | None
    cond: Conditions


class Replay(Protocol):
    """The backward pass of a rollout that was made without a graph: dL/dx0 -> `len` scalars, each to be differentiated
    before the next is asked for; together their gradients in the weights are those of the loss."""

    def __len__(self) -> int: ...

    def __call__(self, gradient: Tensor) -> Iterator[Tensor]: ...


@dataclass(frozen=True)
class Roll:
    """Samples that terms speak about.

    x0 [B, T, C, H, W]: clean latents, the student's (with its graph, in a phase that trains it) or the data's.
    target: what x0 should have been, where that is known. real: the data's clip under the same conditions. age [T]:
    chunk number of every frame since its stream began. time: that of the evaluation which made x0. first [B, K, ...]:
    the first chunk of the stream, of which x0 is a later part. replay: where x0 is a leaf, the rest of the way back.
    identity [B]: who they are; the batch's characters where the rollout does not say.
    """

    x0: Tensor
    cond: Conditions
    target: Tensor | None = None
    real: Tensor | None = None
    age: Tensor | None = None
    time: float | None = None
    first: Tensor | None = None
    replay: Replay | None = None
    clip: Clip | None = None  # the batch's, where it is not `real` under `cond`
    identity: Tensor | None = None
    logs: dict[str, Tensor] = field(default_factory=dict)

    def data(self) -> Clip:
        """A clip of the data, for terms that want one whatever x0 is."""
        found = self.clip or Clip(self.target if self.real is None else self.real, self.cond)
        if found.latents is None:
            raise ValueError("This term needs the data's clip: a rollout over clips of the data set.")
        return found

    def again(self) -> Iterator[Tensor]:
        """What is left to be differentiated, one after the other, once the loss is."""
        if self.replay is None:
            return iter(())
        if self.x0.grad is None:
            raise ValueError("A rollout that is replayed needs a term that looks at its samples.")
        return self.replay(self.x0.grad)


@dataclass
class Roles:
    """The networks of a stage by role, and the keyed randomness of the current step."""

    models: dict[str, nn.Module]
    stream: StreamConfig
    codec: PCACodec
    embedder: IdentityEmbedder | None = None
    trajectories: Any = None
    origins: dict[str, Any] = field(default_factory=dict)  # of networks made empty: what fills them (distill.roles)
    average: dict[str, Tensor] | None = None  # moving average of what the stage trains, by parameter; the trainer's
    carried: dict[str, Tensor] = field(default_factory=dict)  # what a rollout leaves for the next step, [B, ...] each
    key: tuple[int | str, ...] = (0, 0)  # (seed, rank, step, micro-step, phase), set by the trainer
    processes: int = 1  # that share a batch
    whole: Conditions | None = None  # conditions of the whole batch, of which rank r has the r-th part; None = its own

    def dit(self, role: str) -> DiT:
        """The bidirectional network in `role` (teacher, critic)."""
        model = self._get(role)
        assert isinstance(model, DiT), f"{role} is not bidirectional"
        return model

    def causal(self, role: str) -> CausalDiT:
        """The causal network in `role` (student, backbone, refiner)."""
        model = self._get(role)
        assert isinstance(model, CausalDiT), f"{role} is not causal"
        return model

    def generator(self, tag: str, shared: bool = False) -> torch.Generator:
        """A generator that depends on (seed, rank, step, micro-step, tag) alone; `shared` leaves the rank out, for
        what all processes must draw alike (the exit step, the rollout's length)."""
        key = (self.key[0], *self.key[2:]) if shared else self.key
        return keyed_generator(*key, tag)

    def rows(self, tag: str) -> RowGenerator:
        """A generator for draws with one row per clip (`draw_rows`, `gaussian`, `sample_time`): all processes seed it
        alike and each takes its own rows of the whole batch, so that N processes see what one would."""
        rows = RowGenerator()
        rows.manual_seed(keyed_generator(self.key[0], 0, *self.key[2:], tag).initial_seed())
        rows.share = (int(self.key[1]) if len(self.key) > 1 else 0, self.processes)
        return rows

    def noise(self, like: Tensor, tag: str) -> Tensor:
        """Gaussian noise like `like` [B, ...], keyed by `tag`."""
        return gaussian(like, self.rows(tag))

    def _get(self, role: str) -> nn.Module:
        if role not in self.models:
            raise ValueError(f"This stage has no role '{role}'; its roles are {', '.join(sorted(self.models))}.")
        return self.models[role]
