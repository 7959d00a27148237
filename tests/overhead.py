"""What the engine costs: `python tests/overhead.py [recipe.yaml] [steps]`, in CPU seconds.

Trains a few steps of a tiny recipe on the prepared data with the kept teacher, and holds apart the time in networks
(forward and backward), in AdamW, in the own arithmetic of terms and rollouts, and in the engine: batches, generators,
clipping, checks, averages, logging, status. All but networks and AdamW is overhead and is to stay under 5% of a step.
Needs `make data`; the student starts untrained, which changes no time.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distill import config
from distill.data import dataset
from distill.engine import Engine
from distill.roles import build_roles, find_teacher
from distill.runs import StageRun
from distill.trainer import Trainer


class Clock:
    """CPU seconds by part; a part inside another counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.open: list[str] = ["engine"]
        self.last = time.process_time()

    def turn(self) -> None:
        now = time.process_time()
        self.seconds[self.open[-1]] += now - self.last
        self.last = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.turn()
        self.open.append(name)
        try:
            yield
        finally:
            self.turn()
            self.open.pop()

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Count every call of owner.name as `part`."""
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return inner(*args, **kwargs)

        setattr(owner, name, timed)


@contextmanager
def networks(clock: Clock) -> Iterator[None]:
    """Count every module that is called from outside of any module: the forward of networks, however it is entered."""
    depth = 0

    def enter(*_: Any) -> None:
        nonlocal depth
        depth += 1
        if depth == 1:
            clock.turn()
            clock.open.append("networks")

    def leave(*_: Any) -> None:
        nonlocal depth
        depth -= 1
        if depth == 0:
            clock.turn()
            clock.open.pop()

    hooks = torch.nn.modules.module.register_module_forward_pre_hook(enter)
    ends = torch.nn.modules.module.register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        hooks.remove()
        ends.remove()


def measure(path: Path, steps: int, overrides: tuple[str, ...] = ()) -> dict[str, float]:
    """CPU seconds by part of `steps` steps, after two that warm up."""
    recipe = config.load(path, ("train.log_every=10", *overrides))
    optimizer = {role: replace(optim, warmup_steps=0) for role, optim in recipe.optimizer.items()}
    recipe = replace(recipe, optimizer=optimizer, train=replace(recipe.train, steps=steps + 2))
    data = Path(recipe.data.path)
    source = dataset.load(data, "train")
    roles = build_roles(recipe, find_teacher(recipe, Path("runs/none")), None, data)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        run = StageRun(Path(folder), done=False)
        run.say = lambda text: None  # type: ignore[method-assign]
        trainer = Trainer(recipe, run, roles, source, Engine(recipe.train.precision), None)
        clock.wrap(trainer.engine, "backward", "networks")
        for optimizer in trainer.optimizers.values():
            clock.wrap(optimizer, "step", "optimizer")
        clock.wrap(trainer, "loss", "terms")
        clock.wrap(trainer, "roll", "rollout")
        clock.wrap(trainer, "save", "checkpoint, once")
        warm = trainer.update

        def counted(step: int, *args: Any) -> Any:
            if step == 3:
                clock.turn()
                clock.seconds.clear()
            return warm(step, *args)

        trainer.update = counted  # type: ignore[method-assign]
        with networks(clock):
            trainer.fit()
    clock.turn()
    return dict(clock.seconds)


def table(seconds: dict[str, float], steps: int) -> str:
    """One line per part, and the share of a step that is neither networks nor optimizer."""
    parts = {name: value for name, value in seconds.items() if "once" not in name}
    whole = sum(parts.values())
    lines = [f"{name:10} {1000 * value / steps:9.2f} ms a step  {value / whole:6.2%}" for name, value in parts.items()]
    over = sum(value for name, value in parts.items() if name not in ("networks", "optimizer"))
    return "\n".join(
        [*sorted(lines), f"overhead: {over / whole:.2%} of a step, the engine's part {parts['engine'] / whole:.2%}"]
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = Path(sys.argv[1] if len(sys.argv) > 1 else "recipes/tiny/stage3_self_forcing.yaml")
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 8
    print(table(measure(chosen, count), count))
