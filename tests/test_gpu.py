"""What only a GPU can show; `make gpu-check` runs this file. Skipped without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distill.gpu_check import TOLERANCE, compare_attention
from teacher import attention as attentions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_torch_attention_agrees_with_fp64() -> None:
    error, slope, _ = compare_attention("cuda", flash=False)
    assert max(error, slope) < TOLERANCE


def test_flash_attn_agrees_with_fp64() -> None:
    if attentions._flash_attn() is None:
        pytest.skip("flash-attn is not installed")
    error, slope, _ = compare_attention("cuda", flash=True)
    assert max(error, slope) < TOLERANCE


@pytest.mark.parametrize("stage", ["stage1_ode", "stage2_dmd", "stage3_self_forcing"])
def test_planned_memory_is_within_a_tenth_of_the_peak_on_the_gpu(stage: str, tmp_path: Path) -> None:
    from measured import measured_peak

    from distill.config import load
    from distill.plan import plan
    from distill.standing import Setting

    sizes = "model={dim: 1024, depth: 8, heads: 8, ffn_dim: 2816, channels: 32, text_dim: 64}"
    recipe = load(f"recipes/tiny/{stage}.yaml", (sizes, "train.batch_size=8", "train.precision=bf16"))
    planned = plan(Setting(recipe, 1), 80e9).total
    assert planned == pytest.approx(measured_peak(recipe, tmp_path), rel=0.1)
