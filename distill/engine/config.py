"""How training is spread over processes: one small YAML beside the recipe, `ACCELERATE=recipes/accelerate/zero3.yaml`.

The recipe says what is learned and the size of the whole batch; this file says where the state lies. Any of them can be
combined with any recipe, and a checkpoint of one resumes under another.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.schema import Report, bounded, build, choice, nearest, read_yaml

KINDS = ("plain", "ddp", "fsdp2", "zero1", "zero2", "zero3")
# What the engine itself sets: a second word on these would be a silent contradiction.
OURS = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"}
OURS |= {"bf16", "fp16", "optimizer", "scheduler"}


@dataclass(frozen=True)
class EngineConfig:
    """One engine. Precision is the recipe's (`train.precision`)."""

    kind: str = choice(*KINDS, default="plain")
    offload_optimizer: bool = False  # masters, moments and their update on the CPU (fsdp2, zero1-3)
    offload_frozen: bool = False  # weights of networks that do not learn rest on the CPU (fsdp2, zero3)
    reshard: bool = True  # fsdp2: free a block's gathered weights after its forward pass
    timeout_minutes: int = bounded(60, 1)  # after this long without an answer from another process, give up
    deepspeed: dict[str, Any] = field(default_factory=dict)  # zero1-3: laid over the generated configuration

    def __post_init__(self) -> None:
        if self.offload_optimizer and self.kind in ("plain", "ddp"):
            raise ValueError(f"offload_optimizer needs fsdp2 or zero1-3, kind is {self.kind}")
        if self.offload_frozen and self.kind not in ("fsdp2", "zero3"):
            raise ValueError(f"offload_frozen needs fsdp2 or zero3, kind is {self.kind}")
        if self.deepspeed and not self.kind.startswith("zero"):
            raise ValueError(f"deepspeed is for zero1-3, kind is {self.kind}")
        for key in self.deepspeed:
            if key in OURS:
                raise ValueError(f"deepspeed.{key} follows from the recipe and cannot be set here")


def load_engine(path: str | Path | None) -> EngineConfig:
    """The configuration at `path` (plain without one), or one UserError that lists everything wrong with it."""
    if not path:
        return EngineConfig()
    path = Path(path)
    if not path.is_file():
        known = [str(p) for p in sorted(Path("recipes/accelerate").glob("*.yaml"))]
        raise UserError(f"ACCELERATE: there is no file {path}{nearest(str(path), known)}")
    source = read_yaml(path)
    report = Report(source, str(path))
    config = build(EngineConfig, source.data, (), report)
    report.stop_if_any()
    assert config is not None
    return config
