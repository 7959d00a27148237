"""Worlds whose teacher is known exactly, the small networks that learn in them, and the distance between samples.

A world's clips, flattened to n = T*C numbers, are drawn from a mixture of Gaussians sum_k w_k N(m_k, S_k). With
d = x_t - (1 - t) m_k and A = (1 - t)^2 S_k + t^2 I, each component has

    E[x0 | x_t] = m_k + (1 - t) S_k A^-1 d        E[eps | x_t] = t A^-1 d        log p = log N(d; 0, A)

so that v = E[eps - x0 | x_t], weighted by the components' posteriors, is exact at every t in [0, 1]. All stand-ins are
DiT and CausalDiT to the engine: terms and rollouts run on them unchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from distill.data.batch import keyed_generator
from distill.rollout import TrajectoryConfig
from distill.trajectories import causal_states, sample_states, step_times
from student.causal_dit import CausalDiT, StreamConfig
from teacher.attention import KV
from teacher.codec import PCACodec
from teacher.conditions import AUDIO_PER_LATENT, PAST, Conditions
from teacher.dit import DiT, DiTConfig
from teacher.guidance import Guidance

WIDTH = 64


@dataclass(frozen=True)
class World:
    """A mixture over clips [T, C, 1, 1]: weights [M], means [M, T*C], covariances [M, T*C, T*C], float64."""

    frames: int
    channels: int
    weights: Tensor
    means: Tensor
    covariances: Tensor

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Exact clips [count, T, C, 1, 1], float64."""
        z = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        rotation, spread = self.spectra
        flat = self.means[which] + torch.einsum("bij,bj->bi", rotation[which], spread[which].sqrt() * z)
        return self.clips(flat)

    def clips(self, flat: Tensor) -> Tensor:
        return rearrange(flat, "b (t c) -> b t c 1 1", c=self.channels)

    @cached_property
    def spectra(self) -> tuple[Tensor, Tensor]:
        """Eigenvectors (columns) [M, n, n] and eigenvalues [M, n] of the covariances."""
        spread, rotation = torch.linalg.eigh(self.covariances)
        return rotation, spread.clamp_min(0)

    def log_density(self, x: Tensor, t: float) -> Tensor:
        """log p_t of noised clips x [B, n], by torch's own distributions: shares no line with `Exact`."""
        covariances = (1 - t) ** 2 * self.covariances + t**2 * torch.eye(x.shape[1], dtype=torch.float64)
        parts = torch.distributions.MultivariateNormal((1 - t) * self.means, covariances)
        return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(self.weights), parts).log_prob(x)


def blobs() -> World:
    """One frame of two numbers: three Gaussians of unlike weight and width, which no mean describes."""
    means = torch.tensor([[-0.4, -0.6], [2.0, -0.6], [0.8, 1.4]], dtype=torch.float64)
    spreads = torch.tensor([0.5, 0.35, 0.42], dtype=torch.float64)
    covariances = spreads[:, None, None] ** 2 * torch.eye(2, dtype=torch.float64)
    return World(1, 2, torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64), means, covariances)


def video(frames: int = 4, memory: float = 0.9, mean: float = 0.5, spread: float = 1.0) -> World:
    """A stationary AR(1) process over frames, x_k+1 - m = a (x_k - m) + noise: covariance spread^2 a^|j - k|."""
    lag = (torch.arange(frames)[:, None] - torch.arange(frames)).abs()
    covariance = spread**2 * memory ** lag.double()
    means = torch.full((1, frames), mean, dtype=torch.float64)
    return World(frames, 1, torch.ones(1, dtype=torch.float64), means, covariance[None])


def conditions(world: World, count: int) -> Conditions:
    """Conditions that say nothing: silence, no text, no references."""
    audio = torch.zeros(count, AUDIO_PER_LATENT * (PAST + world.frames), 1)
    return Conditions(
        speak=audio,
        listen=audio,
        text=torch.zeros(count, 1, 1),
        text_mask=torch.zeros(count, 1, dtype=torch.bool),
        refs=torch.zeros(count, 1, world.channels, 1, 1),
        ref_mask=torch.zeros(count, 1, dtype=torch.bool),
    )


# ---- networks ---------------------------------------------------------------------------------------------


class Exact(DiT):
    """The network that flow matching on a world would converge to."""

    def __init__(self, world: World):
        nn.Module.__init__(self)
        self.world = world

    def encode_refs(self, cond: Conditions) -> list[list[KV]]:
        return []

    def forward(self, x: Tensor, t: Tensor, cond: Conditions | None, refs: list[list[KV]] | None = None) -> Tensor:
        world, a = self.world, t.double()[:, None, None]  # [B, 1, 1]
        rotation, spread = world.spectra
        d = x.flatten(1).double()[:, None] - (1 - a) * world.means  # [B, M, n]
        d = torch.einsum("mij,bmi->bmj", rotation, d)  # along the axes of each component
        variance = (1 - a) ** 2 * spread + a**2
        weights = (world.weights.log() - (d.square() / variance + variance.log()).sum(-1) / 2).softmax(-1)
        v = torch.einsum("mij,bmj->bmi", rotation, (a - (1 - a) * spread) * d / variance) - world.means
        return world.clips((weights[..., None] * v).sum(1)).to(x.dtype)


def time_features(t: Tensor) -> Tensor:
    """t [B] -> [B, 7]."""
    t = t.float()[:, None]
    angles = math.pi * t * torch.tensor([1.0, 2.0, 4.0])
    return torch.cat([t, angles.sin(), angles.cos()], -1)


