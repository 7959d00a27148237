"""Mutants of the verdict, the bands and the gates; see tests/mutants.py."""

from __future__ import annotations

HEALTH: dict[tuple[str, str], list[tuple[str, str, str]]] = {
    ("distill/health.py", "health"): [
        (
            "return (value - self.ideal) / (at - self.ideal)",
            "return (self.ideal - value) / (at - self.ideal)",
            "severity",
        ),
        ("limit.picture and step < config.after", "step < config.after", "silent audio waits as pictures do"),
        ("lost and limit.picture)", "lost)", "every stop is a collapse"),
    ],
    ("distill/monitor.py", "health"): [
        ("(batch.state == code).any(1) & quiet", "quiet", "silence where nobody speaks"),
        ("max(norms) / self.recipe.train.clip", "min(norms)", "a gradient is held against 1, and the calmer one"),
        ("severity < self.best[1]", "severity > self.best[1]", "the worst checkpoint is kept"),
        ("        ).sqrt()\n\n    def gauges", "        )\n\n    def gauges", "size of an update squared"),
    ],
    ("distill/reference.py", "health"): [
        ("value < low - room or ", "", "nothing is below a band"),
        ("room = ROUNDING + ELSEWHERE * ", "room = ROUNDING * ", "a parent is known to the last digit"),
        ("(1 + 1 / seeds)", "(1 / seeds)", "the interval of the mean instead of a run's"),
        ("if band.origin == origin:", "if True:", "bands of other data speak"),
    ],
    ("distill/gates.py", "health"): [
        ("value >= wanted if least else value <= wanted", "value >= wanted", "a seam must be large"),
        ("    if not forced:\n", "    if False:\n", "gates never close"),
    ],
}
