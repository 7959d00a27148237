"""The KV cache: equal to the masked forward in every arrangement and for as long as it streams, bounded, never written
in place; and the attention back ends underneath.

The batch rows of a comparison carry every presence of the references under clean and under noisy history, so that one
pass proves all six. Latents are not square: an exchange of rows and columns cannot hide.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from itertools import islice

import psutil
import pytest
import torch
from conftest import SIDE, conditions, latents, normal, small_student
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from student.causal_dit import CausalDiT, StreamConfig
from student.kv_cache import KVCache
from student.mask import causal_mask, visible_chunks
from student.stream import stream
from teacher import attention as attentions
from teacher.attention import KV, SelfAttention, attention
from teacher.conditions import Conditions
from teacher.rope import grid_positions, moved

TOKENS = SIDE * SIDE // 4  # per latent frame of the square clips
ROWS, COLUMNS = 2, 6  # of the others
PRESENT = torch.tensor([[0, 0], [1, 0], [1, 1]]).bool().repeat(2, 1)  # three rows of clean history, three of noisy


def config(chunk: int = 2, sink: int = 1, window: int = 2, **changes) -> StreamConfig:
    return StreamConfig(chunk_frames=chunk, sink_chunks=sink, window_chunks=window, **changes)


def times(frames: int, seed: int, batch: int = 2) -> Tensor:
    return normal(batch, frames, seed=seed).sigmoid()


def wide(frames: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Latents of the six rows."""
    return normal(len(PRESENT), frames, 4, ROWS, COLUMNS, seed=seed, dtype=dtype)


def wide_conditions(frames: int, dtype: torch.dtype = torch.float64) -> Conditions:
    return replace(conditions(frames, len(PRESENT), dtype=dtype), refs=wide(2, 9, dtype), ref_mask=PRESENT)


def history_times(frames: int) -> Tensor:
    """Clean for the first three rows, any noise for the others."""
    return times(frames, 4, len(PRESENT)) * torch.tensor([0.0] * 3 + [1.0] * 3, dtype=torch.float64)[:, None]


def cached(model: CausalDiT, xt: Tensor, t: Tensor, cond: Conditions, hist: Tensor, t_hist: Tensor) -> Tensor:
    """Velocities of a clip chunk by chunk, every chunk remembered as `hist` at t_hist. t, t_hist [B, T]."""
    size, cache, out = model.stream.chunk_frames, model.start(cond), []
    for start in range(0, xt.shape[1], size):
        now, told = slice(start, start + size), cond.frames(start, start + size)
        out.append(model.velocity(xt[:, now], t[:, now], told, cache))
        cache = model.remember(hist[:, now], t_hist[:, now], told, cache)
    return torch.cat(out, 1)


# ---- cache and mask ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("window", [0, 1, 2, 3])
@pytest.mark.parametrize("sink", [0, 1, 2])
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_cached_rollout_equals_full_forward(
    chunk: int, sink: int, window: int, dtype: torch.dtype, tolerance: float
) -> None:
    model = small_student(config(chunk, sink, window), dtype=dtype)
    frames = chunk * (sink + window + 1)
    cond, xt, t = wide_conditions(frames, dtype), wide(frames, 1, dtype), times(frames, 2, len(PRESENT))
    hist, t_hist = wide(frames, 3, dtype), history_times(frames)
    with torch.no_grad():
        given, own = model(xt, t, cond, hist, t_hist), model(xt, t, cond)
        torch.testing.assert_close(cached(model, xt, t, cond, hist, t_hist), given, rtol=0, atol=tolerance)
        torch.testing.assert_close(cached(model, xt, t, cond, xt, t), own, rtol=0, atol=tolerance)
    assert frames == chunk or (given - own)[:, chunk:].abs().amax((1, 2, 3, 4)).min() > 1e-3  # history counts


