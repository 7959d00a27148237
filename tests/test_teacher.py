"""Guidance, positions, the bidirectional network, codec, model folders: each against a known answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SIDE, conditions, latents, normal, randomize, small_codec, small_dit
from torch import Tensor

from teacher.attention import KV, CrossAttention, SelfAttention, attention
from teacher.blocks import AudioEncoder
from teacher.codec import PCACodec
from teacher.conditions import AUDIO_PER_LATENT, PAST, SILENCE, Conditions, encode_text
from teacher.dit import DiT, DiTConfig
from teacher.embedder import IdentityEmbedder, contrastive_loss
from teacher.guidance import Guidance, guided_velocity
from teacher.rope import grid_positions, moved, reference_times

# ---- guidance ---------------------------------------------------------------------------------------------


class Branches(DiT):
    """Stands in for a network: one constant per guidance branch, and how often it was asked."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.asked: list[str] = []

    def encode_refs(self, cond: Conditions) -> list[list[KV]]:
        return []

    def forward(self, x: Tensor, t: Tensor, cond: Conditions, refs: list[list[KV]] | None = None) -> Tensor:
        silent = bool((cond.speak == SILENCE).all() and (cond.listen == SILENCE).all())
        branch = {(False, True): "full", (True, True): "text", (True, False): "none"}[
            silent, bool(cond.text_mask.any())
        ]
        self.asked.append(branch)
        assert cond.ref_mask.all(), "references are kept in every branch"
        return torch.full_like(x, {"full": 7.0, "text": 3.0, "none": 1.0}[branch])


def guided(text: float, audio: float) -> tuple[float, list[str]]:
    model, x = Branches(), latents(2)
    v = guided_velocity(model, x, torch.ones(2), conditions(2), Guidance(text, audio))
    assert bool((v == v.flatten()[0]).all())
    return float(v.flatten()[0]), model.asked


def test_equal_weights_are_plain_guidance_at_two_evaluations() -> None:
    value, asked = guided(4.0, 4.0)
    assert value == pytest.approx(1 + 4 * (7 - 1)) and sorted(asked) == ["full", "none"]


def test_unequal_weights_guide_each_modality_by_itself() -> None:
    value, asked = guided(3.0, 2.0)
    assert value == pytest.approx(1 + 3 * (3 - 1) + 2 * (7 - 3)) and len(asked) == 3


def test_weights_of_one_are_the_plain_conditional_prediction() -> None:
    assert guided(1.0, 1.0) == (7.0, ["full"])


def test_guidance_scale_s_of_self_forcing_is_weight_s_plus_one_here() -> None:
    scale, conditional, unconditional = 3.0, 7.0, 1.0
    theirs = conditional + scale * (conditional - unconditional)
    assert guided(scale + 1, scale + 1)[0] == pytest.approx(theirs)


@pytest.mark.parametrize("weights", [(1, 1), (4, 4), (3, 2), (1, 3), (3, 1), (3, 0), (0, 0), (0, 2)])
def test_the_promised_number_of_evaluations_is_the_number_made(weights: tuple[float, float]) -> None:
    assert Guidance(*weights).evaluations == len(guided(*weights)[1])


# ---- positions and attention ------------------------------------------------------------------------------


def test_attention_sees_only_differences_of_positions() -> None:
    layer = SelfAttention(32, 2).double()
    randomize(layer)
    x, kept, here = normal(2, 8, 32, seed=1), normal(2, 8, 32, seed=2), grid_positions(2, 2, 2)

    def out(queries: int, keys: int) -> Tensor:
        context = [KV(layer.norm_k(layer.k(kept)), layer.v(kept), moved(here, keys))]
        return layer(x, moved(here, queries), context, None)[0]

    torch.testing.assert_close(out(1007, 1004), out(3, 0), rtol=0, atol=1e-10)
    assert (out(4, 0) - out(3, 0)).abs().max() > 1e-3


