"""Weights of Wan2.1 in and out: T2V and I2V transformers, in the Wan repository's naming or in that of diffusers.

`load_wan` builds the network on the meta device and fills it tensor by tensor from safetensors, one file or shards with
an index, so that memory holds the model and one tensor of the file at a time. Names, shapes and the presence of every
tensor are checked against the files' headers before the first one is read. With Wan's weights and a silent audio
branch the network gives Wan's velocity: x_t and the text as Wan takes them, t = Wan's timestep / 1000.

* loaded: whatever Wan has. An I2V model loses its CLIP branch and the input channels of mask and first frame.
* newly made: the audio branches and encoders, if the file has none, as in a fresh DiT (the branches' output is zero).
* written by `save_wan`: the same in either naming, with the audio parts under our names (`audio=False` leaves them
  out, and what they had learned with them). diffusers reads its own naming and passes over the audio parts.

Sizes come from the tensors themselves; the number of heads, which no tensor shows, from the config.json beside them.
All errors of the user's side are a ValueError of one sentence.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from teacher.blocks import AudioEncoder
from teacher.conditions import AUDIO_PER_LATENT
from teacher.dit import DiT, DiTConfig
from teacher.lora import Linear
from teacher.naming import (
    DIFFUSERS,
    ORIGINAL,
    PATCH,
    foreign,
    is_audio,
    is_clip,
    naming_of,
    patch_from_wan,
    patch_to_wan,
)

STEM, INDEX = "diffusion_pytorch_model", ".safetensors.index.json"
HEAD_DIM, EPS, FREQUENCIES = 128, 1e-6, 256  # the same in every Wan2.1
FLOAT32 = ("time_embedding.", "modulation", "norm")  # small, and Wan computes with them in float32: never rounded

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LoadReport:
    """What became of a checkpoint: name (loaded, made: ours; dropped: the file's) -> number of parameters."""

    source: str
    naming: str
    loaded: dict[str, int]
    dropped: dict[str, int]
    made: dict[str, int]

    def __str__(self) -> str:
        rows = (("loaded", self.loaded), ("dropped", self.dropped), ("newly made", self.made))
        lines = [f"  {what:10} {len(part):5} tensors {sum(part.values()):15,} parameters" for what, part in rows]
        return "\n".join([f"Weights of {self.source} ({self.naming} naming)", *lines])


@dataclass(frozen=True)
class _Stored:
    """The headers of a checkpoint: where its tensors are, and how large."""

    path: Path
    naming: str
    shards: list[Path]
    shapes: dict[str, Shape]
    where: dict[str, Path]

    def shape(self, name: str) -> Shape:
        """Shape of the tensor that we call `name`."""
        stored = foreign(name, self.naming)
        if stored not in self.shapes:
            raise ValueError(
                f"The weights in {self.path} lack {stored}: fetch them whole, or give the model the depth they have."
            )
        return self.shapes[stored]


# ---- public functions -------------------------------------------------------------------------------------


def load_wan(path: Path | str, config: DiTConfig, dtype: torch.dtype = torch.float32) -> tuple[DiT, LoadReport]:
    """A DiT on the CPU with the weights at `path`: a safetensors file, an index, a folder with either, or a diffusers
    pipeline with its `transformer` folder.

    A `dtype` below float32 spares what Wan computes in float32 (norms, modulation, time embedding); such a network
    runs under autocast. Newly made parts draw from torch's global generator. ValueError, before anything large is
    read: no file there, a damaged or missing shard, unknown naming, a tensor missing, left over or of another shape.
    """
    stored = _read_headers(Path(path))
    with torch.device("meta"):
        model = DiT(config)
    with_audio = any(map(is_audio, stored.shapes))
    parameters = {name: p for name, p in model.named_parameters() if with_audio or not is_audio(name)}
    dropped = _check(stored, parameters, config)
    ours = {foreign(name, stored.naming): name for name in parameters}
    for shard in stored.shards:
        with _opened(shard) as file:
            for key in file.keys():
                if key in ours:
                    _assign(model, ours[key], _owned(file.get_tensor(key), ours[key], config, dtype))
    made = {} if with_audio else _make_audio(model, dtype)
    return model, LoadReport(str(path), stored.naming, {n: p.numel() for n, p in parameters.items()}, dropped, made)


def save_wan(
    model: DiT, folder: Path | str, naming: str = ORIGINAL, max_shard_bytes: float = 5e9, audio: bool = True
) -> list[Path]:
    """Write safetensors and config.json in `naming`; more than `max_shard_bytes` become shards with an index.

    The folder must hold no safetensors yet. With `audio` the audio parts go along under our names, so that `load_wan`
    gives back the same model; without, the folder is a plain Wan. Returns the safetensors written.
    """
    if naming not in (ORIGINAL, DIFFUSERS):
        raise ValueError(f"There is no naming {naming!r}, it must be {ORIGINAL} or {DIFFUSERS}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.safetensors*")):
        raise ValueError(f"The folder {folder} holds weights already: give an empty one.")
    tensors = {name: p.detach() for name, p in model.named_parameters() if audio or not is_audio(name)}
    shards = _split(tensors, max_shard_bytes)
    files = [f"{STEM}.safetensors"]
    if len(shards) > 1:
        files = [f"{STEM}-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        part = {foreign(name, naming): _to_wan(name, tensors[name], model.config) for name in names}
        save_file(part, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        where = {foreign(name, naming): file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}
        (folder / f"{STEM}{INDEX}").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(_wan_settings(model.config, naming), indent=2))
    return [folder / file for file in files]


def wan_config(path: Path | str) -> DiTConfig:
    """The sizes of the network at `path` (as in `load_wan`), read from its tensors' shapes.

    Heads come from config.json, without one they are 128 wide as in every Wan2.1. Audio sizes come from the audio
    parts if there are any; they and the reference slots are our own and have our defaults otherwise.
    """
    stored = _read_headers(Path(path))
    dim, _, *patch = stored.shape(PATCH)
    if len(patch) != 3 or patch[0] != 1 or patch[1] != patch[2]:
        raise ValueError(f"The weights in {path} have patches of {tuple(patch)}, this network needs (1, p, p).")
    heads = _stored_heads(stored)
    if heads is None and dim % HEAD_DIM:
        raise ValueError(f"How many heads {path} has cannot be told: put its config.json beside the weights.")
    audio: dict[str, Any] = {}
    if any(map(is_audio, stored.shapes)):
        window, tokens, _ = stored.shape("speak_embedding.offsets")
        group = AUDIO_PER_LATENT // tokens
        mels = stored.shape("speak_embedding.layers.0.weight")[1] // group
        listen = stored.shape("listen_embedding.offsets")[0]
        audio = {"speak_window": window, "listen_window": listen, "audio_group": group, "mels": mels}
    return DiTConfig(
        dim=dim,
        depth=1 + max(int(name.split(".")[1]) for name in stored.shapes if name.startswith("blocks.")),
        heads=heads or dim // HEAD_DIM,
        ffn_dim=stored.shape("blocks.0.ffn.0.weight")[0],
        channels=stored.shape("head.head.weight")[0] // patch[1] ** 2,  # an I2V model reads more than it writes
        patch=patch[1],
        text_dim=stored.shape("text_embedding.0.weight")[1],
        **audio,
    )


# ---- finding and checking ---------------------------------------------------------------------------------


def _read_headers(path: Path) -> _Stored:
    shards = _find_shards(path)
    shapes: dict[str, Shape] = {}
    where: dict[str, Path] = {}
    for shard in shards:
        with _opened(shard) as file:
            for key in file.keys():
                shapes[key], where[key] = tuple(file.get_slice(key).get_shape()), shard
    naming = naming_of(shapes)
    if naming is None:
        first = f" (its first tensor is {min(shapes)})" if shapes else ""
        raise ValueError(f"{path} is not a Wan2.1 transformer in the Wan repository's or diffusers' naming{first}.")
    return _Stored(path, naming, shards, shapes, where)


def _find_shards(path: Path) -> list[Path]:
    if path.is_dir() and not any(path.glob("*.safetensors*")) and (path / "transformer").is_dir():
        path = path / "transformer"
    if path.is_dir():
        found = sorted(path.glob(f"*{INDEX}")) or sorted(path.glob("*.safetensors"))
        if not found:
            raise ValueError(f"There are no safetensors in {path}: other formats are not read.")
        if len(found) > 1:
            some = f"{found[0].name}, {found[1].name}, ..."
            raise ValueError(f"{path} holds {len(found)} candidates ({some}): name one, or fetch the shards' index.")
        path = found[0]
    if not path.is_file():
        raise ValueError(f"There are no weights at {path}: a safetensors file or a folder with some is needed.")
    if path.name.endswith(".safetensors"):
        return [path]
    if not path.name.endswith(INDEX):
        raise ValueError(f"{path} is not a safetensors file: other formats are not read.")
    try:
        shards = sorted({path.parent / name for name in json.loads(path.read_text())["weight_map"].values()})
    except (ValueError, KeyError, AttributeError):
        raise ValueError(f"The index {path} is damaged: fetch it again.") from None
    for shard in shards:
        if not shard.is_file():
            raise ValueError(f"The shard {shard} is missing, {path.name} names it: fetch it too.")
    return shards


@contextmanager
def _opened(shard: Path) -> Iterator[Any]:
    try:
        file = safe_open(str(shard), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{shard} is damaged or was not fetched to its end ({error}): fetch it again.") from None
    with file:
        yield file


def _check(stored: _Stored, parameters: dict[str, nn.Parameter], config: DiTConfig) -> dict[str, int]:
    """Does every parameter have its tensor, and every tensor its parameter? Returns what is dropped."""
    heads = _stored_heads(stored)
    if heads not in (None, config.heads):
        raise ValueError(f"The weights in {stored.path} have {heads} heads, not {config.heads}: set model.heads.")
    dropped, left = {}, set(stored.shapes)
    for name, parameter in parameters.items():
        found, needed = stored.shape(name), tuple(parameter.shape)
        left.discard(foreign(name, stored.naming))
        if name == PATCH:
            needed = (config.dim, config.channels, 1, config.patch, config.patch)
            surplus = found[1] - config.channels if len(found) == 5 else 0
            if surplus > 0:  # the mask and the first frame of an I2V model
                dropped[f"{PATCH}[:, {config.channels}:]"] = config.dim * surplus * config.patch**2
                found = (found[0], config.channels, *found[2:])
        if found != needed:
            stored_name = foreign(name, stored.naming)
            raise ValueError(
                f"{stored_name} in {stored.where[stored_name]} has shape {list(stored.shapes[stored_name])}, the model "
                f"needs {list(needed)}: the scale or the model block is not that of these weights."
            )
    for key in sorted(key for key in left if is_clip(key, stored.naming)):
        dropped[key] = torch.Size(stored.shapes[key]).numel()
        left.discard(key)
    if left:
        raise ValueError(
            f"The weights in {stored.path} hold {len(left)} tensors that the model has no place for, such as "
            f"{min(left)}: a Wan2.1 T2V or I2V transformer of {config.depth} blocks is needed."
        )
    return dropped


def _stored_heads(stored: _Stored) -> int | None:
    """Heads by the config.json beside the weights, None without one; also refuses what no tensor would show."""
    path = stored.shards[0].parent / "config.json"
    if not path.is_file():
        return None
    try:
        settings = json.loads(path.read_text())
        heads = int(settings.get("num_heads") or settings["num_attention_heads"])
        width = int(settings.get("dim") or heads * settings["attention_head_dim"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is not the configuration of a Wan2.1: put the one of the weights there.") from None
    found = stored.shape(PATCH)[0]
    if width != found:
        raise ValueError(
            f"{path} is of a model {width} wide, the weights beside it are {found} wide: fetch both again."
        )
    if settings.get("eps", EPS) != EPS:
        raise ValueError(f"{path} asks for norms with eps {settings['eps']}, this network has {EPS}.")
    return heads


# ---- moving tensors ---------------------------------------------------------------------------------------


def _owned(tensor: Tensor, name: str, config: DiTConfig, dtype: torch.dtype) -> Tensor:
    """Our copy of a stored tensor. What safetensors hands out may be a view of the mapped file: that must be let go."""
    tensor = patch_from_wan(tensor, config.channels) if name == PATCH else tensor
    return torch.empty(tensor.shape, dtype=_kept_in(name, dtype)).copy_(tensor)


def _kept_in(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if any(part in name for part in FLOAT32) else dtype


def _assign(model: DiT, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))


def _make_audio(model: DiT, dtype: torch.dtype) -> dict[str, int]:
    """Put real audio parts where the meta device has left promises; returns what was made."""
    config = model.config
    sizes = (config.dim, config.mels, AUDIO_PER_LATENT, config.audio_group)
    model.speak_embedding = AudioEncoder(*sizes, window=config.speak_window).to(dtype)
    model.listen_embedding = AudioEncoder(*sizes, window=config.listen_window).to(dtype)
    for block in model.blocks:
        attention = block.get_submodule("cross_attn")
        for name in ("audio_k", "audio_v", "audio_o"):
            layer = Linear(config.dim, config.dim)
            if name == "audio_o":  # the branch starts silent
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
            setattr(attention, name, layer.to(dtype))
    return {name: p.numel() for name, p in model.named_parameters() if is_audio(name)}


def _split(tensors: dict[str, Tensor], limit: float) -> list[list[str]]:
    """Names in order, a new shard where the next tensor would pass the limit."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _to_wan(name: str, tensor: Tensor, config: DiTConfig) -> Tensor:
    tensor = patch_to_wan(tensor, config.patch) if name == PATCH else tensor
    return tensor.cpu().contiguous()


def _wan_settings(config: DiTConfig, naming: str) -> dict[str, Any]:
    """config.json as the Wan repository or diffusers writes it."""
    if naming == ORIGINAL:
        return {
            "_class_name": "WanModel",
            "model_type": "t2v",
            "dim": config.dim,
            "eps": EPS,
            "ffn_dim": config.ffn_dim,
            "freq_dim": FREQUENCIES,
            "in_dim": config.channels,
            "num_heads": config.heads,
            "num_layers": config.depth,
            "out_dim": config.channels,
            "text_len": 512,
        }
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": [1, config.patch, config.patch],
        "num_attention_heads": config.heads,
        "attention_head_dim": config.dim // config.heads,
        "in_channels": config.channels,
        "out_channels": config.channels,
        "text_dim": config.text_dim,
        "freq_dim": FREQUENCIES,
        "ffn_dim": config.ffn_dim,
        "num_layers": config.depth,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": EPS,
    }
