"""The long rollout: its gradient is the direct one, its memory that of one chunk, its stream goes on where it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import at_step, batch_of, conditions, gradients, latents, small_dit, small_roles, small_student
from test_trainer import SIZES, FakeSource
from torch import Tensor, nn

from distill import config
from distill.contracts import Roles, Roll
from distill.data.batch import Batch
from distill.engine import Engine
from distill.meter import Meter
from distill.runs import StageRun
from distill.state import checkpoint
from distill.trainer import Trainer
from recipes import long
from recipes.carried import with_refs
from student.causal_dit import Sink, StreamConfig
from student.history import History
from student.stream import evaluate, write_chunk
from teacher.conditions import AUDIO_PER_LATENT, PAST

STREAM = StreamConfig(chunk_frames=2, sink_chunks=1, window_chunks=1, steps=(1.0, 0.8, 0.45))
HEARD = AUDIO_PER_LATENT * PAST


def clip(seed: int = 0, frames: int = 4, rows: int = 2) -> Batch:
    return batch_of(conditions(frames, rows, seed=seed), latents(frames, rows, seed=seed))


def backward(roll: Roll, probe: Tensor) -> None:
    (roll.x0 * probe).sum().backward()
    for part in roll.again():
        part.backward()


def direct(roll: Roll, probe: Tensor, detached: bool) -> None:
    """The window as one graph over what the replay was made from."""
    replay = roll.replay
    assert isinstance(replay, long.Replay)
    student = replay.student
    cache = with_refs(replay.cache, student.dit.encode_refs(roll.cond))
    total = probe.new_zeros(())
    parts = probe.split(STREAM.chunk_frames, 1)[-len(replay.window) :]
    for chunk, part in zip(replay.window, parts, strict=True):
        x0 = evaluate(student, chunk.xt, chunk.cond, cache, STREAM.steps, replay.exit_step, replay.exit_step)
        torch.testing.assert_close(x0, chunk.x0, rtol=0, atol=1e-10)
        total = total + chunk.weight * (x0 * part).sum()
        replay.noise.set_state(chunk.noise)
        written = write_chunk(student, x0, chunk.cond, cache, student.stream.history, replay.noise)
        cache = long._kept(written)
        if detached:
            pairs = [[[(k.detach(), v.detach()) for k, v in c] for c in place] for place in (cache.sink, cache.window)]
            cache = replace(cache, sink=tuple(pairs[0]), window=tuple(pairs[1]))
    total.backward()


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize(
    "change", [{}, {"history": History("random", 0.3)}, {"sink": Sink("ema", 0.5)}, {"window_chunks": 0}], ids=str
)
def test_replayed_gradient_is_the_direct_one(change: dict, cross: bool) -> None:
    """Three updates into the stream, where sink and window are full and some chunks have left."""
    roles = small_roles(replace(STREAM, **change), {"student": small_student(replace(STREAM, **change), 3)})
    cfg = long.Config(chunks=4, grad_chunks=3, max_chunks=40, cross_chunk_grad=cross, late=2.0)
    probe, student = latents(6, seed=8), roles.models["student"]
    for step in range(2):
        roll = long.roll_long(clip(step, 6), at_step(roles, step), cfg)
    backward(roll, probe)
    found = [None if g is None else g.clone() for g in gradients(student)]
    student.zero_grad()
    direct(roll, probe, detached=not cross)
    for ours, expected in zip(found, gradients(student), strict=True):
        assert ours is not None and expected is not None and expected.abs().sum() > 0
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)


def test_gradient_through_the_history_is_another_one() -> None:
    grads = []
    for cross in (False, True):
        roles = small_roles(STREAM)
        cfg = long.Config(chunks=3, grad_chunks=2, cross_chunk_grad=cross)
        backward(long.roll_long(clip(), roles, cfg), latents(4, seed=8))
        grads.append(torch.cat([g.flatten() for g in gradients(roles.models["student"]) if g is not None]))
    assert (grads[0] - grads[1]).norm() > 1e-3 * grads[0].norm()


def test_late_chunks_count_more_for_every_term_alike() -> None:
    """The gradient is that of a probe scaled chunk by chunk with 1 + late * age / max_chunks."""
    grads = []
    for late in (0.0, 3.0):
        roles = small_roles(STREAM)
        for step in range(2):
            cfg = long.Config(chunks=2, grad_chunks=2, max_chunks=10, late=late)
            roll = long.roll_long(clip(step), at_step(roles, step), cfg)
        probe = latents(4, seed=8)
        if not late:
            assert roll.age is not None and roll.age.tolist() == [2, 2, 3, 3]
            probe = probe * (1 + 3.0 * roll.age.double() / 10)[:, None, None, None]
        backward(roll, probe)
        grads.append(gradients(roles.models["student"]))
    for plain, weighted in zip(*grads, strict=True):
        torch.testing.assert_close(plain, weighted, rtol=1e-9, atol=1e-10)


def test_a_stream_goes_on_with_its_character_under_new_audio_and_text() -> None:
    roles, cfg = small_roles(STREAM), long.Config(chunks=4, grad_chunks=1, max_chunks=12)
    batches, rolls = [replace(clip(seed), identity=torch.tensor([seed, 10 + seed])) for seed in range(4)], []
    for step, batch in enumerate(batches):
        rolls.append(long.roll_long(batch, at_step(roles, step), cfg))
    firsts = [roll.first for roll in rolls]
    assert [int(roll.age[-1]) for roll in rolls if roll.age is not None] == [3, 7, 11, 3]  # then it began anew
    for roll, batch, owner in zip(rolls, batches, (0, 0, 0, 3), strict=True):
        assert roll.identity is not None and torch.equal(roll.identity, batches[owner].identity)
        assert torch.equal(roll.cond.refs, batches[owner].cond.refs) and torch.equal(roll.cond.text, batch.cond.text)
        assert torch.equal(roll.cond.speak[:, HEARD:], batch.cond.speak[:, HEARD:])
        assert roll.cond.num_frames == 4 and (roll.real is None) == (roll is rolls[1] or roll is rolls[2])
    assert firsts[0] is not None and all(torch.equal(firsts[0], f) for f in firsts[1:3] if f is not None)
    assert firsts[3] is not None and not torch.equal(firsts[0], firsts[3])


def test_audio_and_text_change_in_mid_run_and_audio_joins_without_a_gap() -> None:
    roles, cfg = small_roles(STREAM), long.Config(chunks=4, grad_chunks=1, max_chunks=12)
    first, second = clip(1, rows=3), clip(2, rows=3)  # of two, the neighbor on either side is the same
    long.roll_long(first, at_step(roles, 0), cfg)
    taken = long.take(at_step(roles, 1), second, roles.causal("student"), 8)
    assert taken is not None
    told = long.conditions_of(second, taken, at_step(roles, 1), 4)
    own = 4 * AUDIO_PER_LATENT  # of the clip, shorter than the past
    assert torch.equal(told[0].speak[:, HEARD - own : HEARD], first.cond.speak[:, -own:])  # the past is what was heard
    for before, after in zip(told, told[1:], strict=False):
        assert torch.equal(before.speak[:, -HEARD:], after.speak[:, :HEARD])
    neighbor = second.cond.text.roll(1, 0)
    assert all(torch.equal(one.text, neighbor) for one in told[:2])
    assert all(torch.equal(one.text, second.cond.text) for one in told[2:])
    assert torch.equal(told[0].listen[:, HEARD:], second.cond.listen.roll(1, 0)[:, HEARD:][:, : 2 * AUDIO_PER_LATENT])


def test_one_stream_in_two_pieces_is_the_stream_in_one() -> None:
    """Chunk by chunk with the same noise and conditions: what is carried is all there is."""
    roles, batch = small_roles(STREAM), clip()
    student, steps = roles.causal("student"), STREAM.steps
    whole = long.Config(chunks=4, grad_chunks=1)
    long.roll_long(batch, roles, whole)
    carried = long.take(roles, batch, student, 60)
    assert carried is not None
    cache, x = carried.cache, latents(2, seed=3)
    told = conditions(2, seed=9)
    told = replace(told, refs=batch.cond.refs, ref_mask=batch.cond.ref_mask)
    kept = dict(roles.carried)
    again = long.take(replace(roles, carried={n: t.clone() for n, t in kept.items()}), batch, student, 60)
    assert again is not None and again.cache.seen == 4
    ours, theirs = (evaluate(student, x, told, c, steps, 1, 2) for c in (cache, again.cache))
    assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, evaluate(student, x, told, student.start(told), steps, 1, 2))


def test_a_share_of_the_streams_begins_with_the_data_as_history() -> None:
    ages = []
    for step in range(12):
        roles = at_step(small_roles(STREAM), step)
        roll = long.roll_long(clip(), roles, long.Config(chunks=2, grad_chunks=1, p_data=0.5))
        assert roll.age is not None and roll.first is not None
        ages.append(int(roll.age[-1]))
        given = ages[-1] == 3
        assert torch.equal(roll.first, latents(4)[:, :2]) == given
        k, _ = roles.carried["0.sink.0.0.0.k"], None
        student, cond = roles.causal("student"), clip().cond
        noise = roles.rows("rollout/noise")
        if given:
            told = cond.frames(0, 2)
            written = write_chunk(student, latents(4)[:, :2], told, student.start(cond), STREAM.history, noise)
            assert torch.equal(k, long._kept(written).sink[0][0][0])
    assert set(ages) == {1, 3}


def test_the_critics_rollout_has_no_graph_and_no_replay() -> None:
    with torch.no_grad():
        roll = long.roll_long(clip(), small_roles(STREAM), long.Config(chunks=2, grad_chunks=2))
    assert roll.replay is None and not roll.x0.requires_grad and list(roll.again()) == []


# ---- memory -----------------------------------------------------------------------------------------------


def peak(chunks: int, grad_chunks: int, steps: int = 2) -> float:
    """Bytes of storages that live at the worst moment, weights and gradients apart."""
    student = small_student(STREAM, 3, torch.float32)
    roles = small_roles(STREAM, {"student": student})
    for p in student.parameters():
        p.grad = torch.zeros_like(p)
    meter = Meter()
    clips = [batch_of(conditions(4, seed=s, dtype=torch.float32)) for s in range(steps)]
    with meter.counting():
        for step in range(steps):
            cfg = long.Config(chunks=chunks, grad_chunks=grad_chunks, max_chunks=200)
            roll = long.roll_long(clips[step], at_step(roles, step), cfg)
            backward(roll, torch.ones_like(roll.x0))
            del roll
    return meter.total


def test_memory_does_not_grow_with_the_horizon_nor_with_the_chunks_that_learn() -> None:
    """But for latents and audio, which are small, and need no graph."""
    base = peak(4, 1)
    latent = latents(2, dtype=torch.float32).nbytes
    heard = 2 * 2 * AUDIO_PER_LATENT * 2 * 4 * 4
    assert peak(16, 1) - base < 12 * 4 * (latent + heard)
    assert peak(4, 2) - base < 12 * latent


# ---- resume -----------------------------------------------------------------------------------------------

RECIPE = """
name: r
scale: tiny
stage: stage3
model: {dim: 16, depth: 2, heads: 1, ffn_dim: 16, channels: 4, text_dim: 6, mels: 4, references: [global, expression]}
student: {chunk_frames: 1, sink_chunks: 1, window_chunks: 1, steps: [1.0, 0.5], sink: {kind: ema, decay: 0.5}}
rollout: {kind: long, chunks: 3, grad_chunks: 2, max_chunks: 40, late: 1.0, p_data: 0.5}
phases:
  - {update: critic, terms: {flow_matching: {role: critic}}}
  - {update: student, every: 2, terms: {dmd: {cfg: {text: 2.0, audio: 3.0}}}}
