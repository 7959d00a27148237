"""Masks by blocks, references without padding: the numbers of a dense mask, in calls that flash-attn can serve."""

from __future__ import annotations

import pytest
import torch
from conftest import conditions, latents, normal, small_dit, small_student
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from student.causal_dit import StreamConfig
from student.mask import causal_mask, teacher_forcing_mask
from teacher import attention as attentions
from teacher.attention import Blocks, attention, block_attention

MASKS = [causal_mask(5, 2, 1, 1, 3), causal_mask(4, 3, 0, 2, 0), teacher_forcing_mask(4, 2, 1, 1, 3)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("blocks", MASKS)
def test_blocks_are_the_dense_mask_forward_and_backward(blocks: Blocks, padded: bool) -> None:
    dense = blocks.dense()
    n, m = dense.shape
    q, k, v = (normal(2, size, 3, 8, seed=i).requires_grad_() for i, size in enumerate((n, m, m)))
    padding = None
    if padded:
        padding = torch.ones(2, 1, 1, m, dtype=torch.bool)
        padding[1, ..., 0] = False
    ours = block_attention(q, k, v, blocks, padding)
    theirs = attention(q, k, v, dense if padding is None else dense & padding)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    weight = normal(*ours.shape, seed=9)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_block_looks_at_joined_spans_of_what_it_sees() -> None:
    visible = torch.tensor([[1, 0, 1, 1]]).bool()
    assert Blocks(visible, 2, 3).spans(0) == [slice(0, 5), slice(7, 11)]
    assert Blocks(visible, 2).spans(0) == [slice(0, 2), slice(4, 8)]


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_a_masked_student_is_the_same_on_every_back_end(backend: SDPBackend) -> None:
    model = small_student(StreamConfig(2, sink_chunks=1, window_chunks=1), 3)
    x, hist, t, cond = latents(6), latents(6, seed=1), torch.full((2,), 0.5).double(), conditions(6)
    expected = model(x, t, cond, hist, t / 5)
    with sdpa_kernel(backend):
        torch.testing.assert_close(model(x, t, cond, hist, t / 5), expected, rtol=0, atol=1e-10)


def masks_seen(monkeypatch: pytest.MonkeyPatch, run) -> list[Tensor | None]:
    """The masks of all calls of `attention` that `run` makes."""
    seen: list[Tensor | None] = []
    plain = attentions.attention

    def noting(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        seen.append(mask)
        return plain(q, k, v, mask)

    monkeypatch.setattr(attentions, "attention", noting)
    run()
    return seen


def test_with_all_references_there_no_call_has_a_mask_teacher_or_student(monkeypatch: pytest.MonkeyPatch) -> None:
    student, t, x = (
        small_student(StreamConfig(2, sink_chunks=1, window_chunks=1), 3),
        torch.full((2,), 0.5).double(),
        latents(6),
    )
    for present in ((1, 1), (1, 0), (0, 1), (0, 0)):
        cond = conditions(6, present=present)
        for run in (lambda c=cond: student.dit(x, t, c), lambda c=cond: student(x, t, c, x, t / 5)):
            assert all(mask is None for mask in masks_seen(monkeypatch, run))
    mixed = conditions(6)
    mixed.ref_mask[0, 1] = False
    assert any(mask is not None for mask in masks_seen(monkeypatch, lambda: student.dit(x, t, mixed)))


def test_a_slot_that_nobody_fills_is_as_a_masked_one() -> None:
    """Row 0 lacks the second image. Alone it is left out, beside a row that has it it is masked."""
    model, x, t = small_dit(1), latents(2), torch.tensor([0.3, 0.8]).double()
    mixed = conditions(2)
    mixed.ref_mask[0, 1] = False
    together = model(x, t, mixed)
    for row in (0, 1):
        alone = model(x[row : row + 1], t[row : row + 1], mixed.select(slice(row, row + 1)))
        torch.testing.assert_close(alone, together[row : row + 1], rtol=0, atol=1e-12)


def test_keys_and_values_are_handed_out_only_where_they_are_kept() -> None:
    model, cond = small_dit(1), conditions(2)
    positions = torch.zeros(8, 3).double()
    v, layers = model.run(latents(2), torch.full((2,), 0.5).double(), cond, positions, None)
    same, none = model.run(latents(2), torch.full((2,), 0.5).double(), cond, positions, None, keep=False)
    assert torch.equal(v, same) and len(layers) == model.config.depth and none == []
