"""Train the second opinion on identity of a data set, and say from what distance on a stranger is let in.

Nothing else in the toolkit looks through this network: no term, no gauge. Its accuracy, and the thresholds of it and
of the exact geometry, come from characters drawn for this alone, in no split of the data: a moving window of each
against the references of each. data folder -> data/drift/judge-<content>/{judge.safetensors, judge.json}
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from distill.data import dataset, puppet, speech, timeline
from distill.data.batch import keyed_generator
from distill.data.prepare import by_state, draw_references, perform
from distill.data.version import source_hash
from distill.tracking import progress
from evaluation import geometry, identity, judge, survival
from evaluation.identity import identity_distance, stills_identity
from evaluation.judge import Judge, face_distance, prototype_loss, small
from teacher.codec import STRIDE, PCACodec

STEPS, CHARACTERS, KEPT, RATE, NOISE = 400, 64, 2, 3e-3, 0.03
SHOTS = 3  # latent frames taken of every train clip
STRANGERS, WINDOW = 256, 36  # characters, and video frames of each, that the thresholds come from
SEED = 20_071  # far from those of training


def ensure_judge(data: Path) -> Judge:
    """The judge of a data set, trained and measured first if it is missing; half a minute once."""
    test = dataset.load(data, "test")
    modules = (judge, geometry, identity, survival, sys.modules[__name__])
    content = json.dumps([test.fingerprint, source_hash(modules), STEPS, STRANGERS])
    name = hashlib.sha256(content.encode()).hexdigest()[:12]
    folder = Path(data) / "drift" / f"judge-{name}"
    if not (folder / "judge.json").is_file():
        made = train_judge(data)
        made.about = {"content": name, **calibrate(made, data, test.codec(), test.size)}
        made.save(folder)
    return Judge.load(folder)


def train_judge(data: Path, steps: int = STEPS, seed: int = SEED) -> Judge:
    """Name frames of train characters, decoded as generated ones are, by the mean of other frames of them."""
    train = dataset.load(data, "train")
    order = train.all().identity.argsort(stable=True)
    pictures = _shots(train, seed)[order].unflatten(
        0, (train.all().identity.unique().numel(), -1)
    )  # [I, clips, S, ...]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Judge()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in progress(range(steps), "judge of identity"):
        generator = keyed_generator(seed, "judge", step)
        who = torch.randperm(len(pictures), generator=generator)[:CHARACTERS, None]
        clips = torch.rand(len(who), pictures.shape[1], generator=generator).argsort(1)[:, : 1 + KEPT]  # all different
        shots = torch.randint(SHOTS, clips.shape, generator=generator)
        chosen = pictures[who, clips, shots]  # [I, 1 + KEPT, 3, SIDE, SIDE]
        chosen = chosen + NOISE * torch.randn(chosen.shape, generator=generator)
        vectors = model.of_small(chosen.flatten(0, 1)).unflatten(0, chosen.shape[:2])
        loss = prototype_loss(vectors[:, 0], vectors[:, 1:])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.requires_grad_(False).eval()


@torch.no_grad()
def _shots(train: dataset.LatentDataset, seed: int) -> Tensor:
    """SHOTS frames of every clip, from different latent frames, averaged down: [clips, SHOTS, 3, SIDE, SIDE]."""
    latents, codec = train.all().latents, train.codec()
    assert latents is not None
    generator = keyed_generator(seed, "judge", "shots")
    at = torch.rand(latents.shape[:2], generator=generator).argsort(1)[:, :SHOTS]
    inner = torch.randint(STRIDE[0], (len(at), SHOTS), generator=generator)
    parts = []
    for rows in torch.arange(len(latents)).split(64):
        frames = codec.decode(latents[rows[:, None], at[rows]]).unflatten(1, (SHOTS, STRIDE[0]))  # [B, S, 4, 3, H, W]
        chosen = frames[torch.arange(len(rows))[:, None], torch.arange(SHOTS), inner[rows]]
        parts.append(small(chosen.flatten(0, 1)).unflatten(0, chosen.shape[:2]))
    return torch.cat(parts)


@torch.no_grad()
def calibrate(model: Judge, data: Path, codec: PCACodec, size: int, count: int = STRANGERS) -> dict[str, object]:
    """{"geometry" | "judge": threshold, true match rate at the false match rate, equal error rate} of characters that
    nothing was trained on."""
    who = puppet.sample_identities(count, SEED, "drift-strangers")
    said = by_state(speech.corpus(Path(data).parent / "speech"), "test")
    seen, anchors, faces, own_faces = [], [], [], []
    for part in torch.arange(count).split(16):
        moves, stills = [], []
        for row in part.tolist():
            generator = keyed_generator(SEED, "strangers", row)
            segments = timeline.plan_stream("mix", WINDOW, generator)
            moves.append(perform(segments, said, generator)["motion"])
            stills.append(draw_references(generator)[0])
        frames = through(codec, puppet.render(who[part], torch.stack(moves), size))
        drawn = puppet.render(who[part], torch.stack(stills), size).float() / 255
        shape = drawn.shape[:2]
        pictures = codec.decode(codec.encode_image(drawn.flatten(0, 1))[:, None])[:, 0].unflatten(0, shape)
        there = torch.ones(shape, dtype=torch.bool)
        seen.append(geometry.measure(frames).identity)
        anchors.append(stills_identity(pictures, there))
        faces.append(model(frames).mean(1))
        own_faces.append(model(pictures).mean(1))
    shown, anchor, face, own = (torch.cat(part) for part in (seen, anchors, faces, own_faces))
    by_geometry = torch.stack([identity_distance(shown, one.expand_as(anchor)) for one in anchor], 1)
    by_judge = face_distance(face[:, None], own[None])
    same = torch.eye(count, dtype=torch.bool)
    return {
        "characters": count,
        "false_match_rate": survival.FALSE_MATCH_RATE,
        **{
            name: survival.verification(table[same], table[~same])
            for name, table in (("geometry", by_geometry), ("judge", by_judge))
        },
    }


def through(codec: PCACodec, frames: Tensor) -> Tensor:
    """uint8 frames [N, F, 3, H, W] -> float in [0, 1] as the codec shows them."""
    return codec.decode(codec.encode(frames.float() / 255))
