"""Picture quality without a learned judge: chunk seams, sharpness, color.

Generated video is a draw, not a reconstruction, so pixel errors against the data mean nothing; statistics do.
frames [N, F, 3, H, W] in [0, 1] -> influence values [N].
"""

from __future__ import annotations

import torch
from torch import Tensor

from evaluation.statistics import ratio_of_sums

CHUNK_FRAMES = 12  # video frames per chunk
LATENT_FRAMES = 4  # video frames per latent frame


def seam_ratio(frames: Tensor, chunk_frames: int = CHUNK_FRAMES, latent_frames: int = LATENT_FRAMES) -> Tensor:
    """Mean absolute pixel change across chunk borders over that across the other latent-frame borders; 1 = no seams.

    Like with like: the codec itself steps at every border of a latent frame, so changes inside one are no yardstick.
    """
    border = torch.arange(latent_frames, frames.shape[1], latent_frames)  # first frame after each border
    change = torch.stack([(frames[:, t] - frames[:, t - 1]).abs().double().mean((1, 2, 3)) for t in border], dim=1)
    at_chunk = border % chunk_frames == 0
    return ratio_of_sums(change[:, at_chunk].mean(1), change[:, ~at_chunk].mean(1))


def sharpness_ratio(frames: Tensor, data: Tensor) -> Tensor:
    """Gradient energy of the pictures relative to the data's; under 1 is blur, over 1 is grain."""
    return ratio_of_sums(gradient_energy(frames), gradient_energy(data))


def gradient_energy(frames: Tensor) -> Tensor:
    """frames [N, F, 3, H, W] -> mean squared difference of neighboring pixels [N]."""
    energy = []
    for clip in frames:  # one clip at a time: the differences of a whole set would double its memory
        across, down = clip[..., 1:] - clip[..., :-1], clip[..., 1:, :] - clip[..., :-1, :]
        energy.append(across.square().mean().double() + down.square().mean().double())
    return torch.stack(energy)


def mean_color(frames: Tensor) -> Tensor:
    """frames [..., F, 3, H, W] -> mean color [..., F, 3]."""
    return frames.float().mean((-1, -2))


def contrast_ratio(frames: Tensor, data: Tensor) -> Tensor:
    """Spread of the pixels of each frame relative to the data's: 0 is one solid color."""
    return ratio_of_sums(_contrast(frames), _contrast(data))


def color_shift(frames: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
    """(exposure, chroma) [N], [N]: how much brighter the clip is than the data's, and how far its mean color is off
    beside that, root mean square over the channels."""
    shift = (mean_color(frames).mean(1) - mean_color(data).mean(1)).double()  # [N, 3]
    exposure = shift.mean(1)
    return exposure, (shift - exposure[:, None]).square().mean(1).sqrt()


def color_drift(frames: Tensor, chunk_frames: int = CHUNK_FRAMES) -> Tensor:
    """Root mean square change of the mean color from the first chunk to the last, [N]."""
    color = mean_color(frames).double()
    return (color[:, -chunk_frames:].mean(1) - color[:, :chunk_frames].mean(1)).square().mean(1).sqrt()


def _contrast(frames: Tensor) -> Tensor:
    return torch.stack([clip.float().std((-2, -1)).mean().double() for clip in frames])
