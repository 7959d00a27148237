"""What one run of the network costs, by its configuration: matmul FLOPs, bytes kept for the backward pass, at work.

Letters as in the README; n = B N D numbers of the tokens, M keys per query. FLOPs count two per multiply-add of every
matrix product, attention included; element-wise work is left out, as is customary. Bytes follow the code of
`teacher/blocks.py` tensor by tensor, for two kinds of machines:

    CPU   attention in fp32, RMS norms keep their input and the normed tokens
    CUDA  attention in the compute precision, fused RMS norms keep their input
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from teacher.conditions import AUDIO_PER_LATENT, PAST
from teacher.dit import DiTConfig
from teacher.lora import LoRAConfig

RESIDUAL = 4  # bytes of the residual stream, always fp32


@dataclass(frozen=True)
class Machine:
    """How numbers are kept: `bf16` compute over fp32 masters or all fp32, on a CPU or on CUDA. `gathered`: weights come
    from shards in the compute precision, so autocast makes no copies of them."""

    bf16: bool = True
    cuda: bool = True
    gathered: bool = False

    @property
    def compute(self) -> int:
        return 2 if self.bf16 else 4

    @property
    def attention(self) -> int:
        return self.compute if self.cuda else 4


@dataclass(frozen=True)
class Call:
    """One run of a network. rows: keys seen by each block of queries (one block without a mask)."""

    role: str
    items: int  # B
    frames: int  # T
    tokens: int  # N per item
    context: int  # tokens kept from elsewhere, per item
    rows: tuple[int, ...]
    text: int  # L, 0 for reference images, which read and hear nothing
    kept: bool = False  # its keys and values are handed out
    graph: bool = False  # a backward pass will come through here
    trained: bool = False  # it ends in the weights
    inner: bool = False  # the input asks for a gradient too

    @property
    def pairs(self) -> int:
        """Query-key pairs per item."""
        return sum(self.rows) * self.tokens // len(self.rows)

    @property
    def keys(self) -> int:
        return self.tokens + self.context


# ---- parameters -------------------------------------------------------------------------------------------


def block_parameters(c: DiTConfig) -> int:
    """Parameters of one block."""
    linears = 11 * (c.dim**2 + c.dim) + 2 * c.dim * c.ffn_dim + c.ffn_dim + c.dim
    return linears + 4 * c.dim + 2 * c.dim + 6 * c.dim  # RMS norms, layer norm, modulation table


def parameters(c: DiTConfig) -> int:
    """Parameters of the whole network."""
    d, patch = c.dim, c.channels * c.patch**2
    inputs = patch * d + d + c.text_dim * d + d + d * d + d
    time = 256 * d + d + d * d + d + 6 * (d * d + d)
    group = c.audio_group * c.mels
    audio = sum(
        group * d + d + d * d + d + window * (AUDIO_PER_LATENT // c.audio_group) * d
        for window in (c.speak_window, c.listen_window)
    )
    return inputs + time + audio + c.depth * block_parameters(c) + d * patch + patch + 2 * d


def adapter_parameters(c: DiTConfig, lora: LoRAConfig) -> int:
    """Parameters of one role's adapters."""
    return c.depth * sum(lora.rank * sum(_sides(c, target)) for target in lora.targets)


def _sides(c: DiTConfig, target: str) -> tuple[int, int]:
    return {"ffn.0": (c.dim, c.ffn_dim), "ffn.2": (c.ffn_dim, c.dim)}.get(target, (c.dim, c.dim))


# ---- FLOPs ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def flops(c: DiTConfig, call: Call, lora: LoRAConfig | None = None) -> tuple[float, float]:
    """(forward, backward) of one run without recomputation. Frozen weights pass gradients on but get none.
    Exact for whole networks and for adapters on all targets; with fewer targets backward is counted too high."""
    d, b, n, groups = c.dim, call.items, call.tokens, AUDIO_PER_LATENT // c.audio_group
    patch, told = c.channels * c.patch**2, call.text > 0
    entry = 2 * b * n * patch * d
    edge = entry + 2 * b * call.frames * 256 * d  # first layers: below them nothing asks for a gradient
    inside, head = 2 * b * call.frames * 7 * d * d, 2 * b * n * d * patch
    own = 2 * b * n * (4 * d * d + 2 * d * c.ffn_dim) * c.depth  # products of the tokens themselves
    memory = 0.0  # products of text and audio
    attention = 4 * b * call.pairs * d * c.depth
    if told:
        heard = b * (call.frames + PAST) * groups
        edge += 2 * b * call.text * c.text_dim * d + 2 * 2 * heard * c.audio_group * c.mels * d
        inside += 2 * b * call.text * d * d + 2 * 2 * heard * d * d
        own += 2 * b * n * 3 * d * d * c.depth
        for index in range(c.depth):
            window = _window(c, index)
            memory += 2 * 2 * b * call.text * d * d + 2 * 2 * (b * (call.frames + window - 1) + window) * groups * d * d
            attention += 4 * b * n * (call.text + window * groups) * d
    forward = edge + inside + head + own + memory + attention
    passed = entry * call.inner  # gradient into the input
    if lora is None:
        learned = edge + 2 * (inside + head + own + memory) if call.trained else head + own
        return forward, (learned + passed + 2 * attention) * call.graph
    down, up, blind = _adapters(c, call, lora)
    first = 0.0 if call.inner else 3 * 2 * b * n * d * d  # queries, keys, values of tokens that ask for no gradient
    through = head + own - first + 2 * attention + passed
    return forward + down + up, (through + (2 * (down + up) - blind) * call.trained) * call.graph


