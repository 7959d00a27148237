"""What stays on a GPU during a stage, whatever the step does: weights, gradients, moments, averages, by engine.

P parameters over n processes, bytes per parameter (trained in bf16 compute):

            weights   gradients   optimizer   EMA      frozen weights
    ddp     4         4           8           4        4
    fsdp2   4/n       4/n         8/n         4/n      4/n
    zero2   2         2/n         12/n        4/n      4          (zero1: gradients 2)
    zero3   2/n       2/n         12/n        4/n      4/n

A role with adapters has its own P (small) and a frozen base, which is the teacher unless an earlier stage trained the
role whole. `offload_optimizer` and `offload_frozen` put those columns on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from distill.config import Recipe, load
from distill.costs import Machine, adapter_parameters, block_parameters, parameters
from distill.engine.config import EngineConfig
from distill.heads import head_parameters
from distill.probe import State
from teacher.lora import LoRAConfig

SHARDED = ("fsdp2", "zero3")
EARLIER = {
    "stage1": (),
    "stage2": ("stage1",),
    "stage3": ("stage1", "stage2"),
    "stage4": ("stage1", "stage2", "stage3"),
}


@dataclass(frozen=True)
class Setting:
    """A recipe on so many processes under one engine. `from_the_start`: earlier stages have the same adapters."""

    recipe: Recipe
    processes: int = 1
    engine: EngineConfig = field(default_factory=EngineConfig)
    cuda: bool = True
    from_the_start: bool = False

    @property
    def machine(self) -> Machine:
        return Machine(self.recipe.train.precision == "bf16", self.cuda, self.engine.kind.startswith(("fsdp", "zero")))

    @property
    def trained(self) -> list[str]:
        return list(dict.fromkeys(phase.update for phase in self.recipe.phases))

    @property
    def product(self) -> str:
        return next((role for role in self.trained if role != "critic"), "")

    @property
    def micro_batch(self) -> int:
        """Clips per process and micro-step."""
        return -(-self.recipe.train.batch_size // self.processes)

    def sizes(self, role: str) -> int:
        """Parameters that learn."""
        lora = self.recipe.lora.of(role) if self.recipe.lora else None
        own = parameters(self.recipe.model) if lora is None else adapter_parameters(self.recipe.model, lora)
        return own + (head_parameters(self.recipe) if role == "critic" else 0)

    def frozen(self) -> dict[str, int]:
        """Networks that only run: name -> parameters."""
        whole = parameters(self.recipe.model)
        found = {} if "teacher" in self.trained else {"teacher": whole}
        if "refiner" in self.trained:
            known = _before(self.recipe)
            found["backbone"] = whole if known is None else adapter_parameters(self.recipe.model, known)
        for role in self.trained:
            if self.recipe.lora and self.recipe.lora.of(role) and not self.shares_teacher(role):
                found[f"base of {role}"] = whole
        return found

    def shares_teacher(self, role: str) -> bool:
        """Do the role's adapters stand on the teacher itself?"""
        first = role == "critic" or self.recipe.stage == "stage1"
        return self.from_the_start or first or _before(self.recipe) is not None

    def bytes(self) -> dict[str, dict[str, float]]:
        """Per network and kind, on one GPU; gradients not included, they come and go."""
        kind, n = self.engine.kind, max(self.processes, 1)
        zero, split = kind.startswith("zero"), n if kind in SHARDED else 1
        rows: dict[str, dict[str, float]] = {}
        for role in self.trained:
            p = float(self.sizes(role))
            half = self.machine.compute if zero else 4
            moments = (12 if zero else 8) * p / (n if zero or split > 1 else 1)
            row = {"weights": half * p / split, "optimizer": moments}
            if self.engine.offload_optimizer:
                row = {"weights": row["weights"] * zero, "optimizer": 0.0}
            row["EMA"] = (4 * p / (n if zero or split > 1 else 1)) * (role == self.product)
            rows[role] = row
        for name, p in self.frozen().items():
            away = self.engine.offload_frozen
            rows[name] = {"weights": 0.0 if away else 4.0 * p / split, "optimizer": 0.0, "EMA": 0.0}
        return rows

    def state(self, role: str) -> State:
        """Gradients of a role, and what is gathered of its blocks at a time."""
        kind, n = self.engine.kind, max(self.processes, 1)
        p = float(self.sizes(role)) if role in self.trained else 0.0
        each = {"zero1": self.machine.compute, "zero2": self.machine.compute / n, "zero3": self.machine.compute / n}
        each["fsdp2"] = 4 / n * (not self.engine.offload_optimizer)
        block = block_parameters(self.recipe.model)
        gathered = 2 * block * self.machine.compute if kind in SHARDED and n > 1 else 0.0
        whole = role in self.trained and not (self.recipe.lora and self.recipe.lora.of(role))
        gathered += 4 * block if kind in SHARDED and n > 1 and whole else 0.0  # gradients on their way to the shards
        return State(p * each.get(kind, 4), gathered)

    def checkpoint_bytes(self) -> float:
        """One checkpoint on the disk: fp32 weights, moments, averages of what learns."""
        return sum(12.0 * self.sizes(role) for role in self.trained) + 4.0 * self.sizes(self.product)


def _before(recipe: Recipe) -> LoRAConfig | None:
    return _line(recipe.scale, recipe.stage)


@lru_cache(maxsize=64)
def _line(scale: str, stage: str) -> LoRAConfig | None:
    """The adapters that the earlier stages of the scale's own recipes give to this line of students; None where one of
    them trains it whole, or where the scale has no such recipes."""
    found = None
    for before in EARLIER.get(stage, ()):
        paths = sorted(Path("recipes", scale).glob(f"{before}_*.yaml"))
        if len(paths) != 1:
            return None
        earlier = load(paths[0])
        found = earlier.lora.of("student") if earlier.lora else None
        if found is None:
            return None
    return found
