"""What terms learn for themselves on the features of the critic: heads, trained, saved and resumed with it.

A term's module may have head(config: DiTConfig) -> nn.Module; its loss calls critic.get_submodule("heads.<name>").
"""

from __future__ import annotations

import torch
from torch import nn

from distill.config import Recipe, head_function


def term_heads(recipe: Recipe) -> nn.ModuleDict:
    """The heads that the recipe's terms ask for, by term."""
    makers = {term.name: head_function(term.name, term.source) for phase in recipe.phases for term in phase.terms}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return nn.ModuleDict({name: make(recipe.model) for name, make in makers.items() if make is not None})


def imagined_heads(recipe: Recipe) -> nn.ModuleDict:
    """The same without their numbers, on the meta device."""
    with torch.device("meta"):
        return term_heads(recipe)


def head_parameters(recipe: Recipe) -> int:
    """Parameters of all heads."""
    return sum(p.numel() for p in imagined_heads(recipe).parameters())