class Perceptron(nn.Module):
    """Numbers [B, n] at t [B] -> numbers [B, m], and the hidden layer before them [B, WIDTH]."""

    def __init__(self, numbers: int, out: int):
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Linear(numbers + 7, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)
        )
        self.out = nn.Linear(WIDTH, out)

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(torch.cat([x, time_features(t)], -1))
        return self.out(nn.functional.silu(hidden)), hidden


class Bidirectional(DiT):
    """A teacher or critic that learns: one token for the whole clip."""

    def __init__(self, world: World):
        nn.Module.__init__(self)
        self.config, self.world = DiTConfig(dim=WIDTH, channels=world.channels, patch=1, heads=1), world
        self.net = Perceptron(world.frames * world.channels, world.frames * world.channels)

    def encode_refs(self, cond: Conditions) -> list[list[KV]]:
        return []

    def run(self, x, t, cond, positions, context, mask=None, r=None, keep=True):
        v, hidden = self.net(x.flatten(1), t)
        token = hidden[:, None]
        return self.world.clips(v), [(token, token)]


@dataclass(frozen=True)
class Past:
    """What such a student remembers: the last chunk as one row of numbers, the same for every step."""

    told: Tensor

    def at(self, step: int) -> Past:
        return self


class Causal(CausalDiT):
    """A student that sees its chunk and the chunk before it, which for AR(1) is all there is to see.

    The cache is that chunk with its noise level; a stream begins with none. A flow map hears r beside t.
    """

    flow_map = False

    def __init__(self, world: World, stream: StreamConfig, flow_map: bool = False):
        nn.Module.__init__(self)
        self.stream, self.channels, self.flow_map = stream, world.channels, flow_map
        self.numbers = stream.chunk_frames * world.channels
        self.net = Perceptron(2 * self.numbers + 2 + 7 * flow_map, self.numbers)

    def start(self, cond: Conditions):
        rows = len(cond.refs)
        return Past(torch.zeros(rows, self.numbers + 2))

    def streaming(self):
        return self

    def velocity(self, xt: Tensor, t: Tensor, cond: Conditions, cache, r: Tensor | None = None) -> Tensor:
        end = [time_features(torch.zeros_like(t) if r is None else r)] if self.flow_map else []
        v, _ = self.net(torch.cat([xt.flatten(1), cache.told, *end], -1), t)
        return rearrange(v, "b (k c) -> b k c 1 1", c=self.channels)

    def remember(self, x: Tensor, t: Tensor, cond: Conditions, cache):
        return Past(torch.cat([x.flatten(1), t.float()[:, None], torch.ones(len(x), 1)], -1))

    def forward(
        self,
        xt: Tensor,
        t: Tensor,
        cond: Conditions,
        hist: Tensor | None = None,
        t_hist: Tensor | None = None,
        r: Tensor | None = None,
    ) -> Tensor:
        size, out, cache = self.stream.chunk_frames, [], self.start(cond)
        t, t_hist = (repeat(s, "b -> b k", k=xt.shape[1]) if s is not None and s.ndim == 1 else s for s in (t, t_hist))
        hist, t_hist = (xt, t) if hist is None or t_hist is None else (hist, t_hist)
        for start in range(0, xt.shape[1], size):
            chunk = slice(start, start + size)
            out.append(self.velocity(xt[:, chunk], t[:, start], cond, cache, r))
            cache = self.remember(hist[:, chunk], t_hist[:, start], cond, cache)
        return torch.cat(out, 1)


class Paths:
    """Trajectories of a world's exact teacher, or of an autoregressive one, in the place of stored ones."""

    def __init__(self, world: World, times: tuple[float, ...], teacher: CausalDiT | None = None, count: int = 2048):
        grid, kept = step_times(TrajectoryConfig(steps=24, shift=1.0), times)
        noise = torch.randn(
            count, world.frames, world.channels, 1, 1, generator=keyed_generator("paths"), dtype=torch.float64
        )
        given = (conditions(world, count), grid, Guidance(1.0, 1.0))
        if teacher is None:
            states = sample_states(Exact(world), noise, *given)
        else:
            states = causal_states(teacher, noise.float(), *given)
        self._states = torch.stack([states[i] for i in kept], 1).float()

    def __len__(self) -> int:
        return len(self._states)

    def states(self, index: Tensor) -> Tensor:
        return self._states[index]


def codec(world: World) -> PCACodec:
    """A codec for the latents of a world."""
    basis, _ = torch.linalg.qr(torch.randn(768, world.channels, generator=keyed_generator("codec")))
    return PCACodec(torch.full((768,), 0.5), basis, torch.full((world.channels,), 5.0))


# ---- measuring --------------------------------------------------------------------------------------------


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| of samples [N, ...], without bias: zero in the mean when both are alike, and
    infinite where x is not finite (Szekely and Rizzo, 2013, doi 10.1016/j.jspi.2013.03.018)."""
    x, y = x.detach().flatten(1).double(), y.detach().flatten(1).double()
    if not bool(torch.isfinite(x).all()):
        return math.inf
    within = [torch.cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y)]
    return float(2 * torch.cdist(x, y).mean() - within[0] - within[1])


def best_gaussian(clips: Tensor) -> Tensor:
    """As many samples of the Gaussian with the mean and covariance of `clips`."""
    flat = clips.flatten(1)
    fit = torch.distributions.MultivariateNormal(flat.mean(0), torch.cov(flat.T))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return fit.sample((len(flat),))
