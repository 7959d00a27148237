"""What a table of drift has rows of: a streaming network, the controls, and the teacher for its motion.

A row plays the windows of a case one after the other: spans of video frames -> uint8 frames [N, F, 3, S, S]. The first
span is the first chunk, which later frames may copy. Finished groups of characters are kept under a key of everything
that they depend on, so an interrupted measurement goes on; controls depend on the data alone and are kept beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from distill.data import puppet
from distill.data.batch import keyed_generator
from distill.data.dataset import LatentDataset
from distill.data.recurrent import Case, Plan, truth_motion
from distill.judge import through
from evaluation.bench import Generate
from student.causal_dit import CausalDiT
from student.stream import stream
from teacher.codec import STRIDE, PCACodec

Span = tuple[int, int]
Play = Callable[[Case, Sequence[Span]], Iterator[Tensor]]
INJECTED = 0.03  # of the way to another character's parameters, per minute
FIRST, SECOND = 0, 1  # draws of the truth: what rows are held against, what is measured like a stream


@dataclass(frozen=True)
class Source:
    """A row: its name, what it is made of (a hash), video frames per chunk, how it plays; `returns` of block A that it
    is played for, 0 = all; `still`: every return looks like the first."""

    name: str
    source: str
    chunk_frames: int
    play: Play
    returns: int = 0
    still: bool = False


def streamed(
    name: str, source: str, backbone: CausalDiT, refiner: CausalDiT | None, codec: PCACodec, seed: int
) -> Source:
    """The one loop that training uses, decoded where something is measured."""
    size = backbone.stream.chunk_frames * STRIDE[0]

    def play(case: Case, spans: Sequence[Span]) -> Iterator[Tensor]:
        first = int(case.index[0])

        def noise(index: int, part: str) -> torch.Generator:
            return keyed_generator(seed, "drift noise", first, index, part)

        whole = case.cond.frames(0, case.cond.num_frames // backbone.stream.chunk_frames * backbone.stream.chunk_frames)
        chunks = enumerate(stream(backbone, refiner, whole, noise))
        decoded: list[tuple[int, Tensor]] = []  # (first frame, frames) of the chunks that the next spans need
        at = 0
        for start, stop in spans:
            while at < stop:
                index, x0 = next(chunks)
                at = (index + 1) * size
                if at > start:
                    decoded.append((at - size, to_bytes(codec.decode(x0))))
            decoded = [(a, frames) for a, frames in decoded if a + size > start]
            yield torch.cat([f[:, max(start - a, 0) : stop - a] for a, f in decoded if a < stop], 1)

    return Source(name, source, size, play)


def sampled(name: str, source: str, generate: Generate, codec: PCACodec, clip: int, seed: int) -> Source:
    """A teacher, which does not stream: clips of `clip` latent frames end to end over the first return of block A."""

    def play(case: Case, spans: Sequence[Span]) -> Iterator[Tensor]:
        for start, stop in spans:
            parts = []
            for at in range(start // STRIDE[0], -(-stop // STRIDE[0]), clip):
                generator = keyed_generator(seed, "drift noise", int(case.index[0]), at)
                parts.append(to_bytes(codec.decode(generate(case.cond.frames(at, at + clip), generator))))
            yield torch.cat(parts, 1)[:, : stop - start]

    return Source(name, source, clip * STRIDE[0], play, returns=1)


def controls(data: LatentDataset, plan: Plan, chunk_frames: int) -> list[Source]:
    """Ground truth through the codec (what rows are held against), another draw of it as drawn, the same with identity
    parameters that move at a known rate, and a reference that stands still."""
    codec = data.codec()
    moves: dict[tuple[int, int, int], Tensor] = {}  # of one group: two rows show the same draw

    def motion_of(case: Case, draw: int, index: int) -> Tensor:
        first = int(case.index[0])
        if any(key[0] != first for key in moves):
            moves.clear()
        if (first, draw, index) not in moves:
            moves[first, draw, index] = truth_motion(case, plan, draw, index)
        return moves[first, draw, index]

    def drawn(draw: int, rate: float, encoded: bool, case: Case, spans: Sequence[Span]) -> Iterator[Tensor]:
        for start, stop in spans:
            index, inner = divmod(start, plan.period)
            motion = motion_of(case, draw, index)[:, inner : inner + stop - start]
            frames = moved(data, case, motion, start, rate)
            yield to_bytes(through(codec, frames)) if encoded else frames

    def frozen(case: Case, spans: Sequence[Span]) -> Iterator[Tensor]:
        still = to_bytes(codec.decode(case.cond.refs[:, :1])[:, :1])
        for start, stop in spans:
            yield still.expand(-1, stop - start, -1, -1, -1)

    plays: dict[str, Play] = {
        "codec": partial(drawn, FIRST, 0.0, True),
        "truth": partial(drawn, SECOND, 0.0, False),
        "injected": partial(drawn, SECOND, INJECTED, False),
    }
    moving = [Source(name, data.fingerprint, chunk_frames, play) for name, play in plays.items()]
    return [*moving, Source("frozen", data.fingerprint, chunk_frames, frozen, returns=1, still=True)]


def moved(data: LatentDataset, case: Case, motion: Tensor, start: int, rate: float) -> Tensor:
    """Pictures of characters whose parameters move, `rate` of the way per minute, toward those of another; motion
    [N, F, P] from video frame `start` of the stream on."""
    minutes = (start + torch.arange(motion.shape[1])) / (24 * 60)
    who = on_the_way(data, case.index, rate * minutes).flatten(0, 1)  # [N F, D]
    frames = puppet.render(who, motion.flatten(0, 1)[:, None], data.size)
    return frames[:, 0].unflatten(0, motion.shape[:2])


def on_the_way(data: LatentDataset, rows: Tensor, share: Tensor) -> Tensor:
    """Identity parameters [N, F, D] of the characters in these rows after `share` [F] of the way to the next character
    of the split."""
    identity = data.all().identity
    names = identity.unique()
    following = names[(torch.searchsorted(names, identity[rows]) + 1) % len(names)]
    other = data.characters[(identity[None] == following[:, None]).int().argmax(1)]
    own = data.characters[rows][:, None]  # [N, 1, D]
    return own + share[:, None].to(own) * (other[:, None] - own)


def to_bytes(frames: Tensor) -> Tensor:
    """Float in [0, 1] -> uint8."""
    return (frames * 255).round().to(torch.uint8)