def _window(c: DiTConfig, index: int) -> int:
    return (c.speak_window, c.listen_window)[index % 2]


def _adapters(c: DiTConfig, call: Call, lora: LoRAConfig) -> tuple[float, float, float]:
    """FLOPs of all A, of all B, and of those A whose input asks for no gradient."""
    down = up = blind = 0.0
    for index in range(c.depth):
        for target in lora.targets:
            rows, (inputs, outputs) = _rows_of(c, call, target, index), _sides(c, target)
            down += 2 * rows * lora.rank * inputs
            up += 2 * rows * lora.rank * outputs
            kept_from_outside = target.startswith("cross_attn.") and target[-2:] in (".k", ".v", "_k", "_v")
            first = index == 0 and not call.inner and target in ("self_attn.q", "self_attn.k", "self_attn.v")
            blind += 2 * rows * lora.rank * inputs * (kept_from_outside or first)
    return down, up, blind


def _rows_of(c: DiTConfig, call: Call, target: str, index: int) -> int:
    """Rows that go through an adapted layer of block `index`."""
    window, groups = _window(c, index), AUDIO_PER_LATENT // c.audio_group
    if target.startswith("cross_attn.") and not call.text:
        return 0
    if target in ("cross_attn.k", "cross_attn.v"):
        return call.items * call.text
    if target in ("cross_attn.audio_k", "cross_attn.audio_v"):
        return call.items * (call.frames + window - 1) * groups + window * groups
    return call.items * call.tokens


# ---- bytes ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def kept_per_block(c: DiTConfig, call: Call, machine: Machine, lora: LoRAConfig | None = None, index: int = 0) -> float:
    """Bytes that block `index` keeps for its backward pass (without checkpointing, its input not counted)."""
    b, t, d, told = call.items, call.frames, c.dim, call.text > 0
    n, kv = b * call.tokens * d, b * sum(call.rows) * d
    if not machine.bf16:
        size = (20 if told else 13) * 4.0 * n + (4 * n if len(call.rows) > 1 else 0)
        if machine.cuda:
            size -= (3 if told else 2) * 4 * n
    elif machine.cuda:
        size = (56.0 if told else 40.0) * n
    else:
        size = (84.0 if told else 54.0) * n
    a, s = machine.attention, machine.compute
    size += 2 * a * kv + 2 * s * n * c.ffn_dim / d
    size += 4 * b * c.heads * call.tokens * (3 if told else 1)  # log of the softmax's sum
    size += 4 * (call.tokens + call.keys) * d / c.heads  # sines and cosines
    size += 4 * 8 * b * t * d + 36 * b * call.tokens
    if told:
        window = _window(c, index) * (AUDIO_PER_LATENT // c.audio_group)
        size += (2 * a + (4 if machine.cuda else 8)) * (b * call.text * d + b * t * window * d)
    if machine.bf16 and not machine.gathered and (lora is not None or not call.trained):
        size += 2 * (
            4 * d * d + 2 * d * c.ffn_dim + 7 * d * d * told
        )  # autocast's copies, made anew for frozen weights
    if lora is not None:
        ranks = sum(_rows_of(c, call, target, index) * lora.rank for target in lora.targets)
        size += s * ranks
    return size


def kept_for_velocity(c: DiTConfig, call: Call, machine: Machine, lora: LoRAConfig | None = None) -> float:
    """The part of it in the last block that only v hangs on: let go where just keys and values are used."""
    n = call.items * call.tokens * c.dim
    for_keys = 12 if machine.cuda else 16
    return kept_per_block(c, call, machine, lora, c.depth - 1) - for_keys * n


def at_work(c: DiTConfig, call: Call, machine: Machine) -> float:
    """Bytes in use within one block of a forward pass that keeps nothing, its input included."""
    n, m, s = call.items * call.tokens * c.dim, call.items * call.keys * c.dim, machine.compute
    rotating = (8 + 4 * s) * n + (2 * s + 12 if machine.bf16 else 16) * m
    feeding = (8 + s) * n + 2 * s * n * c.ffn_dim / c.dim
    weights = 2 * c.dim * c.ffn_dim if machine.bf16 and not machine.gathered else 0
    return max(rotating, feeding + weights)


def backward_at_work(c: DiTConfig, call: Call, machine: Machine) -> float:
    """Bytes that the backward pass of a block needs besides what was kept."""
    n, s = call.items * call.tokens * c.dim, machine.compute
    return 12.0 * n + 2 * s * n * c.ffn_dim / c.dim


def outside_blocks(c: DiTConfig, call: Call) -> float:
    """Bytes kept by embedders and head."""
    b, t, d = call.items, call.frames, c.dim
    size = 4.0 * b * t * (256 + 4 * d + 6 * d) + 12.0 * b * call.tokens * d
    if call.text:
        groups = AUDIO_PER_LATENT // c.audio_group
        size += (
            4.0 * 3 * b * call.text * d + 4.0 * b * call.text * c.text_dim + 2 * 4.0 * 3 * b * (t + PAST) * groups * d
        )
    return size
