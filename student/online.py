"""Online LPM: backbone, refiner and codec in one folder, ready to stream; saved, loaded and shared as the Hub does it.

folder/ config.json, backbone.safetensors, refiner.safetensors, codec.safetensors, README.md (model card)
        (+ manifest.json, characters/, voices/, demo.json, embedder.*: written by the export, kept by `save_pretrained`)
No pickle anywhere. A stream of a single step has no refiner.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from student import session_file
from student.card import card as plain_card
from student.causal_dit import CausalDiT, StreamConfig
from student.session import Session
from student.stream import Noise, stream
from teacher.codec import STRIDE, PCACodec
from teacher.conditions import Conditions
from teacher.dit import DiT, config_from

FORMAT = 1  # of config.json; folders without the entry are of format 1

BESIDE = (  # travels with the weights
    "README.md",
    "manifest.json",
    "demo.json",
    "characters",
    "voices",
    "embedder.json",
    "embedder.safetensors",
)


class OnlineLPM(nn.Module):
    """The streaming character: `len(steps) - 1` backbone evaluations and one of the refiner per chunk."""

    def __init__(self, backbone: CausalDiT, refiner: CausalDiT | None, codec: PCACodec):
        super().__init__()
        self.backbone, self.refiner, self.codec = backbone, refiner, codec
        self.folder: Path | None = None  # where it was loaded from
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        return self.codec.mean.device

    # ---- streaming --------------------------------------------------------------------------------------------

    def stream(self, references: Tensor, text: str = "", seed: int = 0, look_ahead: int = 1) -> Session:
        """A live session of the character in `references` [R, 3, H, W], images in [0, 1], the global one first.

        ValueError when they are not that, or more than the model has slots for.
        """
        slots, unit = len(self.backbone.dit.config.references), STRIDE[1] * self.backbone.dit.config.patch
        if references.ndim != 4 or references.shape[1] != 3 or not references.is_floating_point():
            raise ValueError(f"references must be float images [R, 3, H, W], not {list(references.shape)}.")
        if not 1 <= len(references) <= slots or references.shape[2] % unit or references.shape[3] % unit:
            raise ValueError(
                f"references must be 1 to {slots} images with sides divisible by {unit}, not {list(references.shape)}."
            )
        if not 0 <= float(references.min()) <= float(references.max()) <= 1:
            raise ValueError("references must lie in [0, 1]: divide bytes by 255.")
        return Session(self, self.codec.encode_image(references.to(self.device)), text, seed, look_ahead)

    def resume(self, folder: Path | str) -> Session:
        """A session that `Session.save` wrote, to go on where it was."""
        return session_file.resume(self, Path(folder))

    def latents(self, cond: Conditions, generator: torch.Generator | Noise) -> Iterator[Tensor]:
        """Latent chunks [B, K, C, H, W] for as long as the conditions' audio lasts."""
        return stream(self.backbone, self.refiner, cond, generator)

    def frames(self, cond: Conditions, generator: torch.Generator | Noise) -> Iterator[Tensor]:
        """Video chunks [B, 4K, 3, 8H, 8W] in [0, 1]."""
        for chunk in self.latents(cond, generator):
            yield self.codec.decode(chunk)

    def pictures(self, latents: Tensor) -> Tensor:
        """Latents [B, T, C, H, W] -> what is shown, uint8 [B, 4T, 8H, 8W, 3] on the CPU."""
        frames = self.codec.decode(latents).mul_(255).round_().to(torch.uint8)
        return frames.permute(0, 1, 3, 4, 2).contiguous().cpu()

    # ---- the folder -------------------------------------------------------------------------------------------

    def networks(self) -> dict[str, CausalDiT]:
        """Backbone and, where there is one, refiner, by name."""
        return {"backbone": self.backbone} | ({} if self.refiner is None else {"refiner": self.refiner})

    def config(self) -> dict[str, Any]:
        """What config.json holds."""
        return {
            "format": FORMAT,
            "model": asdict(self.backbone.dit.config),
            "stream": asdict(self.backbone.stream),
        }

    def fingerprint(self) -> str:
        """Tells models apart: a hash of the configuration and of the first values of every weight."""
        digest = hashlib.sha256(json.dumps(self.config(), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.flatten()[:64].float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save_pretrained(self, folder: Path | str, card: str | None = None) -> None:
        """Write weights, configuration and model card into `folder`, with what lay beside the weights it came from."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, net in self.networks().items():
            save_file({k: v.contiguous() for k, v in net.dit.state_dict().items()}, folder / f"{name}.safetensors")
        self.codec.save(folder)
        _write(folder / "config.json", json.dumps(self.config(), indent=2) + "\n")
        if self.folder is not None and self.folder.resolve() != folder.resolve():
            for beside in (self.folder / name for name in BESIDE):
                if beside.is_dir():
                    shutil.copytree(beside, folder / beside.name, dirs_exist_ok=True)
                elif beside.is_file():
                    shutil.copy(beside, folder)
        if card is not None or not (folder / "README.md").is_file():
            _write(folder / "README.md", card or plain_card(self.backbone.stream))

    @classmethod
    def from_pretrained(cls, folder: Path | str, **download: Any) -> OnlineLPM:
        """Read a folder that `save_pretrained` wrote, or a repository of the Hub ("user/name"), downloaded first.

        `download` goes to huggingface_hub.snapshot_download (revision, token, cache_dir). ValueError, in one sentence,
        when there is no Online LPM, a file of it is missing or damaged, or it is of another version.
        """
        place = Path(folder)
        if not place.exists() and isinstance(folder, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", folder):
            from huggingface_hub import snapshot_download

            place = Path(snapshot_download(folder, **download))
        config = _read_config(place)
        nets = []
        told = StreamConfig.read(config["stream"])
        for name in ("backbone", "refiner")[: 1 + told.refined]:
            dit = DiT(config_from(config["model"]))
            path = place / f"{name}.safetensors"
            try:
                dit.load_state_dict(_tensors(path))
            except RuntimeError as error:
                raise ValueError(f"{path} does not fit config.json ({str(error).splitlines()[-1].strip()})") from None
            nets.append(CausalDiT(dit, told))
        _tensors(place / "codec.safetensors")
        model = cls(nets[0], nets[1] if told.refined else None, PCACodec.load(place))
        model.folder = place
        return model

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, message: str = "Add Online LPM"
    ) -> str:
        """Make the repository if it is missing and upload the folder as one commit; returns the commit's address."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as temporary:
            self.save_pretrained(temporary)
            return str(api.upload_folder(repo_id=repo_id, folder_path=temporary, commit_message=message))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no Online LPM: config.json is missing; make one with `make export`.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        found = config.get("format", FORMAT)
        if found != FORMAT:
            raise ValueError(f"{path} is of format {found}, this version reads {FORMAT}.")
        config_from(config["model"]), StreamConfig.read(config["stream"])
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{path} is no JSON object ({error}).") from None
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no configuration of this version of Online LPM ({error}).") from None
    return config


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path} is missing: the folder is not whole, export or download it again.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): export or download it again.") from None


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
