"""The plan's bytes against what the allocator reports, and its FLOPs against torch's own counter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import conditions, latents, small_dit
from measured import measured_peak
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distill.batches import clip_of
from distill.config import load
from distill.costs import Call, Machine, adapter_parameters, flops, kept_per_block, parameters
from distill.errors import UserError
from distill.meter import Meter
from distill.plan import plan
from distill.probe import ShadowHead, shadows, simulate
from distill.standing import Setting
from recipes import adversarial
from teacher.adapted import AdaptedDiT
from teacher.attention import KV
from teacher.blocks import Block
from teacher.dit import DiTConfig
from teacher.lora import LoRAConfig
from teacher.rope import grid_positions

TINY = ("model.depth=3", "train.batch_size=2", "train.grad_accumulation=1")
MID = ("model={dim: 320, depth: 4, heads: 5, ffn_dim: 1024, channels: 32, text_dim: 64}", "train.batch_size=1")
STAGES = {
    1: "stage1_ode",
    2: "stage2_dmd",
    3: "stage3_self_forcing",
    "GAN": "alternatives/stage2_dmd_gan",
    "Jensen-Shannon": "alternatives/stage2_f_distill",
}


@pytest.mark.parametrize(
    ("stage", "sizes", "precision", "again"),
    [
        (1, TINY, "fp32", False),
        (1, MID, "bf16", False),
        (1, TINY, "bf16", True),
        (2, TINY, "bf16", False),
        (2, MID, "fp32", True),
        (3, TINY, "fp32", False),
        (3, TINY, "bf16", True),
        (3, MID, "bf16", False),
        ("GAN", TINY, "bf16", False),
        ("GAN", MID, "fp32", True),
        ("Jensen-Shannon", TINY, "fp32", False),
    ],
)
def test_planned_memory_is_within_a_tenth_of_the_measured_peak(
    stage: int | str, sizes: tuple[str, ...], precision: str, again: bool, tmp_path: Path
) -> None:
    changes = (*sizes, f"train.precision={precision}", f"model.checkpoint_blocks={str(again).lower()}")
    recipe = load(f"recipes/tiny/{STAGES[stage]}.yaml", changes)
    planned = plan(Setting(recipe, 1, cuda=torch.cuda.is_available()), 80e9).total
    assert planned == pytest.approx(measured_peak(recipe, tmp_path, steps=1), rel=0.1)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("told", [False, True])
def test_a_block_keeps_the_bytes_that_the_formula_says(bf16: bool, told: bool) -> None:
    c, batch, frames, refs = DiTConfig(dim=96, heads=3, ffn_dim=160), 2, 4, 12
    block, tokens = Block(c.dim, c.ffn_dim, c.heads), frames * 4
    kept = torch.float32 if not bf16 else torch.bfloat16
    context = [KV(*(torch.randn(batch, refs, c.dim, dtype=kept) for _ in "kv"), torch.zeros(refs, 3).double())]
    given = [torch.randn(batch, *shape, requires_grad=True) for shape in ((tokens, c.dim), (frames, 6, c.dim))]
    heard = [
        torch.randn(*s, requires_grad=True) for s in ((batch, 7, c.dim), (batch, frames + 2, 2, c.dim), (3, 2, c.dim))
    ]
    outside = {t.untyped_storage().data_ptr() for t in [*given, *heard, *block.parameters()]}
    seen: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        seen.setdefault(t.untyped_storage().data_ptr(), (t.untyped_storage().nbytes(), t))  # kept, so addresses stay
        return t

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        block(*given, grid_positions(frames, 2, 2), context, None, tuple(heard) if told else None)
    real = sum(size for address, (size, _) in seen.items() if address not in outside)
    call = Call("x", batch, frames, tokens, refs, (tokens + refs,), 7 * told, graph=True, trained=True)
    casts = 2 * sum(p.numel() for name, p in block.named_parameters() if p.ndim == 2) * bf16
    if not told:
        casts -= 2 * 7 * c.dim**2 * bf16
    assert kept_per_block(c, call, Machine(bf16, cuda=False)) + casts == pytest.approx(real, rel=0.04)


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("lora", [None, LoRAConfig(4, 4.0)])
def test_flops_are_those_that_torch_counts(lora: LoRAConfig | None, inner: bool) -> None:
    base = small_dit(1, torch.float32)
    net = base if lora is None else AdaptedDiT(base.requires_grad_(False), lora)
    learned = sum(p.numel() for p in net.parameters())
    assert learned == (parameters(base.config) if lora is None else adapter_parameters(base.config, lora))
    x, cond = latents(4, dtype=torch.float32).requires_grad_(inner), conditions(4, dtype=torch.float32)
    refs = [[KV(kv.k.detach(), kv.v.detach(), kv.positions) for kv in layer] for layer in net.encode_refs(cond)]
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = net(x, torch.tensor([0.1, 0.5]).double(), cond, refs).square().sum()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    call = Call("x", 2, 4, 16, 8, (24,), 3, graph=True, trained=True, inner=inner)
    assert flops(base.config, call, lora) == (forward.get_total_flops(), backward.get_total_flops())


def test_a_head_is_planned_by_its_size_and_by_what_it_computes() -> None:
    setting = Setting(load("recipes/tiny/alternatives/stage2_dmd_gan.yaml", TINY), cuda=False)
    clip, dim = clip_of(setting.recipe.data), setting.recipe.model.dim
    assert setting.sizes("critic") - setting.sizes("student") == (2 * dim + 1) * dim + dim + 1
    tokens = 2 * clip.frames * (clip.rows // 2) * (clip.columns // 2)
    once = 2 * tokens * (2 * dim * dim + dim)
    critic, student = simulate(setting.recipe, clip, setting.machine, Meter(), setting.state, draws=1)
    assert critic.heads == (1 + 1) * 3 * once  # of real and fake: forward, to the weights, to the features
    assert student.heads == 2 * once  # it is asked, and learns nothing


def test_a_head_keeps_the_bytes_that_autograd_keeps() -> None:
    head, seen, meter = adversarial.head(DiTConfig(dim=24)), {}, Meter()
    weights = {p.untyped_storage().data_ptr() for p in head.parameters()}

    def pack(t: torch.Tensor) -> torch.Tensor:
        seen.setdefault(t.untyped_storage().data_ptr(), (t.untyped_storage().nbytes(), t))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        head(torch.randn(2, 12, 48, requires_grad=True))
    told = ShadowHead(head.to("meta"), meter)(torch.empty(2, 12, 48, device="meta", requires_grad=True))
    assert told.device.type == "cpu" and not told.any() and told.shape == (2, 12)
    real = sum(size for address, (size, _) in seen.items() if address not in weights)
    assert meter.live["activations"] == real > 4 * 2 * 12 * 48
    told.sum().backward()
    del told
    assert meter.live["activations"] == 0


def test_a_head_takes_features_by_name_and_a_loss_that_asks_it_for_more_is_told_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class ByName(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(48, 3)

        def forward(self, first: torch.Tensor, *, then: torch.Tensor) -> torch.Tensor:
            return self.layer(first) + then

    head = ShadowHead(ByName().to("meta"), Meter())
    told = head(torch.ones(2, 48), then=torch.ones(2, 3))
    assert told.shape == (2, 3) and head.flops == 2 * 2 * 48 * 3 * 2  # forward, and to the weights
    setting = Setting(load("recipes/tiny/alternatives/stage2_dmd_gan.yaml"))
    monkeypatch.setattr(ShadowHead, "forward", lambda self, *_: self.score())
    with pytest.raises(UserError, match="plan: the term adversarial cannot be followed.*score.*SMOKE=1"):
        simulate(setting.recipe, clip_of(setting.recipe.data), setting.machine, Meter(), setting.state, draws=1)


def test_a_loss_that_looks_elsewhere_inside_a_network_is_refused() -> None:
    setting = Setting(load("recipes/tiny/stage2_dmd.yaml"))
    roles = shadows(setting.recipe, clip_of(setting.recipe.data), setting.machine, Meter(), setting.state)
    with pytest.raises(UserError, match=r"looks inside the critic \(blocks.0\)"):
        roles.dit("critic").get_submodule("blocks.0")


def test_a_meter_forgets_what_is_let_go_and_remembers_the_worst_moment() -> None:
    meter = Meter()
    with meter.counting():
        a = torch.randn(1000)
        b = a[1:] + 1
        assert meter.live["buffers"] == 4000 + 3996
        view = a.view(10, 100)
        del a
        assert meter.live["buffers"] == 4000 + 3996
        del view, b
    held = meter.hold(1e6, "activations", (3,))
    meter.touch(activations=5e5)
    del held
    assert meter.live["activations"] == 0 and meter.peak["activations"] == 1.5e6 and meter.total == 1.5e6
