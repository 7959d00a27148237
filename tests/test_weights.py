"""Wan2.1's weights load and agree: checked against diffusers' own network, writer and converter of Wan's naming."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import normal, randomize, small_dit
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill import config as recipes
from teacher.conditions import AUDIO_PER_LATENT, PAST, Conditions
from teacher.dit import DiT, DiTConfig
from teacher.naming import is_audio
from teacher.weights import load_wan, save_wan, wan_config

WAN = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 40, "num_layers": 2, "text_dim": 10}
# (heads, width of a head, depth, ffn, text, channels), grid (frames, token rows, token columns)
SIZES = [
    ((2, 12, 3, 40, 10, 4), (3, 3, 5)),
    ((3, 14, 2, 33, 7, 3), (5, 1, 3)),
    ((1, 20, 4, 24, 4, 16), (1, 7, 2)),
    ((3, 32, 2, 100, 12, 5), (2, 4, 3)),
    ((2, 64, 1, 48, 6, 2), (1, 1, 1)),
    ((2, 128, 2, 64, 16, 16), (7, 3, 3)),
]


def wan(seed: int = 0, channels: int = 4, **changes: Any) -> WanTransformer3DModel:
    model = WanTransformer3DModel(**{"in_channels": channels, "out_channels": channels, **WAN, **changes}).eval()
    randomize(model, seed)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("patch_embedding", "to_q", "to_k")):
            parameter.data *= 0.02  # so small that the eps of the norms behind counts
    return model


def image_wan(seed: int = 0) -> WanTransformer3DModel:
    """I2V: noise, mask and first frame go in, the CLIP tokens of the image are attended."""
    return wan(seed, in_channels=12, out_channels=4, image_dim=9, added_kv_proj_dim=24)


def loaded(model: WanTransformer3DModel, folder: Path) -> DiT:
    """Through diffusers' own writer."""
    model.save_pretrained(folder)
    return load_wan(folder, wan_config(folder))[0].eval()


