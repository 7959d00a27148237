"""Online LPM: the backbone of stage 3, the refiner of stage 4 (none with a single step) and the codec, in one folder
with a card, a manifest and a few characters and recordings to try it with; and the teacher as the repository keeps it.

The export is verified by loading it back and comparing a forward of each network with the original's.
"""

from __future__ import annotations

from pathlib import Path

import torch

from distill.card import export_card
from distill.config import Recipe
from distill.demo import write_demo
from distill.embedder import ensure_embedder
from distill.errors import ExitCode, UserError
from distill.roles import network
from distill.state import checkpoint, lineage
from distill.state.lineage import Manifest, describe
from student.causal_dit import CausalDiT
from student.online import OnlineLPM
from teacher.codec import PCACodec
from teacher.conditions import AUDIO_PER_LATENT, PAST, SILENCE, TEXT_LENGTH, Conditions
from teacher.embedder import IdentityEmbedder


def export(recipe: Recipe, backbone: Manifest, refiner: Manifest | None, codec: PCACodec, folder: Path) -> Path:
    """Write the folder of a finished run; `recipe` is that of stage 4."""
    nets = [CausalDiT(network(recipe.model, part, "ema"), recipe.student) for part in (backbone, refiner) if part]
    online = OnlineLPM(nets[0], nets[1] if refiner else None, codec)
    size, last = 4 * sum(p.numel() for p in online.parameters()), refiner or backbone
    meta = describe(recipe, last.step, last, last.data.get("data_fingerprint"))
    with checkpoint.committed(folder, {**meta, "stage": "online-lpm"}, size) as temporary:
        online.save_pretrained(temporary, export_card(recipe.student, last, folder.parent / "report"))
        write_demo(Path(recipe.data.path), temporary)
        IdentityEmbedder.load(ensure_embedder(Path(recipe.data.path))).save(temporary)  # for the live drift meter
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


def refresh_card(recipe: Recipe, run: Path) -> None:
    """Write the card of a run's export again, now that there are scores; weights and their hashes stay."""
    folder = run / "online-lpm"
    if (folder / checkpoint.MANIFEST).is_file():
        last = lineage.find_parent(run, "stage4" if recipe.student.refined else "stage3", recipe.scale)
        checkpoint.replace_text(folder, "README.md", export_card(recipe.student, last, run / "report"))


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
