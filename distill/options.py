"""What the command line said, as one frozen value that every pipeline step takes.

`Options.load(stage)` turns it into a checked recipe: the given one, or the scale's default for that stage, with the
quick or smoke block and the overrides laid on top.
"""

from dataclasses import dataclass, field
from pathlib import Path

from distill.config import Recipe, default_recipe, load, read
from distill.errors import UserError


@dataclass(frozen=True)
class Options:
    """Command-line choices; `several` is true for commands that run more than one stage."""

    recipe: Path | None = None
    run: str = "tiny"
    parent: str | None = None
    overrides: tuple[str, ...] = ()
    quick: bool = False
    smoke: bool = False
    scale: str = "tiny"
    several: bool = False
    own: dict[str, str] = field(default_factory=dict)  # what only this command takes, empty where not given

    @property
    def variant(self) -> str | None:
        """Which block of the recipes shrinks them."""
        return "smoke" if self.smoke else "quick" if self.quick else None

    def path(self, stage: str) -> Path:
        """The recipe file of a stage; UserError when the given one is of another stage."""
        if self.recipe is None:
            return default_recipe(stage, self.scale)
        given = read(self.recipe).data.get("stage")
        if given == stage:
            return self.recipe
        if self.several:
            return default_recipe(stage, self.scale)
        if given is None:
            raise UserError(f"{self.recipe} names no stage, other recipes extend it: give another RECIPE.")
        raise UserError(f"{self.recipe} is a recipe of stage '{given}' but {stage} was asked for: give another RECIPE.")

    def load(self, stage: str) -> Recipe:
        """The checked recipe of a stage."""
        recipe = load(self.path(stage), self.overrides, self.variant)
        if recipe.stage != stage:  # possible through an override alone
            raise UserError(f"The recipe says stage '{recipe.stage}' but {stage} was asked for: drop the override.")
        return recipe


def run_name(run: str | None, scale: str, quick: bool, smoke: bool) -> str:
    """RUN, or the scale with the variant behind it: tiny, tiny-quick, tiny-smoke."""
    return run or scale + ("-smoke" if smoke else "-quick" if quick else "")