def same(a: DiT, b: DiT) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def told(config: DiTConfig, frames: int, length: int = 9) -> Conditions:
    """Text of which the second half of row 0 is padding (garbage there), loud audio, no references."""
    text, mask = normal(2, length, config.text_dim, seed=5).float(), torch.ones(2, length, dtype=torch.bool)
    mask[0, length // 2 :] = False
    audio = normal(2, AUDIO_PER_LATENT * (PAST + frames), config.mels, seed=6).float()
    return Conditions(audio, -audio, text, mask, torch.zeros(2, 0, config.channels, 2, 2), mask[:, :0])


def noisy(config: DiTConfig, grid: tuple[int, int, int]) -> Tensor:
    frames, rows, columns = grid
    return normal(2, frames, config.channels, rows * config.patch, columns * config.patch, seed=4).float()


@torch.no_grad()
def theirs(model: WanTransformer3DModel, x: Tensor, t: Tensor, text: Tensor, **more: Any) -> Tensor:
    return model(x.transpose(1, 2), 1000 * t, text, return_dict=False, **more)[0].transpose(1, 2)


def exact_time(model: WanTransformer3DModel) -> None:
    """The sinusoids of the timestep in float64, as the Wan repository computes them; diffusers rounds their angles, of
    up to 1000 rad, to float32, which moves its velocity by 5e-5."""

    def sinusoids(timestep: Tensor) -> Tensor:
        frequencies = torch.pow(10000, -torch.arange(128, dtype=torch.float64) / 128)
        angles = torch.outer(timestep.double(), frequencies)
        return torch.cat([angles.cos(), angles.sin()], 1).float()

    model.condition_embedder.timesteps_proj.forward = sinusoids


# ---- the same numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes, grid", SIZES)
def test_wan_weights_give_wan_velocity(sizes: tuple[int, ...], grid: tuple[int, int, int], tmp_path: Path) -> None:
    heads, width, depth, ffn, text_dim, channels = sizes
    names = {"num_attention_heads": heads, "attention_head_dim": width, "num_layers": depth}
    reference = wan(1, channels, ffn_dim=ffn, text_dim=text_dim, **names)
    model = loaded(reference, tmp_path)
    exact_time(reference)
    x, cond = noisy(model.config, grid), told(model.config, grid[0])
    text = cond.text * cond.text_mask[..., None]
    for t in (torch.tensor([1.0, 0.02]), torch.tensor([0.7312, 0.9817]), torch.tensor([0.0, 0.5])):
        expected = theirs(reference, x, t.double(), text)
        with torch.no_grad():
            v = model(x, t.double(), cond, refs=[])
        assert expected.std() > 0.1, "a reference that is nearly constant proves nothing"
        assert (v - expected).abs().max() < 1e-5


def test_unaided_diffusers_agrees_where_float32_can_hold_its_time_angles(tmp_path: Path) -> None:
    reference = wan(2)
    model = loaded(reference, tmp_path)
    x, cond = noisy(model.config, (3, 3, 5)), told(model.config, 3)
    t = torch.tensor([0.0, 1 / 256])
    with torch.no_grad():
        v = model(x, t.double(), cond, refs=[])
    assert (v - theirs(reference, x, t, cond.text * cond.text_mask[..., None])).abs().max() < 1e-5


def test_a_time_per_frame_means_what_it_means_in_wan22(tmp_path: Path) -> None:
    reference = wan(3)
    model = loaded(reference, tmp_path)
    exact_time(reference)
    x, cond = noisy(model.config, (3, 2, 3)), told(model.config, 3)
    t = torch.tensor([[0.1, 0.5, 1.0], [0.9, 0.0, 0.3]]).double()
    expected = theirs(reference, x, t.repeat_interleave(6, 1), cond.text * cond.text_mask[..., None])
    with torch.no_grad():
        v = model(x, t, cond, refs=[])
    assert (v - expected).abs().max() < 1e-5


def test_wan_and_we_attend_to_the_zeros_that_pad_the_text(tmp_path: Path) -> None:
    reference = wan(4)
    model = loaded(reference, tmp_path)
    exact_time(reference)
    x, cond, t = noisy(model.config, (2, 2, 2)), told(model.config, 2, length=512), torch.tensor([0.5, 0.25]).double()
    text = cond.text * cond.text_mask[..., None]
    with torch.no_grad():
        v = model(x, t, cond, refs=[])
    assert (v - theirs(reference, x, t, text)).abs().max() < 1e-5
    assert (v - theirs(reference, x, t, text[:, :256])).abs()[0].max() > 1e-3


def test_an_i2v_model_loads_as_the_t2v_model_it_is_without_its_image(tmp_path: Path) -> None:
    reference = image_wan(5)
    with torch.no_grad():
        for block in reference.blocks:  # CLIP tokens that say nothing
            block.attn2.add_v_proj.weight.zero_()
            block.attn2.add_v_proj.bias.zero_()
    model = loaded(reference, tmp_path)
    exact_time(reference)
    assert model.config.channels == 4
    x, cond, t = noisy(model.config, (3, 3, 2)), told(model.config, 3, length=512), torch.tensor([0.9, 0.4]).double()
    behind = torch.zeros(2, 3, 8, *x.shape[-2:])  # mask and first frame follow the latent's own channels
    text = cond.text * cond.text_mask[..., None]
    clip = normal(2, 5, 9, seed=8).float()
    expected = theirs(reference, torch.cat([x, behind], 2), t, text, encoder_hidden_states_image=clip)
    with torch.no_grad():
        v = model(x, t, cond, refs=[])
    assert (v - expected).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_spares_what_wan_computes_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    reference = loaded(wan(6), tmp_path)
    model, _ = load_wan(tmp_path, reference.config, dtype)
    islands = ("modulation", "norm", "time_embedding")
    for name, parameter in model.named_parameters():
        spared = any(part in name for part in islands)
        assert parameter.dtype == (torch.float32 if spared else dtype), name
        assert is_audio(name) or torch.equal(parameter, reference.get_parameter(name).to(parameter.dtype)), name
    x, cond, t = noisy(model.config, (2, 3, 2)), told(model.config, 2), torch.tensor([0.5, 0.25]).double()
    with torch.no_grad(), torch.autocast("cpu", dtype):
        v = model(x, t, cond, refs=[])
    with torch.no_grad():
        assert (v - reference(x, t, cond, refs=[])).abs().mean() < 0.03


# ---- names ------------------------------------------------------------------------------------------------


def test_original_to_ours_to_diffusers_to_ours_to_original_is_bitwise(tmp_path: Path) -> None:
    model = small_dit(1, torch.float32)
    save_wan(model, tmp_path / "a", "original")
    first, _ = load_wan(tmp_path / "a", wan_config(tmp_path / "a"))
    save_wan(first, tmp_path / "b", "diffusers")
    second, _ = load_wan(tmp_path / "b", wan_config(tmp_path / "b"))
    (file,) = save_wan(second, tmp_path / "c", "original")
    assert same(model, first) and same(model, second)
    assert file.read_bytes() == (tmp_path / "a" / file.name).read_bytes()
    assert tensors_in(tmp_path / "b").keys().isdisjoint({"head.modulation", "blocks.0.norm3.weight"})


def test_diffusers_reads_both_namings_that_we_write(tmp_path: Path) -> None:
    model = small_dit(2, torch.float32)
    save_wan(model, tmp_path / "a", "original", audio=False)
    save_wan(model, tmp_path / "b", "diffusers", audio=False)
    written = tensors_in(tmp_path / "a")
    assert written["patch_embedding.weight"].shape == (32, 4, 1, 2, 2)
    converted = convert_wan_transformer_to_diffusers(written)
    save_wan(model, tmp_path / "c", "diffusers", max_shard_bytes=40_000)  # with audio parts, which it passes over
    for folder in (tmp_path / "b", tmp_path / "c"):
        read = WanTransformer3DModel.from_pretrained(folder).state_dict()
        assert read.keys() == converted.keys() and all(torch.equal(read[name], converted[name]) for name in read)


def test_the_original_naming_of_i2v_loads_like_that_of_diffusers(tmp_path: Path) -> None:
    reference = image_wan(7)
    from_diffusers = loaded(reference, tmp_path / "b")
    state = reference.state_dict()
    save_wan(from_diffusers, tmp_path / "t2v", "original", audio=False)
    original = {**tensors_in(tmp_path / "t2v"), "patch_embedding.weight": state["patch_embedding.weight"]}
    embedder = "condition_embedder.image_embedder"
    places = {"proj.0": "norm1", "proj.1": "ff.net.0.proj", "proj.3": "ff.net.2", "proj.4": "norm2"}
    pairs = {f"img_emb.{ours}": f"{embedder}.{theirs}" for ours, theirs in places.items()}
    for index in range(2):
        for ours_, theirs_ in (("k_img", "add_k_proj"), ("v_img", "add_v_proj"), ("norm_k_img", "norm_added_k")):
            pairs[f"blocks.{index}.cross_attn.{ours_}"] = f"blocks.{index}.attn2.{theirs_}"
    for ours_, theirs_ in pairs.items():
        for leaf in ("weight", "bias"):
            if f"{theirs_}.{leaf}" in state:
                original[f"{ours_}.{leaf}"] = state[f"{theirs_}.{leaf}"]
    assert convert_wan_transformer_to_diffusers(dict(original)).keys() == state.keys(), "these are Wan's names"
    save_file({name: t.contiguous() for name, t in original.items()}, tmp_path / "i2v.safetensors")
    torch.manual_seed(0)
    model, report = load_wan(tmp_path / "i2v.safetensors", from_diffusers.config)
    for name, parameter in from_diffusers.named_parameters():
        assert is_audio(name) or torch.equal(parameter, model.get_parameter(name)), name
    in_clip = sum(state[name].numel() for name in state if "image_embedder" in name or "add" in name)
    assert sum(report.dropped.values()) == in_clip + 24 * 8 * 2 * 2
    assert len(report.dropped) == 1 + 8 + 2 * 5


def test_the_report_accounts_for_every_parameter_in_a_few_lines(tmp_path: Path) -> None:
    reference = image_wan(8)
    reference.save_pretrained(tmp_path)
    model, report = load_wan(tmp_path, wan_config(tmp_path))
    read, gone, new = (sum(part.values()) for part in (report.loaded, report.dropped, report.made))
    assert read + gone == sum(p.numel() for p in reference.parameters())
    assert read + new == sum(p.numel() for p in model.parameters())
    assert {*report.loaded, *report.made} == {name for name, _ in model.named_parameters()}
    lines = str(report).splitlines()
    assert len(lines) == 4 and "diffusers naming" in lines[0] and str(tmp_path) in lines[0]
    assert all(f"{count:,} parameters" in line for count, line in zip((read, gone, new), lines[1:], strict=True))


@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_audio_parts_travel_along_unless_left_out(tmp_path: Path, naming: str) -> None:
    model = small_dit(3, torch.float32, mels=6, audio_group=2, speak_window=2, listen_window=7)
    save_wan(model, tmp_path / "whole", naming)
    assert replace(wan_config(tmp_path / "whole"), references=model.config.references) == model.config
    again, report = load_wan(tmp_path / "whole", model.config)
    assert same(model, again) and not report.made
    save_wan(model, tmp_path / "plain", naming, audio=False)
    assert not any(map(is_audio, tensors_in(tmp_path / "plain")))
    again, report = load_wan(tmp_path / "plain", model.config)
    assert not same(model, again) and set(report.made) == {
        name for name, _ in model.named_parameters() if is_audio(name)
    }


def test_newly_made_parts_start_as_in_a_fresh_dit(tmp_path: Path) -> None:
    config = DiTConfig(dim=64, depth=1, heads=2, ffn_dim=8, channels=2, text_dim=4)
    torch.manual_seed(0)
    fresh = DiT(config)
    save_wan(fresh, tmp_path, audio=False)
    model, report = load_wan(tmp_path, config)
    assert len(report.made) == 6 + 2 * 5 and model.training
    for name in report.made:
        old, new = fresh.get_parameter(name), model.get_parameter(name)
        assert new.shape == old.shape and new.dtype == old.dtype and new.requires_grad
        if ".audio_o." in name:
            assert not old.any() and not new.any()
        else:
            assert not torch.equal(old, new)
            assert 0.7 < new.std() / old.std() < 1.4 and 0.7 < new.abs().max() / old.abs().max() < 1.4, name


def test_sizes_are_read_from_the_tensors_and_heads_from_the_configuration(tmp_path: Path) -> None:
    wan(9, 5, num_attention_heads=3, num_layers=3, text_dim=11).save_pretrained(tmp_path)
    expected = DiTConfig(dim=36, depth=3, heads=3, ffn_dim=40, channels=5, text_dim=11)
    assert wan_config(tmp_path) == wan_config(tmp_path / "diffusion_pytorch_model.safetensors") == expected
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="put its config.json beside"):
        wan_config(tmp_path)
    wide = DiT(DiTConfig(dim=256, depth=1, heads=2, ffn_dim=8, channels=2, text_dim=4))
    save_wan(wide, tmp_path / "wide", audio=False)
    (tmp_path / "wide" / "config.json").unlink()
    assert wan_config(tmp_path / "wide") == wide.config


