"""Teacher forcing, diffusion forcing, an autoregressive teacher's paths, and consistency to the moving average."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import batch_of, conditions, has_gradient, latents, normal, small_dit, small_roles, small_student
from torch import Tensor

from distill.contracts import Roles, Roll
from distill.trajectories import causal_states
from recipes import causal_flow_matching, consistency
from student.causal_dit import StreamConfig
from teacher.flow import add_noise, schedule
from teacher.guidance import Guidance

STREAM = StreamConfig(chunk_frames=2, sink_chunks=1, window_chunks=1, steps=(1.0, 0.5))


def given_to_the_student(
    forcing: str, rows: int = 8, **settings: float
) -> tuple[Roles, Tensor, tuple[Any, ...], Tensor]:
    """(roles, clips, what the student was given, the loss)."""
    roles, given = small_roles(STREAM, {"teacher": small_dit(1)}), []
    roles.models["student"].register_forward_hook(lambda module, inputs, out: given.append((*inputs, out)))
    x0 = latents(6, batch=rows).requires_grad_()
    cfg = causal_flow_matching.Config(forcing=forcing, **settings)
    value = causal_flow_matching.term(Roll(x0, conditions(6, batch=rows)), roles, cfg).value
    return roles, x0, given[0], value


@pytest.mark.parametrize("forcing", ["teacher", "diffusion"])
def test_every_chunk_has_a_time_of_its_own_and_only_the_student_learns(forcing: str) -> None:
    roles, x0, (xt, t, cond, *_, v), value = given_to_the_student(forcing)
    assert t.shape == (8, 6) and torch.equal(t[:, ::2], t[:, 1::2]) and len(t[:, ::2].unique()) == 24
    eps = roles.noise(x0, "causal_flow_matching/noise")
    torch.testing.assert_close(xt, add_noise(x0.detach(), eps, t))
    torch.testing.assert_close(value, (v - (eps - x0)).square().mean())
    value.backward()
    assert has_gradient(roles.models["student"]) and x0.grad is None
    assert not has_gradient(roles.models["teacher"]) and not has_gradient(roles.models["critic"])


def test_teacher_forcing_gives_the_clean_or_lightly_noised_past_and_diffusion_forcing_the_noisy_one() -> None:
    roles, x0, (_, _, _, hist, t_hist, _), _ = given_to_the_student("teacher")
    assert set(t_hist.tolist()) == {0.0, 0.1}
    torch.testing.assert_close(hist, add_noise(x0.detach(), roles.noise(x0, "rollout/history"), t_hist))
    assert torch.equal(hist[t_hist == 0], x0.detach()[t_hist == 0])
    _, _, given, _ = given_to_the_student("diffusion")
    assert len(given) == 4  # no history beside the noisy clip: the mask of the noisy clip itself is the past


def test_conditions_are_dropped_as_often_as_asked() -> None:
    for share, kept in ((0.0, 8), (1.0, 0)):
        *_, (_, _, cond, *_), _ = given_to_the_student("diffusion", drop_text=share)
        assert int(cond.text_mask.any(1).sum()) == kept and (cond.speak == conditions(6, batch=8).speak).all()


# ---- paths of an autoregressive teacher -------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [Guidance(1.0, 1.0), Guidance(3.0, 2.0)], ids=["plain", "guided"])
def test_an_autoregressive_path_is_that_of_the_whole_clip_under_its_own_clean_ends(guidance: Guidance) -> None:
    """Chunk by chunk against a cache per branch, against the whole clip under a mask with the ends as given history."""
    model, cond, times = small_student(STREAM, 3), conditions(6), schedule(3, 2.0)
    noise = normal(2, 6, 4, 4, 4, seed=7)
    states = causal_states(model, noise, cond, times, guidance)
    assert len(states) == 4 and torch.equal(states[0], noise)
    none = torch.zeros(2, dtype=torch.float64)
    told = {1.0: cond} if guidance.evaluations == 1 else None
    told = told or {2.0: cond, 1.0: cond.drop(audio=True), -2.0: cond.drop(audio=True, text=True)}
    x = noise
    with torch.no_grad():
        for now, following, expected in zip(times[:-1], times[1:], states[1:], strict=True):
            t = now.expand(2)
            v = sum(weight * model(x, t, which, states[-1], none) for weight, which in told.items())
            x = x + float(following - now) * v
            torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)


def test_a_chunks_path_is_a_function_of_its_noise_and_of_the_chunks_before_it() -> None:
    model, cond, times, plain = small_student(STREAM, 3), conditions(6), schedule(3, 1.0), Guidance(1.0, 1.0)
    noise = normal(2, 6, 4, 4, 4, seed=7)
    other = torch.cat([noise[:, :4], normal(2, 2, 4, 4, 4, seed=8)], 1)
    a, b = (causal_states(model, x, cond, times, plain)[-1] for x in (noise, other))
    assert torch.equal(a[:, :4], b[:, :4]) and not torch.allclose(a[:, 4:], b[:, 4:])


# ---- consistency to the average ---------------------------------------------------------------------------


def test_the_target_of_consistency_is_the_averages_prediction_when_asked() -> None:
    batch = batch_of(conditions(4), latents(4))
    average = small_student(STREAM, 9)
    roles = small_roles(STREAM, average=dict(average.named_parameters()))
    own, averaged = (
        consistency.roll_consistency(batch, roles, consistency.RollConfig(target=target))
        for target in ("student", "average")
    )
    by_hand = consistency.roll_consistency(batch, small_roles(STREAM, {"student": average}), consistency.RollConfig())
    assert torch.equal(own.x0, averaged.x0) and not torch.allclose(own.target, averaged.target)
    torch.testing.assert_close(averaged.target, by_hand.target)
    assert not averaged.target.requires_grad and averaged.x0.requires_grad
    with pytest.raises(ValueError, match="there is none"):
        consistency.roll_consistency(batch, small_roles(STREAM), consistency.RollConfig(target="average"))
