"""The training loop: one for every stage. Phases say who learns from which terms; nothing here knows what a loss is.

Per step and phase: draw a keyed batch, roll out, add up the weighted terms, backward, clip, check, update, average.
A non-finite loss or gradient skips the update and is counted; too many in a row stop the run (exit code 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from distill.balance import capped
from distill.config import OptimConfig, Phase, Recipe, rollout_function, term_function
from distill.contracts import Roles, Roll
from distill.data.batch import Batch
from distill.engine import Engine
from distill.errors import ExitCode, UserError
from distill.monitor import Monitor
from distill.reference import Origin, Reference, bands_of, find, settings
from distill.runs import StageRun
from distill.state import store
from distill.state.lineage import Manifest, describe
from distill.tracking import Silence, StopSignal, Tracker


class Source(Protocol):
    """Anything that batches are drawn from."""

    fingerprint: str  # of what the data is
    made_by: str  # of what it was made by, the same on every machine

    def sample(self, batch_size: int, generator: torch.Generator) -> Batch: ...


# (step, roles with averaged weights) -> scalars and pictures [H, W, 3] uint8 for the curves
Sampler = Callable[[int, Roles], tuple[dict[str, float], dict[str, Tensor]]]


class Trainer:
    """One stage of training, resumable at any checkpoint."""

    def __init__(
        self,
        recipe: Recipe,
        run: StageRun,
        roles: Roles,
        source: Source,
        engine: Engine,
        parent: Manifest | None,
        notes: dict[str, Any] | None = None,
    ):
        """notes: what else the manifest is to say, `teacher` (hash) and `forced` (distill/gates.py) among it."""
        self.recipe, self.run, self.roles, self.source = recipe, run, roles, source
        self.engine, self.parent = engine, parent
        # Found once: recipe files that change on the disk must not reach a run that is under way.
        self.terms = {s.name: term_function(s.name, s.source) for phase in recipe.phases for s in phase.terms}
        spec = recipe.rollout
        self.rollout = rollout_function(spec.kind, spec.source) if spec is not None else None
        self.trained = list(dict.fromkeys(phase.update for phase in recipe.phases))
        self.product = next(role for role in self.trained if role != "critic")  # what the stage is for
        if recipe.train.batch_size % engine.processes:
            raise UserError(
                f"train.batch_size {recipe.train.batch_size} is the whole batch and must be a multiple of the "
                f"{engine.processes} processes: change it with SET=, or PROCESSES."
            )
        configs = {role: recipe.optimizer[role] for role in self.trained}
        engine.place(roles.models, configs, recipe.train.clip, recipe.train.compile)
        for role, origin in roles.origins.items():
            store.fill(engine, role, origin.part(), origin.own)
        for frozen in (roles.codec, roles.embedder):
            if frozen is not None:
                frozen.to(engine.device)
        self.optimizers = engine.optimizers
        self.ema = engine.average(self.product, recipe.train.ema, recipe.train.ema_start)
        roles.average = None if engine.sharded else self.ema.average  # updated in place
        self.notes = notes or {}
        self.monitor = Monitor(recipe, self.product, self.reference())
        self.step, self.skipped = 0, 0
        self.pending: dict[str, tuple[float, int]] = {}  # of an interval of the curves that a checkpoint cuts in two
        # Counted per role: a healthy critic must not hide a student that stands still.
        self.skipped_in_row = dict.fromkeys(self.trained, 0)

    # ---- the loop -----------------------------------------------------------------------------------------

    def fit(self, sampler: Sampler | None = None, until: int | None = None) -> Path:
        """Train to the last step, from the newest whole checkpoint if there is one; returns the final checkpoint.
        until: save and stop after this step, as if asked to."""
        self.resume()
        train, steps = self.recipe.train, self.recipe.train.steps
        self.run.say(self.setting())
        self.run.say(self.losses())
        if self.monitor.reference.why:
            self.run.say(f"reference band: {self.monitor.reference.why}")
        saved: Path | None = None
        with self.tracker() as tracker, StopSignal(self.run.say, self.engine.processes > 1) as stop:
            if sampler is not None and self.step == 0:
                self.show(sampler, tracker)
            if self.step == 0:
                self.monitor.check(0, {}, tracker, self.run, self.engine)
            while self.step < steps:
                step = self.step + 1
                logs: dict[str, float | Tensor] = {}
                for index, phase in enumerate(self.recipe.phases):
                    if step % phase.every == 0:
                        logs |= self.update(step, index, phase)
                self.step = step
                tracker.log(step, logs)
                self.run.note(step=step)
                if sampler is not None and (step % train.sample_every == 0 or step == steps):
                    self.show(sampler, tracker)
                self.monitor.check(step, logs, tracker, self.run, self.engine)  # before a collapse is saved
                stopping = self.engine.any(stop.requested or step == until)
                if step % train.save_every == 0 or step == steps or stopping:
                    self.pending = tracker.pending()
                    saved = self.save({name: float(value) for name, value in logs.items()})
                if stopping and step < steps:
                    raise stop.error(step)
        return saved or self.run.checkpoints / f"step_{self.step:08d}"

    def tracker(self) -> Tracker | Silence:
        """Curves and progress, of rank 0 alone."""
        if not self.engine.is_main:
            return Silence()
        train, description = self.recipe.train, f"{self.recipe.name} ({self.recipe.stage})"
        return Tracker(
            self.run.folder, train.steps, description, self.step, train.log_every, self.run.say, self.pending
        )

    def losses(self) -> str:
        """One line: who learns from what."""
        each = [f"{phase.update} from {' + '.join(term.name for term in phase.terms)}" for phase in self.recipe.phases]
        return f"recipe: {self.recipe.name}, {'; '.join(each)}"

    def setting(self) -> str:
        """One line: what was set up, and the batch that an update sees."""
        train, processes = self.recipe.train, self.engine.processes
        each = f"{train.batch_size // processes} clips x {processes} processes x {train.grad_accumulation} micro-steps"
        return f"engine: {self.engine}; batch per update: {train.batch_size * train.grad_accumulation} clips = {each}"

    def show(self, sampler: Sampler, tracker: Tracker | Silence) -> None:
        """Sample with the averaged weights; gauges and pictures go to the log and to TensorBoard."""
        if self.engine.sharded or self.engine.is_main:  # networks in pieces take all processes to run
            with self.averaged_roles() as roles:
                scalars, images = sampler(self.step, roles)
            self._shown(scalars, images, tracker)
        self.engine.barrier()

    def _shown(self, scalars: dict[str, float], images: dict[str, Tensor], tracker: Tracker | Silence) -> None:
        self.monitor.gauges(self.step, scalars)
        tracker.event(self.step, scalars)
        for tag, image in images.items():
            tracker.image(tag, self.step, image)
        shown = ", ".join(f"{name.rpartition('/')[2]} {value:.3f}" for name, value in scalars.items())
        self.run.say(f"step {self.step}: {shown}")

    def update(self, step: int, index: int, phase: Phase) -> dict[str, float | Tensor]:
        """One optimizer step of one role."""
        train, engine = self.recipe.train, self.engine
        for role in self.trained:  # gradients go to this phase's role and nowhere else
            self.roles.models[role].requires_grad_(role == phase.update)
        logs: dict[str, float | Tensor] = {}
        for micro in range(train.grad_accumulation):
            key = (self.recipe.seed, engine.rank, step, micro, index)
            roles = replace(self.roles, key=key, processes=engine.processes)
            # The whole batch, drawn alike by all processes: each takes its rows, and knows the others' conditions.
            whole = self.source.sample(train.batch_size, roles.rows("batch"))
            size = train.batch_size // engine.processes
            batch = whole.select(slice(size * engine.rank, size * (engine.rank + 1))).to(engine.device)
            roles.whole = whole.cond if engine.processes > 1 else None
            with engine.autocast():
                roll = self.roll(batch, roles, phase)
                loss, parts = self.loss(roll, roles, phase, step)
            parts |= self.monitor.signals(batch, roll, phase.update)
            self.backward(phase.update, loss / train.grad_accumulation, roll, micro + 1 == train.grad_accumulation)
            for name, value in parts.items():
                logs[name] = logs.get(name, 0.0) + value / train.grad_accumulation
        norm = engine.clip(phase.update, train.clip)
        logs = engine.mean(logs)  # so that a value that is not finite in one process is so in all
        rate = learning_rate(self.recipe.optimizer[phase.update], step, train.steps)
        finite = bool(torch.isfinite(norm)) and all(math.isfinite(float(value)) for value in logs.values())
        if finite:
            with self.monitor.moving(engine, phase.update) as moved:
                engine.step(phase.update, rate)
            logs |= moved
            self.skipped_in_row[phase.update] = 0
        else:
            self.skip(step, phase.update, logs)
        engine.zero_grad(phase.update)
        if phase.update == self.product and finite:
            engine.update_average(self.ema, phase.update, step)
        return logs | {
            f"optim/grad_norm_{phase.update}": norm.detach(),
            f"optim/lr_{phase.update}": rate,
            "optim/skipped": float(self.skipped),
        }

    def backward(self, role: str, loss: Tensor, roll: Roll, last: bool) -> None:
        """Gradients of the loss; what was rolled out without a graph is run again in parts, one graph at a time."""
        parts = 0 if roll.replay is None else len(roll.replay)
        self.engine.backward(role, loss, last and not parts)
        again = roll.again()
        for number in range(1, parts + 1):
            with self.engine.autocast():
                part = next(again)
            self.engine.backward(role, part, last and number == parts)

    def roll(self, batch: Batch, roles: Roles, phase: Phase) -> Roll:
        """The recipe's rollout; the critic learns from samples that carry no graph."""
        spec = self.recipe.rollout
        assert spec is not None and self.rollout is not None
        with torch.set_grad_enabled(phase.update != "critic"):
            roll = self.rollout(batch, roles, spec.config)
        return roll if roll.identity is not None else replace(roll, identity=batch.identity)

    def loss(self, roll: Roll, roles: Roles, phase: Phase, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the phase's terms, and every part of it under the name it has in the curves."""
        total, logs = torch.zeros((), device=self.engine.device), dict(roll.logs)
        for spec in sorted(phase.terms, key=lambda spec: spec.cap > 0):  # what is capped comes after what caps it
            term = self.terms[spec.name](roll, roles, spec.config)
            ramp = min(1.0, step / spec.ramp_steps) if spec.ramp_steps else 1.0
            value = spec.weight * ramp * term.value
            name = spec.name if phase.update == self.product else f"{phase.update}_{spec.name}"
            logs[f"train/{name}"] = term.value.detach()
            logs |= {f"train/{name}_{key}": entry.detach() for key, entry in term.logs.items()}
            if spec.cap:
                value, seen = capped(value, total, roll.x0, spec.cap)
                logs |= {f"train/{name}_{key}": entry for key, entry in seen.items()}
            total = total + value
        return total, logs

    def skip(self, step: int, role: str, logs: dict[str, float | Tensor]) -> None:
        """Count an update that was not made; stop when it keeps happening."""
        self.skipped += 1
        self.roles.carried.clear()  # a stream that broke begins anew, in all processes
        self.skipped_in_row[role] += 1
        self.run.say(f"step {step}: the {role}'s loss or gradient is not finite, update skipped")
        for name in [name for name, value in logs.items() if not math.isfinite(float(value))]:
            del logs[name]
        if self.skipped_in_row[role] >= self.recipe.train.max_nonfinite:
            raise UserError(
                f"Stopped at step {step}: {self.skipped_in_row[role]} updates of the {role} in a row were not finite; "
                f"lower optimizer.{role}.lr or look at the last samples in {self.run.samples}.",
                ExitCode.NUMERICS,
            )

    # ---- state --------------------------------------------------------------------------------------------

    def save(self, metrics: dict[str, float]) -> Path:
        """Commit a checkpoint of every trained network, its optimizer, and the average of the product."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)} | self.monitor.measured
        meta = describe(self.recipe, self.step, self.parent, self.source.fingerprint, finite, self.notes)
        best = self.monitor.keep(self.step)
        progress = {
            "step": self.step,
            "skipped": self.skipped,
            "in_row": self.skipped_in_row,
            "pending": self.pending,
            "health": self.monitor.state(),
        }
        root, keep = self.run.checkpoints, self.recipe.train.keep
        carried = self.roles.carried
        return store.save(
            self.engine, root, self.step, self.trained, self.product, self.ema, meta, keep, progress, carried, best
        )

    def resume(self) -> None:
        """Take up the newest whole checkpoint of this stage, if there is one."""
        found = store.load(self.engine, self.run.checkpoints, self.trained, self.product, self.ema, self.run.say)
        if found is None:
            return
        self.roles.carried.update(store.carried(self.engine, found))
        self.step, self.skipped = found.progress["step"], found.progress["skipped"]
        self.skipped_in_row |= found.progress.get("in_row", {})
        self.pending = found.progress.get("pending", {})
        self.monitor.load(found.progress.get("health", {}))

    def reference(self) -> Reference:
        """The band that this run's curves can be held against."""
        above = settings(self.parent.recipe, whole=True) if self.parent and self.parent.stage != "teacher" else None
        origin = Origin(settings(self.recipe.resolved), self.source.made_by, self.notes.get("teacher"), above)
        return find(bands_of(self.recipe), origin)

    def averaged_roles(self) -> AbstractContextManager[Roles]:
        """The roles with the product's averaged weights, for samples and scores."""
        return self.engine.averaged(self.roles, self.product, self.ema)


def learning_rate(config: OptimConfig, step: int, total: int) -> float:
    """Linear warm-up, then constant, or half a cosine down to a hundredth."""
    if step <= config.warmup_steps:
        return config.lr * step / max(config.warmup_steps, 1)
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(total - config.warmup_steps, 1)
    return config.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)
