"""What the trainer watches of a run, and what it says: signals of every update, gauges of every sample, one verdict.

`signals` looks at a batch and the samples made from it, `moving` at the weights, `gauges` takes what was measured on
pictures, and `check` joins all of it (distill/health.py), says one line every `log_every` steps - at once when it is a
STOP - and ends the run where the recipe says so. The state is a few numbers, saved with every checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from distill.config import Recipe
from distill.contracts import Roll
from distill.data.batch import Batch
from distill.engine import Engine
from distill.errors import ExitCode, UserError
from distill.health import STOP, HealthConfig, Verdict, judge
from distill.reference import Reference
from distill.runs import StageRun
from distill.tracking import Silence, Tracker
from teacher.conditions import AUDIO_PER_LATENT, PAST, SILENCE

SPEAK, LISTEN = 1, 2  # states of a frame
SAMPLED = 4096  # weights of each tensor whose movement is measured: enough for a norm, nothing beside a step
EARLY = 3  # log intervals whose mean is what the critic's loss was


class Monitor:
    """The health of one stage of one run."""

    def __init__(self, recipe: Recipe, product: str, reference: Reference):
        self.config: HealthConfig = recipe.health
        self.recipe, self.product, self.reference = recipe, product, reference
        self.sums: dict[str, float] = {}  # of the log interval under way
        self.counts: dict[str, int] = {}
        self.measured: dict[str, float] = {}  # the newest gauges
        self.measured_at = -1
        self.early, self.intervals = 0.0, 0  # mean of the critic's loss over the first intervals, and their number
        self.skipped = 0.0  # updates, so far
        self.best: tuple[int, float] | None = None  # step of a checkpoint, severity of its pictures
        self.stopping = False  # whether the last word was STOP
        self.guidance = strongest_guidance(recipe)

    # ---- what is seen -------------------------------------------------------------------------------------

    @torch.no_grad()
    def signals(self, batch: Batch, roll: Roll, role: str) -> dict[str, Tensor]:
        """Scalars of one micro-step: silent clips; of the product, spread and mean of its samples against the data."""
        logs = {"health/muted": muted(batch)}
        if role == self.product and batch.latents is not None and roll.x0 is not batch.latents:
            x0, data = roll.x0.detach().float(), batch.latents.float()
            scale = data.std((-2, -1)).mean()
            logs["health/spread"] = x0.std((-2, -1)).mean() / scale
            logs["health/level_offset"] = (x0.mean((0, 1, 3, 4)) - data.mean((0, 1, 3, 4))).abs().mean() / scale
        return logs

    @contextmanager
    def moving(self, engine: Engine, role: str) -> Iterator[dict[str, Tensor]]:
        """Within the block the weights of `role` are updated; the yielded logs then hold how much they moved."""
        logs: dict[str, Tensor] = {}
        before = _some_weights(engine, role)
        yield logs
        after = _some_weights(engine, role)
        moved = torch.stack([(a - b).square().sum() for a, b in zip(after, before, strict=True)]).sum()
        size = torch.stack([weight.square().sum() for weight in before]).sum()
        both = engine.mean({"moved": moved, "size": size})  # of all parts, where weights lie in parts
        logs[f"optim/update_{role}"] = (
            torch.as_tensor(both["moved"]) / torch.as_tensor(both["size"]).clamp_min(1e-30)
        ).sqrt()

    def gauges(self, step: int, scalars: Mapping[str, float]) -> None:
        """Take what was measured on pictures at this step."""
        self.measured, self.measured_at = {k: v for k, v in scalars.items() if math.isfinite(v)}, step

    # ---- what is said -------------------------------------------------------------------------------------

    def check(
        self, step: int, logs: Mapping[str, float | Tensor], tracker: Tracker | Silence, run: StageRun, engine: Engine
    ) -> None:
        """Say how the run is, if it is time; UserError (code 5) where the recipe ends it here."""
        now = {name: float(value) for name, value in logs.items() if math.isfinite(float(value))}
        skipped = now.get("optim/skipped", self.skipped)
        now["health/skipped"], self.skipped = skipped - self.skipped, skipped
        for name, value in now.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
        due = step % self.recipe.train.log_every == 0 or step in (self.measured_at, self.recipe.train.steps)
        means = {name: total / self.counts[name] for name, total in self.sums.items()} if due else now
        verdict = judge({**self.measured, **self.derived(means, due)}, self.config, step)
        if due or (verdict.level == STOP and not self.stopping):
            self.tell(step, verdict, means if due else {}, tracker, run)
            self.stopping = verdict.level == STOP
        if step % self.recipe.train.log_every == 0:
            self.sums, self.counts = {}, {}
        if engine.any(verdict.stops(self.config.stop)):
            raise UserError(self.ending(step, verdict, run), ExitCode.NUMERICS)

    def derived(self, means: Mapping[str, float], whole: bool) -> dict[str, float]:
        """Signals under the tags that limits know; `whole`: the means are of an interval, not of a step."""
        signals = {**means, "health/guidance": self.guidance}
        if not whole:  # what only an interval can tell
            signals.pop("health/skipped", None)
        product, critic = means.get(f"optim/update_{self.product}"), means.get("optim/update_critic")
        if product is not None:
            signals["health/update"] = product
        if whole and product and "critic" in self.recipe.optimizer:
            moved = (critic or 0.0) * self.counts.get("optim/update_critic", 0)
            signals["health/critic_pace"] = moved / (product * self.counts[f"optim/update_{self.product}"])
        loss = means.get("train/critic_flow_matching")
        if whole and loss is not None and self.intervals < EARLY:
            self.intervals += 1
            self.early += (loss - self.early) / self.intervals
        elif whole and loss is not None:
            signals["health/critic_rise"] = loss / self.early
        norms = [value for name, value in means.items() if name.startswith("optim/grad_norm_")]
        if whole and norms:  # a single step may well jump
            signals["health/clipped"] = max(norms) / self.recipe.train.clip
        for part in ("grad_norm", "gap"):
            found = [value for name, value in means.items() if name.endswith(f"dmd_{part}")]
            signals |= {f"health/dmd_{part}": found[0]} if found else {}
        return signals

    def tell(
        self, step: int, verdict: Verdict, means: Mapping[str, float], tracker: Tracker | Silence, run: StageRun
    ) -> None:
        """One line to the terminal, a number and a text to the curves, a word to STATUS.json."""
        band = self.reference.compare(step, {**means, **(self.measured if self.measured_at == step else {})})
        run.say(f"step {step}: {verdict}{f', {band}' if band else ''}")
        run.note(health=str(verdict))
        tracker.event(step, {"health/level": float(verdict.level)})
        tracker.text("health/verdict", step, f"step {step}: {verdict}{f', {band}' if band else ''}")

    def ending(self, step: int, verdict: Verdict, run: StageRun) -> str:
        """The sentence that ends a run."""
        kept = run.checkpoints / f"step_{self.best[0]:08d}" if self.best else None
        best = f"the best so far is kept, PARENT={kept}" if kept else "no checkpoint was good enough to be kept"
        return (
            f"Stopped at step {step}, {verdict}: {best}; look at {run.samples}, or train on with SET=health.stop=never."
        )

    # ---- checkpoints --------------------------------------------------------------------------------------

    def keep(self, step: int) -> int | None:
        """Called when a checkpoint of this step is saved: the step of the best one, which must stay."""
        if self.measured_at == step:
            severity = judge(self.measured, self.config, step).severity
            if self.best is None or severity < self.best[1]:
                self.best = (step, severity)
        return self.best[0] if self.best else None

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to say the same, as JSON."""
        names = ("sums", "counts", "measured", "measured_at", "early", "intervals", "skipped", "best", "stopping")
        return {name: getattr(self, name) for name in names}

    def load(self, state: Mapping[str, Any]) -> None:
        """Give back what `state` gave."""
        for name, value in state.items():
            setattr(self, name, value)
        self.best = (self.best[0], self.best[1]) if self.best else None


