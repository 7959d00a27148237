"""Weights on the disk: shards, what is in memory while they load, and one sentence for everything that is wrong."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_dit
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from teacher import weights
from teacher.dit import DiT, DiTConfig
from teacher.weights import load_wan, save_wan, wan_config


def same(a: DiT, b: DiT) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# ---- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_shards_load_like_one_file(tmp_path: Path, naming: str) -> None:
    model = small_dit(4, torch.float32)
    files = save_wan(model, tmp_path, naming, max_shard_bytes=40_000)
    assert len(files) > 3 and max(file.stat().st_size for file in files) < 40_000 + 4_000
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in model.parameters())
    assert same(load_wan(tmp_path, model.config)[0], model)
    assert same(load_wan(tmp_path / "diffusion_pytorch_model.safetensors.index.json", model.config)[0], model)


def test_loading_holds_the_model_and_one_tensor_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_dit(5, torch.float32, depth=4)
    save_wan(model, tmp_path, max_shard_bytes=50_000, audio=False)
    alive: list[weakref.ref] = []
    most = 0

    class Spy:
        """Hands out tensors over numpy arrays: an array lives as long as any tensor that looks into it."""

        def __init__(self, *arguments: Any, **named: Any) -> None:
            self.file = safe_open(*arguments, **named)

        def __enter__(self) -> Spy:
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_tensor(self, name: str) -> Tensor:
            nonlocal most
            array = self.file.get_tensor(name).numpy().copy()
            alive.append(weakref.ref(array))
            most = max(most, sum(reference() is not None for reference in alive))
            return torch.from_numpy(array)

    class Allocated(TorchDispatchMode):
        """Bytes of everything that operations allocate while loading, freed or not."""

        total = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor) and not a.is_meta}
            for tensor in out if isinstance(out, list | tuple) else [out]:
                if isinstance(tensor, Tensor) and not tensor.is_meta:
                    self.total += tensor.nbytes * (tensor.untyped_storage().data_ptr() not in given)
            return out

    monkeypatch.setattr(weights, "safe_open", Spy)
    with Allocated() as allocated:
        again, report = load_wan(tmp_path, model.config)
    assert len(alive) == len(report.loaded) and most == 1
    assert not any(reference() is not None for reference in alive), "the model looks into the file"
    whole = sum(4 * p.numel() for p in again.parameters())
    assert allocated.total < 1.05 * whole + max(4 * p.numel() for p in again.parameters())


# ---- mistakes ---------------------------------------------------------------------------------------------


def sentence(path: Path, config: DiTConfig) -> str:
    with pytest.raises(ValueError) as raised:
        load_wan(path, config)
    text = str(raised.value)
    assert "\n" not in text and text.endswith(".") and raised.value.__cause__ is None
    return text


@pytest.mark.parametrize("sharded", [False, True])
def test_a_truncated_file_is_one_sentence(tmp_path: Path, sharded: bool) -> None:
    model = small_dit(6, torch.float32)
    file = save_wan(model, tmp_path, max_shard_bytes=40_000 if sharded else 5e9)[-1]
    file.write_bytes(file.read_bytes()[:-100])
    assert f"{file} is damaged or was not fetched to its end" in sentence(tmp_path, model.config)
    file.write_bytes(b"")
    assert f"{file} is damaged" in sentence(tmp_path, model.config)


def test_a_missing_shard_is_one_sentence(tmp_path: Path) -> None:
    model = small_dit(6, torch.float32)
    file = save_wan(model, tmp_path, max_shard_bytes=40_000)[1]
    file.unlink()
    assert f"The shard {file} is missing" in sentence(tmp_path, model.config)
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": ')
    assert "index.json is damaged" in sentence(tmp_path, model.config)


@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_a_tensor_missing_or_left_over_or_of_another_shape_is_one_sentence(tmp_path: Path, naming: str) -> None:
    model = small_dit(7, torch.float32)
    (file,) = save_wan(model, tmp_path, naming)
    tensors = load_file(file)
    name = {"original": "blocks.1.cross_attn.norm_k.weight", "diffusers": "blocks.1.attn2.norm_k.weight"}[naming]
    save_file({key: t for key, t in tensors.items() if key != name}, file)
    assert f"lack {name}" in sentence(tmp_path, model.config)
    save_file({**tensors, name: torch.ones(7)}, file)
    assert f"{name} in {file} has shape [7], the model needs [32]" in sentence(tmp_path, model.config)
    save_file({**tensors, "vace_blocks.0.before_proj.weight": torch.ones(1)}, file)
    assert "hold 1 tensors that the model has no place for, such as vace_blocks.0" in sentence(tmp_path, model.config)
    save_file({key: t for key, t in tensors.items() if not key.endswith("0.cross_attn.audio_v.bias")}, file)
    assert "lack blocks.0.cross_attn.audio_v.bias" in sentence(tmp_path, model.config)


def test_weights_of_another_size_are_one_sentence(tmp_path: Path) -> None:
    model = small_dit(8, torch.float32)
    save_wan(model, tmp_path / "a", audio=False)
    changed = {"depth": 3, "dim": 48, "ffn_dim": 12, "channels": 16, "text_dim": 4096, "patch": 1}
    for key, value in changed.items():
        text = sentence(tmp_path / "a", DiTConfig(**{**vars(model.config), key: value}))
        assert ("lack blocks.2" if key == "depth" else "the model needs") in text
    shallow = DiTConfig(**{**vars(model.config), "depth": 1})
    assert "T2V or I2V transformer of 1 blocks is needed" in sentence(tmp_path / "a", shallow)


def test_heads_that_no_tensor_shows_are_compared_with_the_configuration(tmp_path: Path) -> None:
    model = small_dit(9, torch.float32)
    save_wan(model, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    other = DiTConfig(**{**vars(model.config), "heads": 4})
    assert "have 2 heads, not 4: set model.heads" in sentence(tmp_path, other)
    for changes, expected in [
        ({"dim": 48}, "of a model 48 wide"),
        ({"eps": 1e-5}, "eps 1e-05"),
        ({"num_heads": None}, "is not the configuration of a Wan2.1"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps({**settings, **changes}))
        assert expected in sentence(tmp_path, model.config)


def test_anything_that_is_no_wan_is_one_sentence(tmp_path: Path) -> None:
    config = DiTConfig()
    assert f"There are no weights at {tmp_path / 'nothing'}" in sentence(tmp_path / "nothing", config)
    assert f"There are no safetensors in {tmp_path}" in sentence(tmp_path, config)
    torch.save({}, tmp_path / "model.pth")
    assert "other formats are not read" in sentence(tmp_path / "model.pth", config)
    assert f"There are no safetensors in {tmp_path}" in sentence(tmp_path, config)
    save_file({"decoder.conv1.weight": torch.ones(1)}, tmp_path / "vae.safetensors")
    assert "is not a Wan2.1 transformer in" in sentence(tmp_path, config) and "decoder" in sentence(tmp_path, config)
    save_file({}, tmp_path / "empty.safetensors")
    assert "holds 2 candidates (empty.safetensors, vae.safetensors, ...): name one" in sentence(tmp_path, config)
    assert "is not a Wan2.1 transformer in" in sentence(tmp_path / "empty.safetensors", config)
    (file,) = save_wan(small_dit(), tmp_path / "patches")
    save_file({**load_file(file), "patch_embedding.weight": torch.ones(32, 4, 2, 2, 2)}, file)
    with pytest.raises(ValueError, match="patches of \\(2, 2, 2\\)"):
        wan_config(tmp_path / "patches")


def test_nothing_is_written_over_or_in_a_naming_that_does_not_exist(tmp_path: Path) -> None:
    model = small_dit(10, torch.float32)
    save_wan(model, tmp_path)
    with pytest.raises(ValueError, match="holds weights already"):
        save_wan(model, tmp_path, max_shard_bytes=40_000)
    with pytest.raises(ValueError, match="no naming 'wan', it must be original or diffusers"):
        save_wan(model, tmp_path / "b", "wan")
