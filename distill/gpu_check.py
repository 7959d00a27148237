"""`make gpu-check`: what the GPU of this machine does, as one table. No network, no data set, nothing but torch,
accelerate, einops, safetensors, numpy and omegaconf.

attention back ends against fp64, the tests for a GPU (where pytest is installed), and training steps of stages 2 and 3
at the largest width that fits: seconds per step, model FLOP utilization, peak memory against the plan.
Without a GPU it says so and exits 0.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from distill.batches import batch_like, clip_of
from distill.config import Recipe, load, rollout_function, term_function
from distill.contracts import Roles
from distill.engine.config import EngineConfig
from distill.errors import ExitCode
from distill.options import Options
from distill.plan import PEAK, Plan, plan
from distill.probe import Paths
from distill.standing import Setting
from student.causal_dit import CausalDiT
from teacher import attention as attentions
from teacher.adapted import AdaptedDiT
from teacher.codec import PCACodec
from teacher.dit import DiT
from teacher.embedder import IdentityEmbedder

Row = tuple[str, str, str]  # what, OK | FAIL | skipped, figures
WIDTHS = (5120, 4096, 3072, 2048, 1536, 1024, 512, 256)  # head width 128, depth as the recipe's
STEPS = 2  # timed, after one that warms up
TOLERANCE = 2e-2  # of bf16 attention against fp64


def check(options: Options) -> str | int:
    """The table as text; exit status 2 when a row fails."""
    if not torch.cuda.is_available():
        return (
            "gpu-check: there is no GPU here, so nothing was checked. docs/GPU.md says what it does where there is one."
        )
    rows = list(checks())
    width = max(len(row[0]) for row in rows)
    name = torch.cuda.get_device_name()
    lines = [f"gpu-check on {name}, {memory() / 1e9:.0f} GB, torch {torch.__version__}"]
    print("\n".join([*lines, *(f"  {what:{width}} {verdict:7} {told}" for what, verdict, told in rows)]))
    return ExitCode.USAGE if any(verdict == "FAIL" for _, verdict, _ in rows) else ExitCode.DONE


def checks() -> Iterator[Row]:
    yield from attention_rows("cuda")
    yield tests()
    for stage in ("stage2_dmd", "stage3_self_forcing"):
        yield training_row(stage)


def memory() -> int:
    """Bytes of the GPU."""
    return torch.cuda.get_device_properties(0).total_memory


# ---- attention --------------------------------------------------------------------------------------------


def attention_rows(device: str) -> Iterator[Row]:
    """Every back end that is here against softmax in fp64, forward and backward, in bf16."""
    for name, flash in (("torch", False), ("flash-attn", True)):
        if flash and attentions._flash_attn() is None:
            yield f"attention: {name}", "skipped", "not installed (make gpu)"
            continue
        error, slope, seconds = compare_attention(device, flash)
        verdict = "OK" if max(error, slope) < TOLERANCE else "FAIL"
        yield f"attention: {name}", verdict, f"error {error:.1e}, of gradients {slope:.1e}, {1e3 * seconds:.2f} ms"


def compare_attention(device: str, flash: bool) -> tuple[float, float, float]:
    """(error, error of the gradients, seconds) of one back end on [2, 512, 4, 64] queries over 1,024 keys."""
    shapes = (512, 1024, 1024)
    tokens = [torch.randn(2, n, 4, 64, generator=torch.Generator().manual_seed(n + i)) for i, n in enumerate(shapes)]
    ours = [x.to(device, torch.bfloat16).requires_grad_() for x in tokens]
    exact = [x.detach().double().requires_grad_() for x in ours]
    weights = torch.einsum("bnhd,bmhd->bhnm", exact[0], exact[1]) / 8
    expected = torch.einsum("bhnm,bmhd->bnhd", weights.softmax(-1), exact[2])
    kept = attentions._flash_attn
    try:
        if not flash:
            attentions._flash_attn = lambda: None
        began = time.perf_counter()
        out = attentions.attention(ours[0], ours[1], ours[2])
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    finally:
        attentions._flash_attn = kept
    out.float().square().sum().backward()
    expected.square().sum().backward()
    gaps = []
    for x, y in zip(ours, exact, strict=True):
        assert x.grad is not None and y.grad is not None
        gaps.append(float((x.grad.double() - y.grad).abs().max() / y.grad.abs().max()))
    error = (out.double() - expected).abs().max() / expected.abs().max()
    return error.item(), max(gaps), seconds


# ---- tests ------------------------------------------------------------------------------------------------


def tests() -> Row:
    """The tests that ask for a GPU, by pytest."""
    if importlib.util.find_spec("pytest") is None or not Path("tests/test_gpu.py").is_file():
        return "tests for a GPU", "skipped", "pytest is not installed, or this is not the repository's folder"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py"],
        capture_output=True,
        text=True,
    )
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    return "tests for a GPU", "OK" if done.returncode == 0 else "FAIL", last


# ---- training ---------------------------------------------------------------------------------------------


def training_row(stage: str) -> Row:
    """Steps of the 17b recipe of `stage`, adapters and all, at the largest width that the plan allows."""
    for width in WIDTHS:
        recipe = at_width(stage, width)
        planned = plan(Setting(recipe, 1, EngineConfig()), float(memory()))
        if not planned.fits:
            continue
        try:
            seconds, peak = train(recipe, "cuda")
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            return f"{stage} at width {width}", "FAIL", f"out of memory, the plan said {planned.total / 1e9:.1f} GB"
        return f"{stage} at width {width}", "OK", told(planned, seconds, peak)
    return f"{stage} at width {WIDTHS[-1]}", "FAIL", "no width fits this GPU"


def told(planned: Plan, seconds: float, peak: float) -> str:
    """Measured against the plan."""
    top = PEAK[min(PEAK, key=lambda size: abs(size - planned.gpu_memory / 1e9))]
    used = planned.model_flops / seconds / top
    return f"{seconds:.2f} s/step, {used:.0%} MFU, peak {peak / 1e9:.1f} GB, planned {planned.total / 1e9:.1f} GB"


def at_width(stage: str, width: int) -> Recipe:
    """The recipe of the 17b scale with another width, one clip, every phase at every step."""
    recipe = load(f"recipes/17b/{stage}.yaml")
    model = replace(recipe.model, dim=width, heads=width // 128 or 1, ffn_dim=width * 27 // 10 // 64 * 64)
    phases = tuple(replace(phase, every=1) for phase in recipe.phases)
    small = replace(recipe.train, batch_size=1, grad_accumulation=1)
    return replace(recipe, model=model, phases=phases, train=small)


def train(recipe: Recipe, device: str, steps: int = STEPS) -> tuple[float, float]:
    """(seconds per step, peak bytes) of real updates on noise, without the trainer's files and curves."""
    roles, optimizers, averages = networks(recipe, device)
    seconds = 0.0
    for step in range(steps + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        if step == 1 and device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        for index, phase in enumerate(recipe.phases):
            update(recipe, replace(roles, key=(0, 0, step, 0, index)), index, optimizers[phase.update], device)
            if phase.update in averages:
                for average, parameter in zip(
                    averages[phase.update], roles.models[phase.update].parameters(), strict=True
                ):
                    average.lerp_(parameter.detach(), 1 - recipe.train.ema)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds += (time.perf_counter() - began) * (step > 0)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return seconds / max(steps, 1), float(peak)


def networks(
    recipe: Recipe, device: str
) -> tuple[Roles, dict[str, torch.optim.Optimizer], dict[str, list[torch.Tensor]]]:
    """Roles with weights as they are drawn, the optimizers of those that learn, and averages of the product."""
    clip = clip_of(recipe.data)
    with torch.device(device):
        teacher = DiT(recipe.model).requires_grad_(False)
        models: dict[str, nn.Module] = {"teacher": teacher}
        for phase in recipe.phases:
            lora = recipe.lora.of(phase.update) if recipe.lora else None
            dit = DiT(recipe.model) if lora is None else AdaptedDiT(teacher, lora)
            models[phase.update] = dit if phase.update == "critic" else CausalDiT(dit, recipe.student)
        embedder = IdentityEmbedder(recipe.model.channels, clip.rows, clip.columns).requires_grad_(False)
    codec = PCACodec(torch.zeros(768), torch.eye(768, recipe.model.channels), torch.ones(recipe.model.channels)).to(
        device
    )
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for role, model in models.items():
        if role != "teacher":
            config = recipe.optimizer[role]
            optimizers[role] = torch.optim.AdamW(model.parameters(), config.lr, config.betas, fused=True)
    averages = {
        role: [p.detach().clone() for p in model.parameters()]
        for role, model in models.items()
        if role not in ("teacher", "critic")
    }
    return Roles(models, recipe.student, codec, embedder), optimizers, averages


def update(recipe: Recipe, roles: Roles, index: int, optimizer: torch.optim.Optimizer, device: str) -> None:
    """One update of one role, as the trainer makes it."""
    phase, spec = recipe.phases[index], recipe.rollout
    assert spec is not None
    for role, model in roles.models.items():
        model.requires_grad_(role == phase.update)
    batch = batch_like(recipe.model, clip_of(recipe.data), recipe.train.batch_size, device=device)
    assert batch.latents is not None
    roles.trajectories = Paths(len(recipe.student.steps), batch.latents)
    with torch.autocast(device, torch.bfloat16, enabled=recipe.train.precision == "bf16"):
        with torch.set_grad_enabled(phase.update != "critic"):
            roll = rollout_function(spec.kind)(batch, roles, spec.config)
        loss = sum(term.weight * term_function(term.name)(roll, roles, term.config).value for term in phase.terms)
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    again = roll.again()
    for _ in range(0 if roll.replay is None else len(roll.replay)):
        with torch.autocast(device, torch.bfloat16, enabled=recipe.train.precision == "bf16"):
            part = next(again)
        part.backward()
    nn.utils.clip_grad_norm_(roles.models[phase.update].parameters(), recipe.train.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