def strongest_guidance(recipe: Recipe) -> float:
    """The largest guidance weight of any loss or rollout of the recipe; 1 is none."""
    configs = [term.config for phase in recipe.phases for term in phase.terms]
    configs += [recipe.rollout.config] if recipe.rollout else []
    weights = [getattr(getattr(config, "cfg", None), name, 1.0) for config in configs for name in ("text", "audio")]
    return max(weights, default=1.0)


def muted(batch: Batch) -> Tensor:
    """Share of clips that speak or listen by their state while what they hear is `SILENCE` from end to end."""
    share = torch.zeros(len(batch), dtype=torch.bool, device=batch.state.device)
    for code, heard in ((SPEAK, batch.cond.speak), (LISTEN, batch.cond.listen)):
        quiet = (heard[:, AUDIO_PER_LATENT * PAST :] == SILENCE).flatten(1).all(1)
        share |= (batch.state == code).any(1) & quiet
    return share.float().mean()


def _some_weights(engine: Engine, role: str) -> list[Tensor]:
    """A sample of the weights of `role` that lie in this process."""
    if engine.sharded:
        tensors = [piece.tensor for piece in engine.pieces(role)]
    else:
        tensors = [weight for weight in engine.models[role].parameters() if weight.requires_grad]
    return [tensor.detach().flatten()[:SAMPLED].float().clone() for tensor in tensors]
