"""Long streams in which the same utterance returns at known times: audio A B A C A D ..., one plan per character.

Block A (silence, speaking, listening) is drawn once per character and comes back every 30 s to the sample; the turns
between are always new. Compared between returns, speech content cancels and what remains is drift. A begins with
silence longer than the audio that a frame can hear back, so that no return hears what came before it.
Plan -> Case: conditions of L = 6 latent frames per second, what the audio drives; truth_motion [N, G, P] of a return.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.data import motion as motions
from distill.data import speech, timeline
from distill.data.batch import keyed_generator
from distill.data.dataset import LatentDataset
from distill.data.prepare import by_state
from distill.data.timeline import FPS, LISTEN, PAST_FRAMES, SILENCE, SPEAK, Segment, sample_at
from distill.errors import UserError
from teacher.audio import log_mel
from teacher.conditions import Conditions, encode_text

HALF = 12  # video frames: every border of a block falls on half a second, which is a whole number of samples


@dataclass(frozen=True)
class Plan:
    """How long, and what block A is made of; seconds, multiples of half a second."""

    minutes: float = 10.0
    lead: float = 2.0  # of silence, not measured: longer than the 1.5 s of audio that a frame hears back
    silence: float = 4.0
    speak: float = 6.0
    listen: float = 4.0
    filler: float = 14.0  # other turns before A returns
    seed: int = 0

    def __post_init__(self):
        if any(2 * s % 1 for s in (self.lead, self.silence, self.speak, self.listen, self.filler)):
            raise ValueError("the parts of a plan must be multiples of half a second")
        if self.lead < 1.5 or min(self.silence, self.speak, self.listen, self.filler) < 1 or self.returns < 2:
            raise ValueError(
                f"a plan needs a lead of 1.5 s, parts of at least 1 s and two returns of A in {self.minutes:g} minutes"
            )

    @property
    def block(self) -> int:
        """Video frames of A."""
        return round(FPS * (self.lead + self.silence + self.speak + self.listen))

    @property
    def period(self) -> int:
        """Video frames from one return of A to the next."""
        return self.block + round(FPS * self.filler)

    @property
    def frames(self) -> int:
        """Video frames of the stream, whole half seconds."""
        return round(self.minutes * 120) * HALF

    @property
    def returns(self) -> int:
        """How often A is there in full."""
        return (self.frames - self.block) // self.period + 1

    def parts(self) -> dict[str, tuple[int, int]]:
        """Measured part -> its first and last + 1 video frame within A, in order of time."""
        at, found = round(FPS * self.lead), {}
        for name in ("silence", "speak", "listen"):
            stop = at + round(FPS * getattr(self, name))
            found[name], at = (at, stop), stop
        return found

    def spans(self) -> list[tuple[int, int]]:
        """First and last + 1 video frame of every measured window, return by return and part by part."""
        starts = [index * self.period for index in range(self.returns)]
        return [(start + a, start + b) for start in starts for a, b in self.parts().values()]


@dataclass(frozen=True)
class Case:
    """Some characters of a split and their streams. S samples and G video frames of block A, its past in front."""

    cond: Conditions  # of the whole stream
    driven_mouth: Tensor  # [N, A], A = measured frames of a return, parts joined in order: the same at every return
    driven_nod: Tensor  # [N, A]
    index: Tensor  # [N] rows of the split
    characters: Tensor  # [N, D] identity parameters
    waves: Tensor  # [N, 2, S] speak and listen of block A
    state: Tensor  # [G] uint8
    labels: Tensor  # [N, 3] what the captions say

    def __len__(self) -> int:
        return len(self.index)


def people(dataset: LatentDataset, count: int) -> Tensor:
    """The first row of each of `count` different characters [count]; UserError(code 3) where there are fewer."""
    identity = dataset.all().identity
    rows = torch.tensor([int((identity == who).nonzero()[0]) for who in identity.unique()])
    if count > len(rows):
        raise UserError(
            f"data: {dataset.folder} has {len(rows)} characters in {dataset.split}, {count} were asked for: lower "
            "CHARACTERS, or prepare more with data.prepare.test_identities.",
            3,
        )
    return rows[:count]


def recurrent_case(dataset: LatentDataset, rows: Tensor, plan: Plan) -> Case:
    """The streams of the characters in these rows; each depends on the plan and its own row alone."""
    said = by_state(speech.corpus(Path(dataset.folder).parent / "speech"), dataset.split)
    known, samples = dataset.all().select(rows), sample_at(PAST_FRAMES + plan.block)
    measured = torch.cat([torch.arange(*span) for span in plan.parts().values()])
    features, waves, driven, labels, captions = [], [], [], [], []
    state = torch.zeros(0)
    for row in rows.tolist():
        speak, listen, state = lay_out(said, plan, row)
        features.append(torch.stack([log_mel(speak), log_mel(listen)]))
        waves.append(torch.stack([speak, listen])[:, :samples])
        mouth, _ = motions.mouth(speak[:samples].numpy(), plan.block)
        nod = motions.nod(listen[:samples].numpy(), plan.block)
        driven.append(torch.from_numpy(np.stack([mouth, nod]))[:, measured])
        chance = np.random.default_rng((plan.seed, row))
        attributes = motions.sample_attributes(chance)
        labels.append(torch.tensor([attributes.expression, attributes.gaze, attributes.pose]))
        captions.append(motions.caption(attributes, chance))
    text, text_mask = encode_text(captions)
    heard, follow = torch.stack(features), torch.stack(driven)  # [N, 2, 8 (PAST + L), M], [N, 2, A]
    return Case(
        Conditions(heard[:, 0], heard[:, 1], text, text_mask, known.cond.refs, known.cond.ref_mask),
        follow[:, 0],
        follow[:, 1],
        known.index,
        dataset.characters[rows],
        torch.stack(waves),
        state[: plan.block],
        torch.stack(labels),
    )


def truth_motion(case: Case, plan: Plan, draw: int, index: int) -> Tensor:
    """How the characters move in return `index` of block A, as the data has it [N, G, P]; the idle part of it,
    and the small offset of the pose, are new in every return and every `draw`."""
    moves = []
    for row, wave, labels in zip(case.index.tolist(), case.waves, case.labels, strict=True):
        idle = np.random.default_rng((plan.seed, row, draw, index))
        attributes = motions.Attributes(*labels.tolist())
        moves.append(motions.drive(wave[0].numpy(), wave[1].numpy(), case.state.numpy(), attributes, idle)[0])
    return torch.from_numpy(np.stack(moves))


def lay_out(said: dict[int, list[speech.Utterance]], plan: Plan, row: int) -> tuple[Tensor, Tensor, Tensor]:
    """speak, listen [S] with 1.5 s of silent past in front, state [F]."""
    states = [(SILENCE, plan.lead + plan.silence), (SPEAK, plan.speak), (LISTEN, plan.listen)]
    at, block = PAST_FRAMES, [Segment(SILENCE, 0, PAST_FRAMES)]
    for state, seconds in states:
        block.append(Segment(state, at, at := at + round(FPS * seconds)))
    a = _without_past(*timeline.lay(block, said, keyed_generator(plan.seed, "drift", row, "A")))
    blocks, filled = [], 0
    while filled < plan.frames:
        blocks.append(a)
        generator = keyed_generator(plan.seed, "drift", row, len(blocks))
        other = timeline.plan_stream("mix", plan.period - plan.block, generator)
        blocks.append(_without_past(*timeline.lay(other, said, generator)))
        filled += plan.period
    speak, listen, track = (torch.cat([one[i] for one in blocks]) for i in range(3))
    past, samples = torch.zeros(sample_at(PAST_FRAMES)), sample_at(plan.frames)
    return torch.cat([past, speak[:samples]]), torch.cat([past, listen[:samples]]), track[: plan.frames]


def _without_past(speak: Tensor, listen: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    past = sample_at(PAST_FRAMES)
    return speak[past:], listen[past:], state
