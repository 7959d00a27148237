"""The student: the teacher's DiT made causal over chunks. Same weights, same blocks; time per frame; a KV cache.

Two ways through it that must agree (tests/test_student.py):
* `velocity` / `remember`: one chunk against the cache, as in streaming and in its own rollouts;
* `forward`: a whole clip at once under a block mask, given the history (teacher forcing) or its own noisy past.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from student.fast import FastDiT
from student.history import History
from student.kv_cache import KVCache
from student.mask import causal_mask, teacher_forcing_mask
from student.promise import Cache
from teacher.attention import KV
from teacher.conditions import Conditions
from teacher.dit import DiT
from teacher.rope import grid_positions


@dataclass(frozen=True)
class Sink:
    """What becomes of the sink: the first chunks for ever, or a moving average of the chunks that leave the window."""

    kind: str = "first"
    decay: float = 0.99

    def __post_init__(self):
        if self.kind not in ("first", "ema") or not 0 <= self.decay <= 1:
            raise ValueError(f"sink.kind {self.kind!r} must be first or ema, and decay lie in [0, 1]")


@dataclass(frozen=True)
class StreamConfig:
    """How the student streams. Backbone takes all `steps` but the last, the refiner the last one; with a single step
    there is no refiner. A flow map takes any steps, also others than it was trained with."""

    chunk_frames: int = 3  # latent frames per chunk
    sink_chunks: int = 1  # 0: the references are all that is permanent
    sink: Sink = field(default_factory=Sink)
    window_chunks: int = 2
    steps: tuple[float, ...] = (1.0, 0.8, 0.45)  # T0 > T1 > T2
    history: History = field(default_factory=History)  # that the backbone sees; the refiner's is clean
    positions: str = "relative"  # to the window; `absolute`, from the stream's beginning, is for comparison

    def __post_init__(self):
        if self.chunk_frames < 1 or self.sink_chunks < 0 or self.window_chunks < 0:
            raise ValueError("chunk_frames must be at least 1, sink_chunks and window_chunks at least 0")
        if not self.steps or self.steps[0] != 1.0 or list(self.steps) != sorted(set(self.steps), reverse=True):
            raise ValueError(f"steps {list(self.steps)} must fall from 1.0")
        if self.steps[-1] <= 0:
            raise ValueError("steps must stay above 0")
        if self.sink.kind == "ema" and self.sink_chunks != 1:
            raise ValueError("a sink of kind ema is one chunk: sink_chunks must be 1")
        if self.positions not in ("relative", "absolute"):
            raise ValueError(f"positions {self.positions!r} must be relative or absolute")

    @classmethod
    def read(cls, stored: dict[str, Any]) -> StreamConfig:
        """From plain data, as `dataclasses.asdict` or a file of JSON gives it. TypeError for unknown keys."""
        parts = {"sink": Sink(**stored.get("sink", {})), "history": History(**stored.get("history", {}))}
        return cls(**{**stored, **parts, "steps": tuple(stored["steps"])})

    @property
    def refined(self) -> bool:
        """Is there a step for a refiner?"""
        return len(self.steps) > 1

    @property
    def visible_chunks(self) -> int:
        """Chunks in sight at most, the current one included: how far positions reach."""
        return self.sink_chunks + self.window_chunks + 1


class CausalDiT(nn.Module):
    """A DiT that sees past chunks only."""

    def __init__(self, dit: DiT, stream: StreamConfig):
        super().__init__()
        self.dit, self.stream = dit, stream
        self.whole = True  # an engine that keeps the weights in pieces says False: then `DiT.run` alone may be called

    def start(self, cond: Conditions) -> KVCache:
        """An empty cache with the references of `cond`, kept for the whole stream."""
        rows, columns = self.dit.token_grid(cond.refs)
        grid = (self.stream.chunk_frames, rows, columns)
        stream = self.stream
        decay = stream.sink.decay if stream.sink.kind == "ema" else None
        sizes, absolute = (stream.sink_chunks, stream.window_chunks), stream.positions == "absolute"
        cache = KVCache(self.dit.encode_refs(cond), grid, *sizes, decay=decay, absolute=absolute)
        return replace(cache, later=(cache,) * (len(stream.history.times(stream.steps)) - 1))

    @property
    def flow_map(self) -> bool:
        """Does it hear where a step ends?"""
        return self.dit.config.flow_map

    def streaming(self) -> CausalDiT | FastDiT:
        """The same network for a stream without gradient, one per stream; itself, where its weights cannot be read
        layer by layer (those of a view with adapters, and those that an engine keeps in pieces), or where its history
        has more than one noise level."""
        return FastDiT(self) if self.whole and type(self.dit) is DiT and self.stream.history.uniform else self

    def velocity(self, xt: Tensor, t: Tensor, cond: Conditions, cache: Cache, r: Tensor | None = None) -> Tensor:
        """v of one chunk, xt [B, K, C, H, W], t [B]; `cond` covers this chunk's frames. A flow map gives the one that
        leads from t to r [B], to a clean chunk where r is not told; others know no r but 0."""
        end = self.step_end(t, r)
        return self.dit.run(xt, t, cond, cache.positions(), cache.context(), r=end, keep=False)[0]

    def remember(self, x: Tensor, t: Tensor, cond: Conditions, cache: Cache) -> KVCache:
        """The cache after the finished chunk `x` (clean, or noised to t [B] or [B, K])."""
        return cache.push(self.dit.run(x, t, cond, cache.positions(), cache.context())[1])

    def forward(
        self,
        xt: Tensor,
        t: Tensor,
        cond: Conditions,
        hist: Tensor | None = None,
        t_hist: Tensor | None = None,
        r: Tensor | None = None,
    ) -> Tensor:
        """v of a clip of whole chunks, xt [B, T, C, H, W], t and r (as in `velocity`) [B] or [B, T].

        With `hist` (like xt, at noise level t_hist): each chunk sees the given history (teacher forcing). Without:
        each chunk sees the noisy chunks before it (diffusion forcing). Clips longer than the stream's window are
        refused: their relative positions would differ from streaming; absolute ones would not.
        """
        stream, (rows, columns) = self.stream, self.dit.token_grid(xt)
        chunks, rest = divmod(xt.shape[1], stream.chunk_frames)
        if rest or (chunks > stream.visible_chunks and stream.positions == "relative"):
            raise ValueError(
                f"A clip must be 1 to {stream.visible_chunks} whole chunks of {stream.chunk_frames} latent frames, "
                f"this one has {xt.shape[1]} frames."
            )
        refs = self.dit.encode_refs(cond)
        positions = grid_positions(xt.shape[1], rows, columns).to(xt.device)
        sizes = (
            chunks,
            stream.chunk_frames * rows * columns,
            stream.sink_chunks,
            stream.window_chunks,
            refs[0][0].k.shape[1],
        )
        if hist is None:
            return self.dit.run(xt, t, cond, positions, refs, causal_mask(*sizes), self.step_end(t, r), keep=False)[0]
        if t_hist is None:
            raise ValueError("A given history needs its noise level t_hist.")
        layers = self.dit.run(hist, t_hist, cond, positions, refs, causal_mask(*sizes))[1]
        context = [[*ref, KV(k, v, positions)] for ref, (k, v) in zip(refs, layers, strict=True)]
        mask = teacher_forcing_mask(*sizes)
        return self.dit.run(xt, t, cond, positions, context, mask, self.step_end(t, r), keep=False)[0]

    def step_end(self, t: Tensor, r: Tensor | None) -> Tensor | None:
        """What a flow map is told of where a step from t ends: r, 0 where it is not given; None to other networks."""
        if not self.flow_map:
            return None
        return torch.zeros_like(t) if r is None else r