@pytest.mark.parametrize(("chunk", "window"), [(1, 1), (1, 3), (2, 2)])
def test_a_sliding_window_equals_masked_attention_over_the_whole_past(chunk: int, window: int) -> None:
    """Without sink and references only differences of positions count, hence one mask can stand for a long stream."""
    model, frames = small_student(config(chunk, 0, window)), 9 * chunk
    cond, x, t = conditions(frames, present=(0, 0)), latents(frames), times(frames, 2)
    refs = model.dit.encode_refs(cond)
    mask = causal_mask(9, chunk * TOKENS, 0, window, refs[0][0].k.shape[1])
    whole = model.dit.run(x, t, cond, grid_positions(frames, SIDE // 2, SIDE // 2), refs, mask)[0]
    torch.testing.assert_close(cached(model, x, t, cond, x, t), whole, rtol=0, atol=1e-10)


def layer_by_layer(model: CausalDiT, x: Tensor, t: Tensor, cond: Conditions, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The whole stream at once without cache or mask: in every layer, each chunk attends to the chunks in its sight,
    rotated to their places in its own window."""
    stream, base = model.stream, grid_positions(model.stream.chunk_frames, *model.dit.token_grid(x))
    size, chunks = stream.chunk_frames, x.shape[1] // stream.chunk_frames
    refs, attend = model.dit.encode_refs(cond), SelfAttention.forward

    def windowed(self, tokens, positions, context, mask):
        parts = tokens.chunk(chunks, 1)
        made, out = [(self.norm_k(self.k(part)), self.v(part)) for part in parts], []
        for i, part in enumerate(parts):
            sight = [j for j in range(i) if j < stream.sink_chunks or i - j <= stream.window_chunks]
            seen = [KV(*made[j], moved(base, place * size)) for place, j in enumerate(sight)]
            out.append(attend(self, part, moved(base, len(seen) * size), [*context, *seen], None)[0])
        return torch.cat(out, 1), (tokens, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(SelfAttention, "forward", windowed)
        return model.dit.run(x, t, cond, grid_positions(x.shape[1], *model.dit.token_grid(x)), refs)[0]


@pytest.mark.parametrize(("chunk", "sink", "window"), [(1, 1, 2), (2, 2, 1), (1, 0, 3), (1, 2, 0)])
@torch.no_grad()
def test_chunk_300_equals_attention_over_the_whole_past_as_chunk_3_does(
    chunk: int, sink: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, frames = small_student(config(chunk, sink, window)), 300 * chunk
    cond, x, t = wide_conditions(frames), wide(frames, 1), history_times(frames)
    whole = layer_by_layer(model, x, t, cond, monkeypatch)
    cache = model.start(cond)
    for index in range(300):
        now = slice(index * chunk, (index + 1) * chunk)
        told = cond.frames(now.start, now.stop)
        if index in (0, 3, 4, 5, 30, 299):
            v = model.velocity(x[:, now], t[:, now], told, cache)
            torch.testing.assert_close(v, whole[:, now], rtol=0, atol=1e-10, msg=lambda m, i=index: f"chunk {i}: {m}")
        cache = model.remember(x[:, now], t[:, now], told, cache)


@pytest.mark.parametrize(("sink", "window"), [(1, 2), (0, 3), (2, 1)])
@torch.no_grad()
def test_a_slid_window_is_the_masked_forward_over_the_chunks_in_sight(sink: int, window: int) -> None:
    """With one layer a chunk's keys and values depend on nothing before it: the clip that `forward` takes can be cut
    out of the stream, sink and all."""
    model, size, chunks = small_student(config(2, sink, window), depth=1), 2, 300
    frames, clip = size * chunks, size * (sink + window + 1)
    cond, xt, t = wide_conditions(frames), wide(frames, 1), times(frames, 2, len(PRESENT))
    hist, t_hist = wide(frames, 3), history_times(frames)
    cache = model.start(cond)
    for index in range(chunks):
        now = slice(index * size, (index + 1) * size)
        told = cond.frames(now.start, now.stop)
        if index in (sink + window, sink + window + 1, 30, chunks - 1):
            sight = [j for j in range(index + 1) if j < sink or index - j <= window]
            cut = torch.cat([torch.arange(j * size, (j + 1) * size) for j in sight])
            heard = cond.frames(now.stop - clip, now.stop)  # right for the last chunk, the one compared
            whole = model(xt[:, cut], t[:, cut], heard, hist[:, cut], t_hist[:, cut])
            v = model.velocity(xt[:, now], t[:, now], told, cache)
            torch.testing.assert_close(v, whole[:, -size:], rtol=0, atol=1e-10)
        cache = model.remember(hist[:, now], t_hist[:, now], told, cache)


def empty_cache(sink: int, window: int) -> KVCache:
    grid = (2, 1, 1)
    refs = KV(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), torch.tensor([[-10.0, 0, 0]]).double())
    return KVCache([[refs]], grid, sink, window)


@pytest.mark.parametrize(("sink", "window"), [(0, 0), (1, 0), (0, 1), (1, 2), (3, 2)])
def test_the_mask_shows_what_the_cache_holds(sink: int, window: int) -> None:
    mask, cache = visible_chunks(12, sink, window), empty_cache(sink, window)
    for chunk in range(12):
        held = [int(keys[0, 0, 0]) for [(keys, _)] in cache.visible]
        assert held == mask[chunk].nonzero()[:, 0].tolist() and cache.seen == chunk
        first, latest = set(range(min(chunk, sink))), set(range(max(0, chunk - window), chunk))
        assert set(held) == first | latest
        cache = cache.push([(torch.full((1, 2, 2), float(chunk)), torch.zeros(1, 2, 2))])


def test_positions_are_those_within_the_window_however_long_the_stream() -> None:
    cache, places = empty_cache(1, 2), []
    for _ in range(30):
        places.append([*(kv.positions[:, 0].tolist() for kv in cache.context()[0]), cache.positions()[:, 0].tolist()])
        cache = cache.push([(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2))])
    assert places[1] == [[-10], [0, 1], [2, 3]]
    assert places[3] == places[29] == [[-10], [0, 1], [2, 3], [4, 5], [6, 7]]


def test_the_same_content_gives_the_same_result_at_chunk_12_as_at_chunk_30() -> None:
    """Same audio, latents and times in every chunk: what two blocks can see is the same once the window is full."""
    model, one = small_student(config(2, 1, 2)), conditions(2)
    x, t, t_hist = latents(2), times(2, 1), times(2, 2)
    cache, out = model.start(one), []
    for _ in range(31):
        out.append(model.velocity(x, t, one, cache))
        cache = model.remember(x, t_hist, one, cache)
    assert torch.equal(out[30], out[12])
    assert not torch.allclose(out[0], out[12]) and not torch.allclose(out[2], out[3])


def test_the_same_memory_gives_the_same_result_at_chunk_3_as_at_chunk_30() -> None:
    model, one = small_student(config(2, 1, 2)), conditions(2)
    x, t = latents(2), times(2, 1)
    chunks = [model.dit.run(latents(2, seed=s), t, one, grid_positions(2, 2, 2), None)[1] for s in range(5)]
    early, late = model.start(one), model.start(one)
    for index in [0, 3, 4]:
        early = early.push(chunks[index])
    for index in [0, *[1, 2] * 14, 3, 4]:
        late = late.push(chunks[index])
    assert (early.seen, late.seen) == (3, 31)
    assert torch.equal(model.velocity(x, t, one, early), model.velocity(x, t, one, late))


# ---- memory -----------------------------------------------------------------------------------------------


def test_pushing_leaves_older_caches_as_they_were() -> None:
    model, one = small_student(config(2, 1, 2)), conditions(2)
    t = times(2, 1)
    cache = model.start(one)
    for seed in range(3):
        cache = model.remember(latents(2, seed=seed), t, one, cache)
    old, before = cache, model.velocity(latents(2), t, one, cache)
    copies = [(k.clone(), v.clone()) for chunk in old.visible for k, v in chunk]
    for seed in range(5):
        cache = model.remember(latents(2, seed=seed), t, one, cache)
    assert old.seen == 3 and torch.equal(model.velocity(latents(2), t, one, old), before)
    held = [pair for chunk in old.visible for pair in chunk]
    assert all(
        torch.equal(a, b) for pair, copy in zip(held, copies, strict=True) for a, b in zip(pair, copy, strict=True)
    )


def test_memory_is_bounded_and_forgotten_chunks_are_freed() -> None:
    cache, made = empty_cache(3, 2), []
    for _ in range(50):
        keys = torch.zeros(1, 2, 2)
        made.append(weakref.ref(keys))
        cache = cache.push([(keys, torch.zeros(1, 2, 2))])
        assert len(cache.visible) <= 5
    del keys
    gc.collect()
    assert [index for index, keys in enumerate(made) if keys() is not None] == [0, 1, 2, 48, 49]


def live_bytes() -> int:
    """Bytes of all storages that some tensor object still holds."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, torch.nn.Parameter)]
    return sum({s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}.values())


def test_memory_stays_flat_over_500_streamed_chunks() -> None:
    """To the byte among the tensors; for the process, whatever holds it, within half of what all chunks would take."""
    side, dtype = 16, torch.float32
    told = config(1, 1, 1, steps=(1.0, 0.5))
    backbone, refiner = (small_student(told, seed, dtype, dim=16, ffn_dim=8, depth=1) for seed in (1, 2))
    cond = conditions(500, batch=1, dtype=dtype)
    cond = replace(cond, refs=normal(1, 2, 4, side, side, dtype=dtype))
    chunks, tensors, resident = stream(backbone, refiner, cond, torch.Generator().manual_seed(0)), [], []
    for _ in range(5):
        last = next(islice(chunks, 99, None))
        tensors.append(live_bytes())
        resident.append(psutil.Process().memory_info().rss)
    assert last.isfinite().all() and next(chunks, None) is None
    chunk = 2 * 2 * (side // 2) ** 2 * 16 * 4  # keys and values of both networks
    assert max(tensors) == min(tensors) and max(resident) - resident[0] < 200 * chunk


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_through_a_rollout_are_identical_with_recomputed_activations(dtype: torch.dtype) -> None:
    grads = []
    for recompute in (False, True):
        model = small_student(config(1, 1, 1), dtype=dtype, checkpoint_blocks=recompute)
        cond, x, t = conditions(5, dtype=dtype), latents(5, dtype=dtype), times(5, 1)
        cached(model, x, t, cond, x, t).square().sum().backward()  # through the cache as well: nothing is detached
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(plain, again) and plain.abs().sum() > 0 for plain, again in zip(*grads, strict=True))


# ---- attention back ends ----------------------------------------------------------------------------------


def queries(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [2, 5, 3, 8], k, v [2, 9, 3, 8] and a mask [2, 1, 5, 9]: no two sizes alike that could be confused."""
    q, k, v = (normal(2, n, 3, 8, seed=n + i).to(dtype) for i, n in enumerate((5, 9, 9)))
    return q, k, v, (normal(2, 1, 5, 9, seed=4) > -0.5)


def by_the_formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k / sqrt(d)) v, head by head, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    weights = weights if mask is None else weights.masked_fill(~mask, -torch.inf)
    return torch.einsum("bhnm,bmhd->bnhd", weights.softmax(-1), v)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])  # all that torch has on a CPU
def test_attention_back_ends_agree(backend: SDPBackend, dtype: torch.dtype, tolerance: float, masked: bool) -> None:
    q, k, v, mask = queries(dtype)
    with sdpa_kernel(backend):
        out = attention(q, k, v, mask if masked else None)
    assert out.dtype == dtype
    expected = by_the_formula(q, k, v, mask if masked else None)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)


class OnGPU(Tensor):
    """Says that it is on a GPU, which is what the choice of the back end asks."""

    is_cuda = True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half])
def test_flash_attn_gets_tokens_before_heads_and_what_is_masked_goes_another_way(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """flash-attn's own layout: [batch, tokens, heads, head_dim], and no mask."""
        asked.append(tuple(k.shape))
        return by_the_formula(q, k, v, None).to(dtype)

    monkeypatch.setattr(attentions, "_flash_attn", lambda: flash_attn_func)
    q, k, v, mask = queries(dtype)
    q, k, v = (x.as_subclass(OnGPU) for x in (q, k, v))
    out, masked = attention(q, k, v).as_subclass(Tensor), attention(q, k, v, mask).as_subclass(Tensor)
    assert asked == [(2, 9, 3, 8)]
    torch.testing.assert_close(out.double(), by_the_formula(q, k, v, None).as_subclass(Tensor), rtol=0, atol=2e-2)
    torch.testing.assert_close(masked.double(), by_the_formula(q, k, v, mask).as_subclass(Tensor), rtol=0, atol=2e-2)
    attention(*(x.float() for x in (q, k, v)))  # flash-attn has no fp32
    attention(*(x.as_subclass(Tensor) for x in (q, k, v)))
    assert len(asked) == 1
