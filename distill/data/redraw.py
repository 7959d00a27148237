"""Another draw of held-out clips: the same characters, audio and captions, with other chance in their idle motion.

What a perfect model would make of the same conditions; several draws say what the data does on average, which one clip
of each character does not. Their tracks are kept beside the data, under a name that says what they follow from.
Batch of N clips -> latents [N, T, C, H, W]; tracks of all draws, the clips' own first.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.data import motion, puppet
from distill.data.batch import Batch
from distill.data.dataset import LatentDataset
from distill.data.version import source_hash
from evaluation import geometry
from evaluation.geometry import Tracks, measure
from teacher.codec import PCACodec

REFERENCE_DRAWS = 4  # the clips themselves and three more draws of them


def another_draw(dataset: LatentDataset, batch: Batch, codec: PCACodec, seed: int, draw: int = 0) -> Tensor:
    """Draw number `draw` of the clips of `batch`, keyed by (seed, draw, clip), through the codec's encoder."""
    speak, listen = dataset.waves(batch.index)
    moves = []
    for row in range(len(batch)):
        attributes = motion.Attributes(*batch.labels[row].tolist())
        heard = (speak[row].numpy(), listen[row].numpy(), batch.state[row].numpy())
        chance = np.random.default_rng((seed, draw, row))
        moves.append(torch.from_numpy(motion.drive(*heard, attributes, chance)[0]))
    frames = puppet.render(dataset.characters[batch.index], torch.stack(moves), dataset.size)
    return codec.encode(frames.float() / 255)


def reference_tracks(dataset: LatentDataset, batch: Batch, codec: PCACodec, seed: int) -> list[Tracks]:
    """Tracks of REFERENCE_DRAWS draws of `batch`: its own clips, then draws 1, 2, ... of `seed` (draw 0 is a row of its
    own in the table)."""
    assert batch.latents is not None
    key = f"{dataset.fingerprint} {codec.fingerprint()} {source_hash((geometry,))} {seed} {batch.index.tolist()}"
    path = dataset.folder / f"draws-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    if not path.is_file():
        draws = [another_draw(dataset, batch, codec, seed, draw) for draw in range(1, REFERENCE_DRAWS)]
        found = [measure(torch.cat([codec.decode(x) for x in part.split(8)])) for part in (batch.latents, *draws)]
        temporary = path.with_name(f"{path.name}.{os.getpid()}")  # cells of a grid may get here together
        save_file({f"{k}.{n}": x.contiguous() for k, t in enumerate(found) for n, x in vars(t).items()}, temporary)
        os.replace(temporary, path)
    kept = load_file(path)
    return [
        Tracks(**{name[2:]: x for name, x in kept.items() if name.startswith(f"{draw}.")})
        for draw in range(REFERENCE_DRAWS)
    ]