def test_tokens_kept_from_an_earlier_call_are_as_good_as_tokens_of_this_one() -> None:
    layer = SelfAttention(32, 2).double()
    randomize(layer)
    both, places = normal(2, 12, 32, seed=1).requires_grad_(), grid_positions(3, 2, 2)
    kept = both[:, :8]
    context = [KV(layer.norm_k(layer.k(kept)), layer.v(kept), places[:8])]
    split = layer(both[:, 8:], places[8:], context, None)[0]
    together = layer(both, places, [], None)[0][:, 8:]
    torch.testing.assert_close(split, together, rtol=0, atol=1e-10)
    grads = [torch.autograd.grad(out.square().sum(), both)[0] for out in (split, together)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-9)


def test_attention_is_softmax_of_scaled_products_under_the_mask() -> None:
    q, k, v = (normal(2, 5, 2, 4, seed=s) for s in (1, 2, 3))
    mask = normal(5, 5, seed=4) > -0.5
    mask |= torch.eye(5, dtype=torch.bool)
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) / 2
    expected = torch.einsum("bhnm,bmhd->bnhd", logits.masked_fill(~mask, -torch.inf).softmax(-1), v)
    torch.testing.assert_close(attention(q, k, v, mask), expected)


def test_every_reference_stands_at_a_time_of_its_own_before_the_video() -> None:
    kinds = ("global", *["body"] * 4, *["expression"] * 8)
    times = reference_times(kinds)
    assert len(set(times)) == len(kinds) and max(times) < 0
    with pytest.raises(ValueError, match="hat"):
        reference_times(("hat",))


# ---- the network ------------------------------------------------------------------------------------------


def test_an_absent_reference_changes_nothing_and_a_present_one_does() -> None:
    model, x, t = small_dit(), latents(2), torch.full((2,), 0.5)
    cond = conditions(2, present=(1, 0))
    cond.refs.requires_grad_()
    v = model(x, t, cond)
    (gradient,) = torch.autograd.grad(v.square().sum(), cond.refs)
    assert torch.equal(gradient[:, 1], torch.zeros_like(gradient[:, 1])) and gradient[:, 0].abs().min() > 0
    other = replace(cond, refs=cond.refs + torch.tensor([0.0, 9.0]).reshape(1, 2, 1, 1, 1))
    assert torch.equal(model(x, t, other), v)
    assert not torch.allclose(model(x, t, replace(cond, ref_mask=torch.ones(2, 2, dtype=torch.bool))), v)


def test_references_are_told_apart_by_their_slot() -> None:
    model, x, t, cond = small_dit(), latents(2), torch.full((2,), 0.5), conditions(2)
    swapped = replace(cond, refs=cond.refs.flip(1))
    assert not torch.allclose(model(x, t, swapped), model(x, t, cond))


def test_references_kept_from_an_earlier_call_give_the_same_velocity() -> None:
    model, x, cond = small_dit(), latents(2), conditions(2)
    refs = model.encode_refs(cond)
    for time in (0.2, 0.9):
        t = torch.full((2,), time)
        assert torch.equal(model(x, t, cond, refs), model(x, t, cond))


def test_masked_words_change_nothing() -> None:
    model, x, t, cond = small_dit(), latents(2), torch.full((2,), 0.5), conditions(2)
    text = cond.text.clone()
    text[:, 2] += 5  # the word that text_mask hides
    assert torch.equal(model(x, t, replace(cond, text=text)), model(x, t, cond))
    text[:, 0] += 5
    assert not torch.allclose(model(x, t, replace(cond, text=text)), model(x, t, cond))


