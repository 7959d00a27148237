"""Video <-> latents. `Codec` is the interface (the Wan VAE's geometry at scale); `PCACodec` is the tiny one.

PCA over blocks of 4 frames x 8 x 8 pixels x RGB, shared by all positions. Each coefficient is divided by the square
root of its standard deviation: unit variance for every channel would make the teacher spend itself on noise, raw PCA
would leave all but the first channels untrained.

frames [B, F, 3, 8H, 8W] in [0, 1]  <->  latents [B, F/4, C, H, W]
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

import torch
from einops import rearrange, repeat
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

STRIDE = (4, 8, 8)


class Codec(Protocol):
    """What every video codec offers; strides are (frames, rows, columns) per latent."""

    channels: int

    def encode(self, frames: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def encode_image(self, image: Tensor) -> Tensor: ...


class PCACodec(nn.Module):
    """Linear codec: `latent = (block - mean) @ basis / scale`."""

    mean: Tensor  # [768]
    basis: Tensor  # [768, C], orthonormal columns
    scale: Tensor  # [C]

    def __init__(self, mean: Tensor, basis: Tensor, scale: Tensor):
        super().__init__()
        self.channels = basis.shape[1]
        self.register_buffer("mean", mean.float())
        self.register_buffer("basis", basis.float())
        self.register_buffer("scale", scale.float())

    @classmethod
    def fit(cls, frames: Tensor, channels: int = 32, motion: float = 3.0) -> PCACodec:
        """Fit on `frames` [N, F, 3, H, W] in [0, 1].

        Blocks count more the more they move (1 + motion * relative standard deviation over their four frames): a mouth
        is few pixels of a picture but most of what a viewer looks at.
        """
        blocks = _to_blocks(frames.float()).flatten(0, 3)  # [N, 768]
        moving = blocks.unflatten(-1, (STRIDE[0], -1)).var(1).mean(1).sqrt()
        weight = 1 + motion * moving / moving.mean().clamp_min(1e-12)
        weight = (weight / weight.mean())[:, None]
        mean = (blocks * weight).mean(0)
        centered = blocks - mean
        covariance = (centered * weight).T @ centered / len(blocks)
        vectors = torch.linalg.eigh(covariance.double())[1].float()
        basis = vectors.flip(1)[:, :channels]
        # The sign of an eigenvector is arbitrary; fixing it keeps latents comparable between fits.
        basis = basis * torch.sign(basis.sum(0) + 1e-12)
        std = (centered @ basis).square().mean(0).clamp_min(1e-12).sqrt()
        return cls(mean, basis, std.sqrt() * std.mean().sqrt())

    def encode(self, frames: Tensor) -> Tensor:
        """[B, F, 3, H, W] in [0, 1] -> [B, F/4, C, H/8, W/8]. F must divide by 4, H and W by 8."""
        if frames.shape[1] % STRIDE[0] or frames.shape[3] % STRIDE[1] or frames.shape[4] % STRIDE[2]:
            raise ValueError(f"The codec needs frames divisible by {STRIDE}, got {tuple(frames.shape)}.")
        z = (_to_blocks(frames.float()) - self.mean) @ self.basis / self.scale  # [B, T, H, W, C]
        return rearrange(z, "b t h w c -> b t c h w").contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """[B, T, C, H, W] -> [B, 4T, 3, 8H, 8W], clamped to [0, 1]."""
        return self.decode_unclamped(latents).clamp(0, 1)

    def decode_unclamped(self, latents: Tensor) -> Tensor:
        """Like `decode`, without the clamp, so that a loss on pixels keeps its gradient everywhere."""
        z = rearrange(latents.float(), "b t c h w -> b t h w c")
        blocks = (z * self.scale) @ self.basis.T + self.mean
        return rearrange(
            blocks, "b t h w (f p q c) -> b (t f) c (h p) (w q)", f=STRIDE[0], p=STRIDE[1], q=STRIDE[2], c=3
        )

    def encode_image(self, image: Tensor) -> Tensor:
        """One still per item, [B, 3, H, W] -> [B, C, H/8, W/8]: the latent of that image held for four frames."""
        return self.encode(repeat(image, "b c h w -> b f c h w", f=STRIDE[0]))[:, 0]

    def fingerprint(self) -> str:
        """Content hash: latents of codecs with different fingerprints must not be mixed."""
        digest = hashlib.sha256()
        for tensor in (self.mean, self.basis, self.scale):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, folder: Path | str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, str(Path(folder) / "codec.safetensors"))

    @classmethod
    def load(cls, folder: Path | str) -> PCACodec:
        tensors = load_file(str(Path(folder) / "codec.safetensors"))
        return cls(tensors["mean"], tensors["basis"], tensors["scale"])


def _block_size() -> int:
    return STRIDE[0] * STRIDE[1] * STRIDE[2] * 3


def _to_blocks(frames: Tensor) -> Tensor:
    return rearrange(
        frames, "b (t f) c (h p) (w q) -> b t h w (f p q c)", f=STRIDE[0], p=STRIDE[1], q=STRIDE[2]
    )  # [B, T, H, W, 768]
