"""Is a run healthy? Signals in, one verdict out: `healthy`, `watch: ...` or `STOP: ...`; nothing happens here.

A signal is a number under its tag in the curves. A limit names the value it should have and two that it must not reach:
at `watch` one should look at the run, at `stop` it is lost. The severity of a signal is its way from the ideal in units
of the way to `watch`, so that different signals can be held against each other: 1 and more is worth a word.
{tag: value} -> Verdict (level 0 healthy, 1 watch, 2 stop)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from distill.schema import bounded, choice

HEALTHY, WATCH, STOP = 0, 1, 2
Pair = tuple[float, float]  # (watch, stop)


@dataclass(frozen=True)
class HealthConfig:
    """When to speak and when to stop; pairs are (watch, stop). Behind each stands what healthy runs of the tiny scale
    showed, from the untrained causal network, where every student begins and which must not alarm, to stage 4."""

    # never: only say it; collapse: end the run when its pictures are lost; any: at every STOP.
    stop: str = choice("never", "collapse", "any", default="never")
    after: int = bounded(0, 0)  # steps before which pictures are not judged: a network from nothing draws noise
    # Pictures, at every sample.
    motion: Pair = (0.5, 0.15)  # 0.77 after 60 steps of stage 1, 0.97 at stage 4; in silence alone 0.57, untrained 0.58
    contrast: Pair = (0.8, 0.4)  # 1.01 after 60 steps of stage 1
    sharpness: Pair = (0.75, 0.3)  # 0.98 to 1.10; the teacher in training passes 0.53 at step 1,000
    grain: Pair = (1.35, 2.5)  # the same signal, upwards; noise shows 2.7
    exposure: Pair = (0.05, 0.25)  # 0.0004, the teacher 0.0003
    chroma: Pair = (0.05, 0.2)  # 0.002, the teacher 0.001
    drift: Pair = (0.04, 0.2)  # 0.001, the teacher 0.000
    seam: Pair = (1.5, 4.0)  # 1.32 untrained, 1.20 after 60 steps of stage 1, 1.09 later
    identity: Pair = (1.6, 3.5)  # 0.95 to 1.08; noise is 5 times as far
    sync: Pair = (0.8, 0.3)  # 0.99 to 1.00; a teacher of 1,000 steps has 0.83 of one of 3,000
    # Samples of the training itself, in latents, at every step.
    spread: Pair = (0.6, 0.25)  # 0.99 in stage 2
    level: Pair = (0.3, 1.0)  # 0.007 in stage 2
    # Updates, at every step.
    update: Pair = (
        0.01,
        0.05,
    )  # student of stage 2 0.00035 at lr 5e-5, critic 0.0014 at 2e-4: at most lr over the mean weight, 0.14
    critic: Pair = (0.3, 0.03)  # 16 by the learning rates and cadences of stages 2 and 3, 8 in stage 4, 1 at 1.3b
    rise: Pair = (2.5, 6.0)  # single steps differ by up to 3.7, each draws its times anew; at lr x30 16 times
    gradient: Pair = (0.8, 1.5)  # 0.45 at the start of stage 2
    gap: Pair = (0.4, 1.0)  # 0.05 at the start of stage 2
    clipped: Pair = (5.0, 50.0)  # 0.03 to 1.7, most below 0.8; a flow map that ran away 9 after 70 steps, 71 after 150
    skipped: Pair = (0.01, 0.5)
    guidance: Pair = (9.0, 15.0)  # 1.25 here, 4 at 1.3b and 17b
    # Conditions, at every step.
    muted: Pair = (0.2, 0.5)  # 0.00

    def __post_init__(self) -> None:
        for limit in LIMITS:
            watch, stop = getattr(self, limit.field)
            if not (limit.ideal < watch <= stop or limit.ideal > watch >= stop):
                raise ValueError(
                    f"{limit.field}: watch {watch} and stop {stop} must lie on one side of the ideal {limit.ideal:g}, "
                    "stop no nearer"
                )


@dataclass(frozen=True)
class Limit:
    """One rule. `lost` is what a STOP is called; `picture` rules wait for `after`, and are what a collapse is."""

    field: str
    tag: str
    ideal: float
    words: str
    lost: str = ""
    picture: bool = False

    def severity(self, value: float, at: float) -> float:
        """0 at the ideal, 1 at the value `at`; below 0 on the other side, NaN for NaN."""
        return (value - self.ideal) / (at - self.ideal)


_STATES = {"": "", "_speak": " while speaking", "_listen": " while listening", "_silence": " in silence"}
LIMITS = (
    *(
        Limit("motion", f"health/motion{key}_of_teacher", 1.0, f"motion {{:.2f}} of teacher{when}",
              f"collapsed (stands still{when}, motion {{:.2f}} of teacher)", picture=True)
        for key, when in _STATES.items()
    ),
    Limit("contrast", "health/contrast", 1.0, "contrast {:.2f} of the data", "collapsed (solid color)", True),
    Limit("sharpness", "health/sharpness", 1.0, "sharpness {:.2f} of the data", "collapsed (blurred)", True),
    Limit("grain", "health/sharpness", 1.0, "grain, sharpness {:.2f} of the data", "collapsed (noise)", True),
    Limit("exposure", "health/exposure", 0.0, "exposure off by {:.2f}", "collapsed (exposure off by {:.2f})", True),
    Limit("chroma", "health/chroma", 0.0, "color off by {:.2f}", "collapsed (color off by {:.2f})", True),
    Limit("drift", "health/drift", 0.0, "color drifts by {:.2f} in a clip", "collapsed (color drifts by {:.2f})", True),
    Limit("seam", "health/seam", 1.0, "chunk jumps {:.2f} of the steps inside", "collapsed (chunks fall apart)", True),
    Limit("identity", "health/identity_of_teacher", 1.0, "identity {:.2f} times as far as the teacher's",
          "collapsed (another face)", True),
    Limit("sync", "health/sync_of_teacher", 1.0, "lip sync {:.2f} of teacher", "collapsed (lip sync lost)", True),
    Limit("spread", "health/spread", 1.0, "spread of samples {:.2f} of the data", "collapsed (solid color)", True),
    Limit("level", "health/level_offset", 0.0, "mean of samples off by {:.2f}", "collapsed (mean off by {:.2f})", True),
    Limit("update", "health/update", 0.0, "an update moves the weights by {:.2g} of themselves"),
    Limit("critic", "health/critic_pace", 1.0, "the critic moves {:.2f} times as much as what it follows",
          "the critic stands still"),
    Limit("rise", "health/critic_rise", 1.0, "critic loss {:.2f} times what it was"),
    Limit("gradient", "health/dmd_grad_norm", 0.0, "DMD gradient {:.2f}"),
    Limit("gap", "health/dmd_gap", 0.0, "teacher and critic differ by {:.2f}"),
    Limit("clipped", "health/clipped", 0.0, "gradient norm {:.3g} times train.clip"),
    Limit("guidance", "health/guidance", 1.0, "guidance {:g}"),
    Limit("skipped", "health/skipped", 0.0, "{:.0%} of the updates not finite"),
    Limit("muted", "health/muted", 0.0, "{:.0%} of the clips are silent where they should sound",
          "silent audio ({:.0%} of the clips are silent where they should sound)"),
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """What one rule has to say."""

    level: int
    text: str
    severity: float
    collapse: bool


@dataclass(frozen=True)
class Verdict:
    """All findings, the worst first; `severity` of the worst signal also where nothing is to be said."""

    findings: tuple[Finding, ...] = ()
    severity: float = 0.0

    @property
    def level(self) -> int:
        """0 healthy, 1 watch, 2 stop."""
        return max((finding.level for finding in self.findings), default=HEALTHY)

    def stops(self, rule: str) -> bool:
        """Whether a run with this `health.stop` ends here."""
        ends = [finding for finding in self.findings if finding.level == STOP]
        return bool(ends) and (rule == "any" or (rule == "collapse" and any(finding.collapse for finding in ends)))

    def __str__(self) -> str:
        """`healthy`, `watch: motion 0.21 of teacher` or `STOP: collapsed (solid color)`; at most three reasons."""
        worst = [finding.text for finding in self.findings if finding.level == self.level]
        shown = "; ".join(dict.fromkeys(worst[:3])) + (f"; and {len(worst) - 3} more" if len(worst) > 3 else "")
        return ("healthy", f"watch: {shown}", f"STOP: {shown}")[self.level]


def judge(signals: Mapping[str, float], config: HealthConfig, step: int) -> Verdict:
    """The verdict on signals by tag; what is not there, or not finite, is not judged."""
    findings, worst = [], 0.0
    for limit in LIMITS:
        value = signals.get(limit.tag, math.nan)
        if not math.isfinite(value) or (limit.picture and step < config.after):
            continue
        watch, stop = getattr(config, limit.field)
        value = abs(value) if limit.ideal == 0.0 else value
        severity = limit.severity(value, watch)
        worst = max(worst, severity)
        lost = limit.severity(value, stop) >= 1
        if severity >= 1:
            words = (limit.lost or limit.words) if lost else limit.words
            findings.append(Finding(STOP if lost else WATCH, words.format(value), severity, lost and limit.picture))
    findings.sort(key=lambda finding: (-finding.level, -finding.severity))
    return Verdict(tuple(findings), worst)
