"""Variants of distribution matching: other divergences, guidance apart from distribution, score identity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from analytic import Exact, blobs, codec, conditions
from conftest import conditions as small_conditions
from conftest import has_gradient, latents, normal, small_dit, small_roles
from torch import Tensor, nn

from distill.contracts import Roles, Roll
from recipes import decoupled_dmd, dmd, sid
from student.causal_dit import StreamConfig
from teacher.flow import x0_from_v
from teacher.guidance import Guidance, guided_velocity

STREAM = StreamConfig(chunk_frames=2, sink_chunks=0, window_chunks=1, steps=(1.0, 0.5))
PLAIN, GUIDED = Guidance(1.0, 1.0), Guidance(3.0, 2.0)


# ---- other divergences ------------------------------------------------------------------------------------

DIVERGENCES: dict[str, Callable[[Tensor], Tensor]] = {  # f of D_f(p || q) = E_q f(r), r = p / q
    "reverse-kl": lambda r: -r.log(),
    "softened-reverse-kl": lambda r: (1 + r) * ((1 + r) / r).log(),
    "jensen-shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "squared-hellinger": lambda r: 4 * (1 - r.sqrt()),
    "forward-kl": lambda r: r * r.log(),
}


@pytest.mark.parametrize("name", dmd.WEIGHTS)
def test_a_divergences_weight_is_the_second_derivative_of_its_function_times_the_squared_ratio(name: str) -> None:
    r = torch.linspace(0.1, 5.0, 20, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(DIVERGENCES[name](r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    torch.testing.assert_close(dmd.WEIGHTS[name](r.detach().log()).exp(), (second * r**2).detach())


def test_a_divergence_weighs_each_clip_by_what_the_head_says_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head in the place of the exact ratio of two worlds: h of that ratio, bounded, with mean 1."""
    real, fake = blobs(), replace(blobs(), means=0.7 * blobs().means + 0.3, weights=blobs().weights.flip(0))
    critic = Exact(fake)
    critic.heads = nn.ModuleDict({"adversarial": nn.Identity()})
    stream = replace(STREAM, chunk_frames=1)
    roles = Roles({"teacher": Exact(real), "critic": critic}, stream, codec(real), key=(0, 0, 1, 0, 0))
    x0 = fake.sample(64, torch.Generator().manual_seed(1))
    roll = Roll(x0, conditions(real, 64))

    def log_ratio(critic: Exact, xt: Tensor, t: Tensor, roll: Roll) -> Tensor:
        pairs = zip(xt.flatten(1), t.tolist(), strict=True)
        return torch.stack([real.log_density(x[None], s) - fake.log_density(x[None], s) for x, s in pairs])

    monkeypatch.setattr(dmd, "judge", log_ratio)
    plain = dmd.Config(cfg=PLAIN, shift=1.0)
    xt, t = dmd.renoised(x0, "dmd", roles, plain)
    r = log_ratio(critic, xt, t, roll)[:, 0].exp()
    assert r.max() > 2 and r.min() < 0.7
    g = dmd.dmd_gradient(x0, roll, roles, plain)
    weighted = dmd.dmd_gradient(x0, roll, roles, replace(plain, divergence="forward-kl", limit=2.0))
    h = r.clamp(0.5, 2.0)
    torch.testing.assert_close(weighted, (h / h.mean())[:, None, None, None, None] * g)


def test_a_divergence_without_a_head_names_the_term_that_is_missing() -> None:
    with pytest.raises(ValueError, match="needs the term adversarial in the critic's phase"):
        dmd.term(Roll(latents(4), small_conditions(4)), small_roles(STREAM), dmd.Config(divergence="jensen-shannon"))


# ---- guidance and distribution apart ----------------------------------------------------------------------