optimizer: {lr: 1.0e-3}
train: {steps: 6, batch_size: 2, grad_accumulation: 2, ema: 0.9, save_every: 3, log_every: 1}
"""


def trainer(folder: Path, *overrides: str) -> Trainer:
    (folder / "run").mkdir(exist_ok=True)
    (folder / "r.yaml").write_text(RECIPE)
    recipe = config.load(folder / "r.yaml", overrides)
    models: dict[str, nn.Module] = {
        "teacher": small_dit(1, **SIZES),
        "critic": small_dit(2, **SIZES),
        "student": small_student(recipe.student, 3, **SIZES),
    }
    from conftest import small_codec

    roles = Roles(models, recipe.student, small_codec().float())
    return Trainer(recipe, StageRun(folder / "run", done=False), roles, FakeSource(), Engine(), parent=None)


def test_resume_in_mid_stream_is_bitwise(tmp_path: Path) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = trainer(tmp_path / "whole").fit()
    trainer(tmp_path / "parts", "train.steps=3").fit()
    parts = trainer(tmp_path / "parts").fit()
    assert {path.name for path in whole.iterdir() if path.is_dir()} >= {"carried", "student"}
    for name in ("carried", "student", "critic", "ema", "optimizer_student"):
        a, b = checkpoint.load(whole, name), checkpoint.load(parts, name)
        assert a.keys() == b.keys() and [key for key in a if not torch.equal(a[key], b[key])] == [], name
    seen = checkpoint.load(whole, "carried")["1.seen"]
    assert seen.tolist()[0] in (3 * 9, 3 * 9 + 2)  # nine rollouts of three chunks, with or without the data's clip


def test_a_stream_without_a_name_is_begun_anew() -> None:
    """Checkpoints written before streams carried who they are."""
    roles, cfg = small_roles(STREAM), long.Config(chunks=2, grad_chunks=1)
    long.roll_long(clip(), roles, cfg)
    assert long.take(roles, clip(), roles.causal("student"), 60) is not None
    del roles.carried["0.identity"]
    assert long.take(roles, clip(), roles.causal("student"), 60) is None


def test_a_batch_of_another_size_begins_new_streams() -> None:
    roles, cfg = small_roles(STREAM), long.Config(chunks=2, grad_chunks=1)
    long.roll_long(clip(), at_step(roles, 0), cfg)
    other = batch_of(conditions(4, batch=3), latents(4, batch=3))
    roll = long.roll_long(other, at_step(roles, 1), cfg)
    assert roll.age is not None and int(roll.age[-1]) == 1 and len(roll.x0) == 3
