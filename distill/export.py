"""Online LPM: the backbone of stage 3, the refiner of stage 4 (none with a single step) and the codec, in one folder
with a card and a manifest; and the teacher as the repository keeps it.

The export is verified by loading it back and comparing a forward of each network with the original's.
"""

from __future__ import annotations

from pathlib import Path

import torch

from distill.config import Recipe
from distill.errors import ExitCode, UserError
from distill.roles import network
from distill.state import checkpoint, lineage
from distill.state.lineage import Manifest, describe
from student.causal_dit import CausalDiT
from student.online import OnlineLPM
from teacher.codec import PCACodec
from teacher.conditions import AUDIO_PER_LATENT, PAST, SILENCE, TEXT_LENGTH, Conditions


def export(recipe: Recipe, backbone: Manifest, refiner: Manifest | None, codec: PCACodec, folder: Path) -> Path:
    """Write the folder of a finished run; `recipe` is that of stage 4."""
    nets = [CausalDiT(network(recipe.model, part, "ema"), recipe.student) for part in (backbone, refiner) if part]
    online = OnlineLPM(nets[0], nets[1] if refiner else None, codec)
    size, last = 4 * sum(p.numel() for p in online.parameters()), refiner or backbone
    meta = describe(recipe, last.step, last, last.data.get("data_fingerprint"))
    with checkpoint.committed(folder, {**meta, "stage": "online-lpm"}, size) as temporary:
        online.save_pretrained(temporary)
        (temporary / "README.md").write_text(card(recipe, last))
        _verify(online, OnlineLPM.from_pretrained(temporary))
    return folder


def keep_teacher(trained: Manifest, codec: PCACodec, folder: Path) -> Path:
    """A trained teacher as the repository keeps it: averaged weights in fp16 and the codec, with their manifest."""
    weights = {name: tensor.half() for name, tensor in checkpoint.load(trained.path, "ema").items()}
    meta = {key: value for key, value in trained.data.items() if key != "files"}
    with checkpoint.committed(folder, meta, sum(2 * tensor.numel() for tensor in weights.values())) as temporary:
        checkpoint.write_tensors(temporary / "ema", weights)
        codec.save(temporary / "codec")
    return folder


def card(recipe: Recipe, last: Manifest) -> str:
    """The model card, made from the lineage."""
    stream = recipe.student
    seconds = stream.chunk_frames / 6
    count, refined = len(stream.steps) - stream.refined, " and 1 of the refiner" if stream.refined else ""
    backbone = f"{count} backbone evaluation{'s' if count > 1 else ''}"
    return f"""# Online LPM ({recipe.scale})

A causal, few-step, streaming student: {backbone}{refined} per chunk
of {seconds:g} s, no guidance, {stream.sink_chunks} sink and {stream.window_chunks} window chunks of history.

```python
from student.online import OnlineLPM

model = OnlineLPM.from_pretrained("path/to/this/folder")
for frames in model.frames(conditions, generator):  # [B, {4 * stream.chunk_frames}, 3, H, W] in [0, 1]
    ...
```

Steps {list(stream.steps)}, history noise {stream.history_noise}. Data: the procedural puppet world (drawn characters,
synthesized and recorded speech); no real person is depicted. Licence: Apache-2.0.

## Lineage

```
{lineage.tree(last.path)}
```
"""


@torch.no_grad()
def _verify(original: OnlineLPM, loaded: OnlineLPM) -> None:
    """One forward of each network, before and after the disk."""
    config, stream = original.backbone.dit.config, original.backbone.stream
    generator = torch.Generator().manual_seed(0)
    frames, size = stream.chunk_frames, 4 * config.patch
    silence = torch.full((1, AUDIO_PER_LATENT * (PAST + frames), config.mels), SILENCE)
    refs = torch.randn(1, len(config.references), config.channels, size, size, generator=generator)
    text = torch.zeros(1, TEXT_LENGTH, config.text_dim)
    cond = Conditions(silence, silence, text, text[..., 0] > 0, refs, torch.ones(refs.shape[:2], dtype=torch.bool))
    x, t = torch.randn(1, frames, config.channels, size, size, generator=generator), torch.full((1,), 0.5)
    for name in original.networks():
        a, b = (model.networks()[name] for model in (original, loaded))
        if not torch.equal(a.velocity(x, t, cond, a.start(cond)), b.velocity(x, t, cond, b.start(cond))):
            raise UserError(f"The exported {name} differs from the trained one after loading.", ExitCode.CHECKPOINT)
