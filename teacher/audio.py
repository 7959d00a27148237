"""Log-mel features without look-ahead, the only form in which audio reaches a network.

Window i ends at sample floor((i + 1) * 16000 / 48) and reaches 50 ms back; 16000 / 48 is not an integer, but three
hops are exactly 1000 samples, so window ends repeat with period 1000 and never drift.
wave [..., S] at 16 kHz -> features [..., floor(S * 48 / 16000), 32], about zero mean and unit deviation on speech,
exactly `SILENCE` where nothing sounds.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from teacher.conditions import SILENCE

SAMPLE_RATE = 16_000
MEL_RATE = 48  # features per second: two per video frame at 24 fps, eight per latent frame
MELS = 32
WINDOW = 800  # samples, 50 ms
FFT = 1024
MEAN, DEVIATION = -2.6, 1.1  # of log10 mel power over speech at RMS 0.1
PERIOD, ENDS = 1000, (333, 666, 1000)  # samples; floor((i + 1) * 1000 / 3) for i = 0, 1, 2


def _mel(hertz: Tensor) -> Tensor:
    return 2595.0 * torch.log10(1.0 + hertz / 700.0)


@lru_cache(maxsize=1)
def mel_filters() -> Tensor:
    """Triangular filters from 60 Hz to 7600 Hz, evenly spaced in mel: [FFT / 2 + 1, MELS]."""
    frequencies = _mel(torch.linspace(0, SAMPLE_RATE / 2, FFT // 2 + 1))
    low, high = _mel(torch.tensor([60.0, 7600.0])).tolist()
    edges = torch.linspace(low, high, MELS + 2)
    rising = (frequencies[:, None] - edges[None, :-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[None, 2:] - frequencies[:, None]) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0)  # [FFT / 2 + 1, MELS]


def log_mel(wave: Tensor) -> Tensor:
    """wave [..., S] float -> [..., floor(S * 48 / 16000), MELS] float32; no feature sees past its window's end."""
    count = wave.shape[-1] * MEL_RATE // SAMPLE_RATE
    rows = -(-count // len(ENDS))
    # Left padding starts the first windows in silence; right padding only fills the last period and is cut off below.
    missing = max(0, rows * PERIOD - wave.shape[-1])
    padded = functional.pad(wave.float(), (WINDOW, missing))
    windows = torch.stack(
        [padded[..., end : end + (rows - 1) * PERIOD + WINDOW].unfold(-1, WINDOW, PERIOD) for end in ENDS], dim=-2
    )  # [..., rows, 3, WINDOW]
    windows = windows.flatten(-3, -2)[..., :count, :]  # [..., A, WINDOW]
    taper = torch.hann_window(WINDOW, device=wave.device)
    power = torch.fft.rfft(windows * taper, n=FFT).abs().square() / taper.square().sum()  # [..., A, FFT / 2 + 1]
    mel = power @ mel_filters().to(wave.device)  # [..., A, MELS]
    return ((mel.clamp(min=1e-12).log10() - MEAN) / DEVIATION).clamp(min=SILENCE)
