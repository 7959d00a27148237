"""Stage gates: a stage refuses a parent that is not fit to be one.

The recipe's `gate:` block says what the parent's last samples must have shown; the values stand in its manifest, where
the trainer put them at the end. `FORCE="reason"` takes the parent as it is; the reason goes into the child's manifest
and is shown by `make lineage`. Variants whose parents are short switch the gate off in the recipe.
"""

from __future__ import annotations

from dataclasses import dataclass

from distill.config import Recipe
from distill.errors import ExitCode, UserError
from distill.schema import bounded
from distill.state.lineage import Manifest

# field -> the tag of its value, and whether that must be at least (or at most) what the gate says
TAGS = {
    "one_step": ("health/one_step", False),
    "seam": ("health/seam", False),
    "motion": ("health/motion_of_teacher", True),
    "identity": ("health/identity_of_teacher", False),
    "contrast": ("health/contrast", True),
}


@dataclass(frozen=True)
class GateConfig:
    """What the parent must have reached; None asks for nothing."""

    check: bool = True
    one_step: float | None = bounded(None, 0.0)  # error of one evaluation at the last step time, of the data's spread
    seam: float | None = bounded(None, 0.0)  # jump at chunk borders over that inside
    motion: float | None = bounded(None, 0.0)  # of the teacher's
    identity: float | None = bounded(None, 0.0)  # distance over the teacher's
    contrast: float | None = bounded(None, 0.0)  # of the data's


def failures(manifest: Manifest, gate: GateConfig) -> list[str]:
    """What of the gate a checkpoint does not pass, in words."""
    found = []
    for name, (tag, least) in TAGS.items():
        wanted = getattr(gate, name)
        if wanted is None:
            continue
        value = manifest.metrics.get(tag)
        words = f"{tag} must be {'at least' if least else 'at most'} {wanted:g}"
        if value is None:
            found.append(f"{words} and was not measured")
        elif not (value >= wanted if least else value <= wanted):
            found.append(f"{words} and is {value:.3g}")
    return found


def check(recipe: Recipe, parent: Manifest | None, forced: str, told: bool = True) -> str:
    """What goes into the child's manifest about the gate ("" when it was passed); UserError (code 6) if it was not."""
    gate: GateConfig | None = recipe.gate
    if gate is None or parent is None:
        return ""
    found = failures(parent, gate)
    if not gate.check:
        if told:
            print(f"gate of {parent.stage}: off in this variant{'; ' + '; '.join(found) if found else ''}", flush=True)
        return ""
    if not found:
        if told:
            print(f"gate of {parent.stage}: passed", flush=True)
        return ""
    if not forced:
        raise UserError(
            f"{parent.path} does not pass the gate of {recipe.stage} ({'; '.join(found)}): "
            f'train {parent.stage} longer, or take it all the same with FORCE="reason".',
            ExitCode.CHECKPOINT,
        )
    if told:
        print(f"gate of {parent.stage}: forced, {forced} ({'; '.join(found)})", flush=True)
    return f"{forced} ({'; '.join(found)})"
