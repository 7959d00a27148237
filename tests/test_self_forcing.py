"""The student's own rollouts: what carries gradient, what all ranks share, and what is scored."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    at_step,
    batch_of,
    conditions,
    gradients,
    has_gradient,
    latents,
    normal,
    small_dit,
    small_roles,
    small_student,
)
from torch import Tensor, nn

from distill.config import rollout_function
from distill.contracts import Roles
from recipes import dmd, flow_matching, identity_drift, ode_regression, perceptual, self_forcing
from student.causal_dit import CausalDiT, StreamConfig
from student.kv_cache import ChunkKV, KVCache
from student.stream import gaussian, stream
from teacher.conditions import AUDIO_PER_LATENT, PAST, Conditions
from teacher.embedder import IdentityEmbedder
from teacher.flow import add_noise, x0_from_v

STREAM = StreamConfig(chunk_frames=2, sink_chunks=1, window_chunks=1, steps=(1.0, 0.8, 0.45))


def exit_roles(wanted: int, models: dict[str, nn.Module] | None = None) -> Roles:
    """Roles at the first step whose keyed exit step is `wanted`."""
    roles = small_roles(STREAM, models)
    for step in range(100):
        roles = at_step(roles, step)
        drawn = torch.randint(3, (), generator=roles.generator("rollout/exit", shared=True))
        if int(drawn) == wanted:
            return roles
    raise AssertionError("no step found")


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_own_rollout_gradient_flows_through_the_exit_step_only(wanted: int) -> None:
    """Against the rollout written out, with every input of the exit evaluations computed without a graph."""
    roles, cond = exit_roles(wanted), conditions(6)
    student = roles.causal("student")
    probe = latents(6, seed=8)
    roll = self_forcing.roll_self(batch_of(cond), roles, self_forcing.Config(chunks=3))
    (roll.x0 * probe).sum().backward()
    found = [g.clone() for g in gradients(student) if g is not None]
    student.zero_grad()

    generator, like = roles.generator("rollout/noise"), latents(2)
    cache, total, out = student.start(cond), torch.zeros((), dtype=torch.float64), []
    for start in (0, 2, 4):
        told, x0 = cond.frames(start, start + 2), torch.zeros_like(like)
        for time in STREAM.steps[: wanted + 1]:
            t = torch.full((2,), time, dtype=torch.float64)
            xt = add_noise(x0.detach(), gaussian(like, generator), t).detach()
            x0 = x0_from_v(xt, student.velocity(xt, t, told, cache), t)
        out.append(x0)
        total = total + (x0 * probe[:, start : start + 2]).sum()
        t = torch.full((2,), STREAM.history.noise, dtype=torch.float64)
        seen = add_noise(x0.detach(), gaussian(like, generator), t)
        made = student.dit.run(seen, t, told, cache.positions(), cache.context())[1]
        cache = cache.push([(k.detach(), v.detach()) for k, v in made])
    total.backward()
    torch.testing.assert_close(roll.x0, torch.cat(out, 1), rtol=0, atol=1e-10)
    assert len(found) == len(list(student.parameters()))
    for ours, expected in zip(found, gradients(student), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("grad_chunks", "recompute"), [(1, False), (2, False), (2, True), (3, False), (4, False)])
def test_only_the_last_grad_chunks_carry_gradient(grad_chunks: int, recompute: bool) -> None:
    roles = small_roles(STREAM, {"student": small_student(STREAM, 3, checkpoint_blocks=recompute)})
    cfg = self_forcing.Config(chunks=4, grad_chunks=grad_chunks)
    roll = self_forcing.roll_self(batch_of(conditions(8)), roles, cfg)
    weights = list(roles.models["student"].parameters())
    for chunk in range(4):
        told = roll.x0[:, 2 * chunk : 2 * chunk + 2].sum()
        found = torch.autograd.grad(told, weights, retain_graph=True, allow_unused=True, materialize_grads=True)
        assert any(g.abs().sum() > 0 for g in found) == (chunk >= 4 - grad_chunks)


def test_exit_step_and_length_are_the_same_on_all_ranks_and_the_noise_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[int, int]] = []
    seen: list[int] = []

    def spy(model, cond, cache, steps, draft, generator, exit_step=None) -> Tensor:
        seen.append(exit_step)
        return gaussian(draft, generator)

    monkeypatch.setattr(self_forcing, "denoise_chunk", spy)
    roles, cfg = small_roles(STREAM), self_forcing.Config(chunks=4)
    for step in range(12):
        per_rank, samples = [], []
        for rank in (0, 1):
            seen.clear()
            samples.append(self_forcing.roll_self(batch_of(conditions(4)), at_step(roles, step, rank), cfg).x0)
            assert len(set(seen)) == 1  # one exit step for all chunks
            per_rank.append((len(seen), seen[0]))
        assert per_rank[0] == per_rank[1] and not torch.equal(*samples)
        drawn.append(per_rank[0])
    assert {length for length, _ in drawn} == {2, 3, 4} and {index for _, index in drawn} == {0, 1, 2}


def test_a_long_rollout_returns_its_last_clip_with_that_clips_conditions() -> None:
    cond, roles = conditions(4), small_roles(STREAM)
    for step in range(4):
        roll = self_forcing.roll_self(
            batch_of(cond), at_step(roles, step), self_forcing.Config(chunks=5, grad_chunks=1)
        )
        assert roll.x0.shape == latents(4).shape and roll.age is not None and roll.target is None
        assert roll.age.tolist() in [[last - 1, last - 1, last, last] for last in (1, 2, 3, 4)]
        heard = AUDIO_PER_LATENT * PAST
        assert roll.cond.num_frames == 4 and torch.equal(roll.cond.speak[:, heard:], cond.speak[:, heard:])
        assert torch.equal(roll.cond.listen[:, heard:], cond.listen[:, heard:])
    with pytest.raises(ValueError, match="shorter than the clip"):
        self_forcing.roll_self(batch_of(cond), roles, self_forcing.Config(chunks=1))


@pytest.mark.parametrize("frames", [4, 6, 8, 10, 14])
def test_longer_audio_ends_with_the_own_clip_and_has_seams_only_between_clips(frames: int) -> None:
    cond, clip = conditions(4, batch=3), 4
    length = AUDIO_PER_LATENT * (PAST + clip)
    named = (1000.0 * torch.arange(3)[:, None] + torch.arange(length))[..., None].expand(-1, -1, 4)
    cond = replace(cond, speak=named, listen=-named)
    joined = self_forcing.longer(cond, frames)
    assert joined.num_frames == frames and torch.equal(joined.listen, -joined.speak)
    own = AUDIO_PER_LATENT * clip
    assert torch.equal(joined.speak[:, -own:], named[:, -own:])
    before = joined.speak[:, :-own, 0]  # from the end: a whole clip body each, then the first one with its past
    for row in range(3):
        owners = (before[row] // 1000).long()
        places = before[row] % 1000
        jumps = (places.diff() != 1).nonzero()[:, 0] + 1
        assert all((len(places) - int(j)) % own == 0 for j in jumps)
        assert all(int(owners[int(j)]) != int(owners[int(j) - 1]) for j in jumps)
        assert owners.diff().count_nonzero() == len(jumps)
        assert frames == clip or owners[-1] != row  # what comes before the own clip is somebody else's
    if frames == clip:
        assert torch.equal(joined.speak, named)


def test_nothing_that_is_remembered_carries_gradient_from_chunk_to_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    written: list[Tensor] = []
    denoise, push = self_forcing.denoise_chunk, KVCache.push

    def spy(*arguments, **named) -> Tensor:
        made.append(denoise(*arguments, **named))
        return made[-1]

    def write(self: KVCache, chunk: ChunkKV) -> KVCache:
        written.extend(tensor for pair in chunk for tensor in pair)
        return push(self, chunk)

    monkeypatch.setattr(self_forcing, "denoise_chunk", spy)
    monkeypatch.setattr(KVCache, "push", write)
    self_forcing.roll_self(batch_of(conditions(6)), small_roles(STREAM), self_forcing.Config(chunks=3, grad_chunks=3))
    assert len(made) == 3 and all(x0.requires_grad for x0 in made)
    assert len(written) == 3 * 2 * 2 and not any(tensor.requires_grad for tensor in written)
    for index in (1, 2):
        before = torch.autograd.grad(made[index].sum(), made[:index], allow_unused=True, retain_graph=True)
        assert before == (None,) * index


# ---- who learns from what ---------------------------------------------------------------------------------

ROUTES = [  # rollout, term, its configuration, the one role that learns
    ("data", flow_matching, flow_matching.Config(role="teacher"), "teacher"),
    ("teacher", ode_regression, ode_regression.Config(), "student"),
    ("teacher", flow_matching, flow_matching.Config(), "critic"),
    ("renoised", dmd, dmd.Config(), "student"),
    ("renoised", perceptual, perceptual.Config(), "student"),
    ("renoised", flow_matching, flow_matching.Config(), "critic"),
    ("self", dmd, dmd.Config(), "student"),
    ("self", identity_drift, identity_drift.Config(), "student"),
    ("self", flow_matching, flow_matching.Config(), "critic"),
    ("refine", dmd, dmd.Config(), "refiner"),
    ("refine", identity_drift, identity_drift.Config(), "refiner"),
    ("refine", flow_matching, flow_matching.Config(), "critic"),
]


@pytest.mark.parametrize(("kind", "term", "cfg", "learner"), ROUTES, ids=lambda part: getattr(part, "__name__", None))
def test_a_term_gives_gradient_to_the_role_it_names_and_to_no_other(kind, term, cfg, learner: str) -> None:
    """Though every network could learn, the teacher and the backbone too: the terms are pure, not the trainer kind."""
    stored = torch.stack([latents(4, seed=seed) for seed in range(4)], 1)
    models: dict[str, nn.Module] = {
        "backbone": small_student(STREAM, 4),
        "refiner": small_student(STREAM, 5),
        "teacher": small_dit(1),
    }
    embedder = IdentityEmbedder(4, 4, 4).double().requires_grad_(False)
    trajectories = SimpleNamespace(states=lambda index: stored[index])
    roles = small_roles(STREAM, models, embedder=embedder, trajectories=trajectories)
    assert all(p.requires_grad for model in roles.models.values() for p in model.parameters())
    settings = self_forcing.Config(chunks=2) if kind in self_forcing.ROLLOUTS else None
    roll = rollout_function(kind)(batch_of(conditions(4), latents(4)), roles, settings)
    term.term(roll, roles, cfg).value.backward()
    assert {role for role, model in roles.models.items() if has_gradient(model)} == {learner}


def test_the_refiner_rollout_is_the_stream_that_ships() -> None:
    models: dict[str, nn.Module] = {"backbone": small_student(STREAM, 4), "refiner": small_student(STREAM, 5)}
    roles, cond = small_roles(STREAM, models), conditions(6)
    roll = self_forcing.roll_refine(batch_of(cond), roles, self_forcing.Config(chunks=3))
    shipped = stream(roles.causal("backbone"), roles.causal("refiner"), cond, roles.generator("rollout/noise"))
    torch.testing.assert_close(roll.x0, torch.cat(list(shipped), 1), rtol=0, atol=1e-10)


def test_no_gradient_is_lost_to_the_autocast_cache_behind_evaluations_without_gradient() -> None:
    """The exit step comes after evaluations under no_grad: a bf16 weight cached there would cut it off silently."""
    grads = []
    for cache in (True, False):
        roles = exit_roles(2, {"student": small_student(STREAM, 3, torch.float32)})
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            cond = conditions(4, dtype=torch.float32)
            roll = self_forcing.roll_self(batch_of(cond), roles, self_forcing.Config(chunks=2))
            roll.x0.square().mean().backward()
        grads.append(gradients(roles.models["student"]))
    for name, ours, expected in zip(dict(roles.models["student"].named_parameters()), *grads, strict=True):
        assert ours is not None and expected is not None and ours.abs().sum() > 0, name
        assert (ours - expected).norm() < 0.05 * expected.norm(), name  # bf16 sums in another order


def test_the_history_in_the_cache_has_the_streams_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[float] = []
    remember = CausalDiT.remember

    def spy(self: CausalDiT, x: Tensor, t: Tensor, cond: Conditions, cache: KVCache) -> KVCache:
        levels.append(float(t[0]))
        return remember(self, x, t, cond, cache)

    monkeypatch.setattr(CausalDiT, "remember", spy)
    self_forcing.roll_self(batch_of(conditions(4)), small_roles(STREAM), self_forcing.Config(chunks=2))
    assert levels == [0.1, 0.1]
    levels.clear()
    models: dict[str, nn.Module] = {"backbone": small_student(STREAM, 4), "refiner": small_student(STREAM, 5)}
    self_forcing.roll_refine(batch_of(conditions(4)), small_roles(STREAM, models), self_forcing.Config(chunks=2))
    assert levels == [0.1, 0.0, 0.1, 0.0]


def test_noise_is_keyed_by_step_rank_and_tag() -> None:
    roles, like = small_roles(STREAM), normal(3, 3)
    same, step, rank = at_step(roles, 1), at_step(roles, 2), at_step(roles, 1, rank=1)
    assert torch.equal(roles.noise(like, "a"), same.noise(like, "a"))
    assert not any(torch.equal(roles.noise(like, "a"), other.noise(like, "a")) for other in (step, rank))
    assert not torch.equal(roles.noise(like, "a"), roles.noise(like, "b"))