@pytest.mark.parametrize("window", [1, 3, 10])
def test_audio_reaches_its_own_frame_and_the_window_after_it_and_no_other(window: int) -> None:
    frames, tokens = 6, 4
    encoder, layer = AudioEncoder(32, 4, AUDIO_PER_LATENT, 4, window).double(), CrossAttention(32, 2).double()
    randomize(encoder)
    randomize(layer, 1)
    features = conditions(frames, batch=1).speak.requires_grad_()
    x, text = normal(1, frames * tokens, 32, seed=5), normal(1, 3, 32, seed=6)
    out = layer(x, text, encoder(features, PAST), encoder.offsets).unflatten(1, (frames, tokens))
    for frame in range(frames):
        (gradient,) = torch.autograd.grad(out[:, frame].square().sum(), features, retain_graph=True)
        heard = gradient.unflatten(1, (-1, AUDIO_PER_LATENT)).abs().amin((0, 2, 3))  # per latent frame, past first
        silent = gradient.unflatten(1, (-1, AUDIO_PER_LATENT)).abs().amax((0, 2, 3))
        inside = torch.zeros(PAST + frames, dtype=torch.bool)
        inside[PAST + frame - window + 1 : PAST + frame + 1] = True
        assert (heard[inside] > 0).all() and (silent[~inside] == 0).all()


def test_the_order_of_audio_within_a_frame_matters() -> None:
    model, x, t, cond = small_dit(), latents(2), torch.full((2,), 0.5), conditions(2)
    swapped = cond.speak.clone()
    swapped[:, -8:] = cond.speak[:, -8:].flip(1)
    assert not torch.allclose(model(x, t, replace(cond, speak=swapped)), model(x, t, cond))
    tokens = cond.speak.clone()  # whole tokens of four features swapped: only the offset tells them apart
    tokens[:, -8:] = cond.speak[:, -8:].roll(4, 1)
    assert not torch.allclose(model(x, t, replace(cond, speak=tokens)), model(x, t, cond))


@pytest.mark.parametrize(("depth", "listens"), [(1, False), (2, True)])
def test_even_blocks_hear_the_speak_audio_and_odd_ones_the_listen_audio(depth: int, listens: bool) -> None:
    model, x, t, cond = small_dit(depth=depth), latents(2), torch.full((2,), 0.5), conditions(2)
    v = model(x, t, cond)
    assert not torch.allclose(model(x, t, replace(cond, speak=cond.speak + 1)), v)
    assert torch.allclose(model(x, t, replace(cond, listen=cond.listen + 1)), v) is not listens


def test_the_audio_branch_starts_silent() -> None:
    model = DiT(small_dit().config)
    randomize(model.head)
    x, t, cond = latents(2, dtype=torch.float32), torch.full((2,), 0.5), conditions(2, dtype=torch.float32)
    assert torch.equal(model(x, t, replace(cond, speak=cond.speak + 1)), model(x, t, cond))


def test_a_time_per_frame_is_the_time_of_the_clip_when_all_are_equal() -> None:
    model, x, cond = small_dit(), latents(3), conditions(3)
    t = torch.tensor([0.3, 0.7], dtype=torch.float64)
    assert torch.equal(model(x, t, cond), model(x, t[:, None].expand(-1, 3), cond))
    assert not torch.allclose(model(x, t, cond), model(x, t[:, None] * torch.tensor([1.0, 1.0, 0.5]), cond))


def test_recomputed_activations_give_the_same_gradients() -> None:
    grads = []
    for recompute in (False, True):
        model = small_dit(checkpoint_blocks=recompute)
        model(latents(2), torch.full((2,), 0.5), conditions(2)).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(g is not None for g in grads[0])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-10, atol=1e-12)


# ---- conditions -------------------------------------------------------------------------------------------


def test_a_cut_hears_what_the_whole_clip_hears() -> None:
    encoder, cond = AudioEncoder(32, 4, AUDIO_PER_LATENT, 4, 10).double(), conditions(6)
    cut = cond.frames(2, 5)
    assert cut.num_frames == 3 and cond.num_frames == 6
    torch.testing.assert_close(encoder(cut.speak, PAST), encoder(cond.speak, PAST)[:, 2 : 2 + 3 + 9])