def test_a_pipeline_folder_of_diffusers_with_shards_of_its_own_loads(tmp_path: Path) -> None:
    reference = wan(10)
    reference.save_pretrained(tmp_path / "transformer", max_shard_size="10KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 3
    model, _ = load_wan(tmp_path, wan_config(tmp_path))
    assert torch.equal(
        model.get_parameter("blocks.1.ffn.2.weight"), reference.get_parameter("blocks.1.ffn.net.2.weight")
    )


# ---- sizes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scale, plain, with_branches, whole",
    [("1.3b", 1.4190e9, 1.631e9, 1_636_629_568), ("17b", 14.2885e9, 17.434e9, 17_488_727_104)],
)
def test_the_presets_have_the_published_numbers_of_parameters(
    scale: str, plain: float, with_branches: float, whole: int
) -> None:
    preset = recipes.load(f"recipes/{scale}/base.yaml", ("name=x", "stage=teacher")).model
    with torch.device("meta"):
        model = DiT(preset)
        sizes = {"num_attention_heads": preset.heads, "num_layers": preset.depth, "ffn_dim": preset.ffn_dim}
        reference = sum(p.numel() for p in WanTransformer3DModel(**sizes).parameters())
    counts = {name: p.numel() for name, p in model.named_parameters()}
    encoders = sum(n for name, n in counts.items() if name.startswith(("speak_embedding.", "listen_embedding.")))
    branches = sum(n for name, n in counts.items() if ".audio_" in name)
    total = sum(counts.values())
    assert reference == total - encoders - branches == pytest.approx(plain, abs=5e4)
    assert total - encoders == pytest.approx(with_branches, rel=1e-3)
    assert total == whole  # our audio encoders come on top


def test_the_14b_i2v_model_is_larger_by_its_clip_branch() -> None:
    with torch.device("meta"):
        model = WanTransformer3DModel(in_channels=36, image_dim=1280, added_kv_proj_dim=5120)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(16.3949e9, abs=5e4)
