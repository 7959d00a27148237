"""How one tensor of Wan2.1's transformer is called, and shaped, in the three places it lives.

ours        the Wan repository's names; `patch_embedding` is a Linear over patches in the order (row, column, channel)
original    the Wan repository (https://github.com/Wan-Video/Wan2.1, wan/modules/model.py): a Conv3d instead
diffusers   `WanTransformer3DModel`: other names, the tensors are those of `original`

Everything else has the same shape and order in all three: the head's outputs too are (row, column, channel). Audio
parts exist only here and keep our names everywhere. I2V models have two things more that we drop: the CLIP branch, and
the input channels of the mask and the first frame, which stand behind the latent's own.
"""

from __future__ import annotations

from collections.abc import Iterable

from einops import rearrange
from torch import Tensor

ORIGINAL, DIFFUSERS = "original", "diffusers"
PATCH = "patch_embedding.weight"
AUDIO = (".audio_k.", ".audio_v.", ".audio_o.", "speak_embedding.", "listen_embedding.")
CLIP = {
    ORIGINAL: ("img_emb.", ".k_img.", ".v_img.", ".norm_k_img."),
    # norm_added_q: in files of older versions; never used
    DIFFUSERS: ("condition_embedder.image_embedder.", ".add_k_proj.", ".add_v_proj.", ".norm_added_k.", "norm_added_q"),
}

# ours -> diffusers; what is not listed has the same name
OUTER = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
BLOCK = {
    **{f"self_attn.{ours}": f"attn1.{theirs}" for ours, theirs in ATTENTION.items()},
    **{f"cross_attn.{ours}": f"attn2.{theirs}" for ours, theirs in ATTENTION.items()},
    "norm3": "norm2",  # Wan counts its norms by their place in the code, diffusers by their place in the block
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}


def foreign(name: str, naming: str) -> str:
    """The name in `naming` of the tensor that we call `name`."""
    if naming == ORIGINAL or is_audio(name):
        return name
    prefix, inner, table = "", name, OUTER
    if name.startswith("blocks."):
        _, index, inner = name.split(".", 2)
        prefix, table = f"blocks.{index}.", BLOCK
    for ours, theirs in table.items():
        if inner == ours or inner.startswith(ours + "."):
            return prefix + theirs + inner.removeprefix(ours)
    return name


def naming_of(names: Iterable[str]) -> str | None:
    """Which naming a checkpoint follows; None for neither."""
    for name in names:
        if name.startswith("condition_embedder.") or ".attn1." in name:
            return DIFFUSERS
        if name.startswith("time_projection.") or ".self_attn." in name:
            return ORIGINAL
    return None


def is_audio(name: str) -> bool:
    """Is this a tensor that Wan does not have: an audio encoder, or the audio branch of a block?"""
    return any(part in name for part in AUDIO)


def is_clip(name: str, naming: str) -> bool:
    """Is this stored name part of the CLIP branch of an I2V model?"""
    return any(part in name for part in CLIP[naming])


def patch_from_wan(weight: Tensor, channels: int) -> Tensor:
    """Conv3d weight [D, C', 1, p, p] with C' >= channels -> our Linear's [D, p*p*channels]; later channels are cut."""
    return rearrange(weight[:, :channels, 0], "d c p q -> d (p q c)")


def patch_to_wan(weight: Tensor, patch: int) -> Tensor:
    """The inverse: [D, p*p*C] -> [D, C, 1, p, p]."""
    return rearrange(weight, "d (p q c) -> d c 1 p q", p=patch, q=patch)