def test_dropping_is_per_item_and_leaves_the_others_alone() -> None:
    cond, first = conditions(2), torch.tensor([True, False])
    dropped = cond.drop(text=first, audio=first, refs=first)
    assert (dropped.speak[0] == SILENCE).all() and (dropped.listen[0] == SILENCE).all()
    assert not dropped.text_mask[0].any() and not dropped.ref_mask[0].any()
    one, other = cond.select(slice(1, 2)), dropped.select(slice(1, 2))
    assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in vars(one))


def test_a_word_is_told_by_the_word_before_it() -> None:
    text, mask = encode_text(["glancing left", "tilted left", "glancing left"])
    assert torch.equal(text[0], text[2]) and not torch.allclose(text[0, 1], text[1, 1])
    assert mask.sum(1).tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match="17 words"):
        encode_text(["word " * 17])


# ---- codec, embedder, model folders -----------------------------------------------------------------------


def test_the_codec_is_a_projection() -> None:
    codec, z = small_codec(), latents(2, dtype=torch.float32)
    torch.testing.assert_close(codec.encode(codec.decode_unclamped(z)), z, rtol=1e-4, atol=1e-4)
    frames = normal(1, 8, 3, 16, 16, dtype=torch.float32).sigmoid()
    once = codec.decode_unclamped(codec.encode(frames))
    torch.testing.assert_close(codec.decode_unclamped(codec.encode(once)), once, rtol=1e-4, atol=1e-4)
    assert codec.encode(frames).shape == (1, 2, 4, 2, 2) and not torch.allclose(once, frames, atol=0.1)


def test_a_fitted_codec_loses_nothing_of_videos_within_its_channels() -> None:
    codec = small_codec()
    frames = codec.decode_unclamped(latents(6, dtype=torch.float32) / 20)
    fitted = PCACodec.fit(frames, channels=4)
    torch.testing.assert_close(fitted.decode(fitted.encode(frames)), frames, rtol=0, atol=1e-4)


def test_an_image_is_a_video_that_stands_still() -> None:
    codec, image = small_codec(), normal(2, 3, 16, 16, dtype=torch.float32).sigmoid()
    still = image[:, None].expand(-1, 4, -1, -1, -1)
    torch.testing.assert_close(codec.encode_image(image), codec.encode(still)[:, 0])


def test_a_saved_codec_comes_back_with_its_fingerprint(tmp_path: Path) -> None:
    codec = small_codec()
    codec.save(tmp_path)
    assert PCACodec.load(tmp_path).fingerprint() == codec.fingerprint()
    assert PCACodec(codec.mean, codec.basis, codec.scale * 1.01).fingerprint() != codec.fingerprint()


def test_embeddings_are_unit_vectors_and_the_saved_embedder_is_frozen(tmp_path: Path) -> None:
    model = IdentityEmbedder(4, SIDE, SIDE)
    model.natural = 0.7
    x = latents(3, dtype=torch.float32)
    torch.testing.assert_close(model(x).norm(dim=-1), torch.ones(2, 3))
    model.save(tmp_path)
    back = IdentityEmbedder.load(tmp_path)
    assert torch.equal(back(x), model(x)) and back.natural == 0.7
    assert not any(p.requires_grad for p in back.parameters())


def test_contrastive_loss_is_least_for_the_right_pairs() -> None:
    a = torch.nn.functional.normalize(normal(5, 32), dim=-1)
    assert contrastive_loss(a, a) < contrastive_loss(a, a.roll(1, 0))


def test_sizes_that_do_not_fit_are_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="even multiple"):
        DiTConfig(dim=30, heads=4)
    with pytest.raises(ValueError, match="reach back"):
        DiTConfig(listen_window=11)
    with pytest.raises(ValueError, match="3 reference images"):
        small_dit()(latents(1), torch.ones(2), conditions(1, present=(1, 1, 1)))
    with pytest.raises(ValueError, match="divisible"):
        small_codec().encode(torch.zeros(1, 3, 3, 16, 16))