def test_guidance_and_distribution_at_one_draw_add_up_to_the_guided_dmd_difference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    roles, x0, cond = small_roles(STREAM), latents(4), small_conditions(4)
    roll, seen = Roll(x0, cond), []
    real = decoupled_dmd.renoised

    def shared(x0: Tensor, tag: str, roles: Roles, cfg) -> tuple[Tensor, Tensor]:
        seen.append((tag, cfg))
        return real(x0, "one draw", roles, cfg)

    monkeypatch.setattr(decoupled_dmd, "renoised", shared)
    cfg = decoupled_dmd.Config(cfg=GUIDED)
    x = x0.clone().requires_grad_()
    decoupled_dmd.term(replace(roll, x0=x), roles, cfg).value.backward()
    xt, t = real(x0, "one draw", roles, cfg.distribution)
    with torch.no_grad():
        fake, plain = (x0_from_v(xt, roles.dit(role)(xt, t, cond), t) for role in ("critic", "teacher"))
        guided = x0_from_v(xt, guided_velocity(roles.dit("teacher"), xt, t, cond, GUIDED), t)
    size = (x0 - plain).abs().unflatten(1, (2, 2)).mean((2, 3, 4, 5)).repeat_interleave(2, 1)[:, :, None, None, None]
    assert x.grad is not None
    torch.testing.assert_close(x.grad * x.numel(), (fake - guided) / size, rtol=1e-9, atol=1e-9)
    assert not has_gradient(roles.models["critic"]) and not has_gradient(roles.models["teacher"])
    assert len({tag for tag, _ in seen}) == 2 and seen[0][1] is cfg.distribution and seen[1][1] is cfg.guidance


def test_each_part_has_its_own_noise_and_weight_and_guidance_without_any_is_nothing() -> None:
    roles, x0 = small_roles(STREAM), latents(4)
    roll = Roll(x0, small_conditions(4))
    part = decoupled_dmd.Part
    cfg = decoupled_dmd.Config(cfg=GUIDED, distribution=part(low=0.1, high=0.2), guidance=part(low=0.7, high=0.8))
    with torch.no_grad():
        d, g = (f(x0, roll, roles, cfg) for f in (decoupled_dmd.distribution_part, decoupled_dmd.guidance_part))
        twice = replace(cfg, distribution=replace(cfg.distribution, weight=2.0), guidance=part(weight=0.0))
        torch.testing.assert_close(decoupled_dmd.distribution_part(x0, roll, roles, twice), 2 * d)
        assert decoupled_dmd.guidance_part(x0, roll, roles, twice).eq(0).all() and g.ne(0).any()
        assert decoupled_dmd.guidance_part(x0, roll, roles, replace(cfg, cfg=PLAIN)).eq(0).all()


# ---- score identity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.2])
def test_the_score_identity_loss_is_that_of_the_formula_and_runs_through_both_networks(alpha: float) -> None:
    roles, x0, cond = small_roles(STREAM), latents(4).requires_grad_(), small_conditions(4)
    cfg = sid.Config(cfg=GUIDED, alpha=alpha)
    term = sid.term(Roll(x0, cond), roles, cfg)
    (found,) = torch.autograd.grad(term.value, x0)
    base = dmd.renoised(x0.detach(), "sid", roles, cfg)

    def loss(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        t = base[1]
        xt = base[0] + (1 - t)[:, None, None, None, None] * (x - x0.detach())
        real = x0_from_v(xt, guided_velocity(roles.dit("teacher"), xt, t, cond, GUIDED), t)
        fake = x0_from_v(xt, roles.dit("critic")(xt, t, cond), t)
        size = (x - real).abs().unflatten(1, (2, 2)).mean((2, 3, 4, 5)).repeat_interleave(2, 1)[:, :, None, None, None]
        size = size if scale is None else scale
        return (((real - fake) * (fake - x) + (1 - alpha) * (real - fake) ** 2) / size).mean(), size

    with torch.no_grad():
        value, scale = loss(x0.detach())
        torch.testing.assert_close(term.value.detach(), value)
        way = normal(*x0.shape, seed=9)
        slope = (loss(x0 + 1e-5 * way, scale)[0] - loss(x0 - 1e-5 * way, scale)[0]) / 2e-5
    torch.testing.assert_close((found * way).sum(), slope, rtol=1e-6, atol=1e-9)


def test_score_identity_is_at_rest_where_critic_and_teacher_agree() -> None:
    roles, x0 = small_roles(STREAM, {"critic": small_dit(1)}), latents(4).requires_grad_()
    value = sid.term(Roll(x0, small_conditions(4)), roles, sid.Config(cfg=PLAIN, alpha=1.2)).value
    (gradient,) = torch.autograd.grad(value, x0)
    assert value.abs() < 1e-12 and gradient.abs().max() < 1e-12
