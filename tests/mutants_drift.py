"""Mutants of the long drift measurement and its statistics; see tests/mutants.py."""

from __future__ import annotations

DRIFT: dict[tuple[str, str], list[tuple[str, str, str]]] = {
    ("evaluation/bootstrap.py", "drift_statistics"): [
        ("tail = widened(count, (1 - level) / 2)", "tail = (1 - level) / 2", "intervals too short for few characters"),
        ("values.gather(1, order)", "values", "shuffled time is not shuffled"),
        (
            "means = known[resample(len(known), seed, draws)].mean(1)",
            "means = known",
            "the spread of characters, not of means",
        ),
    ],
    ("evaluation/survival.py", "drift_statistics"): [
        ("(lives.minutes >= time)", "(lives.minutes > time)", "who fails at a time was not at risk then"),
        ("ordered[allowed - 1]", "ordered[allowed]", "more strangers pass than the rate allows"),
        ("beyond.unfold(1, in_a_row, 1).all(2)", "beyond.unfold(1, in_a_row, 1).any(2)", "one bad window is a failure"),
        ("ends = [*times[1:], horizon]", "ends = [*times[1:], times[-1]]", "no area after the last failure"),
    ],
    ("evaluation/residual.py", "drift_statistics"): [
        (
            "known = torch.cat([z, time], -1)",
            "known = torch.cat([z, 0 * time], -1)",
            "a drift is taken for a lean of the head",
        ),
        ("y - inner[..., :-1] @ slopes", "y + inner[..., :-1] @ slopes", "sign of what confounds explain"),
        ("inner = known - known.mean(1, keepdim=True)", "inner = known", "confounds are not taken within a person"),
    ],
    ("distill/data/recurrent.py", "drift"): [
        (
            "blocks.append(a)\n        generator",
            "blocks.append(blocks[-1] if blocks else a)\n        generator",
            "A does not return",
        ),
    ],
    ("distill/drift_rows.py", "drift"): [
        ("own + share[:, None].to(own) * (other[:, None] - own)", "own", "no drift is injected"),
        ("f[:, max(start - a, 0) : stop - a]", "f[:, : stop - a]", "windows begin where their chunk does"),
    ],
    ("evaluation/recurrence.py", "drift"): [
        ("piece = min(piece, track.shape[2])", "piece = track.shape[2]", "a jump from clip to clip is motion"),
        ("ours.append(a / b.mean())", "ours.append(a / a.mean())", "motion in units of its own"),
        ("for one in mouth.unbind(1)", "for one in mouth[:, :1].unbind(1)", "the first return speaks for all"),
    ],
    ("evaluation/sync.py", "evaluation"): [
        ("(measured > OPEN) & ~near", "measured > OPEN", "a speaking mouth is open unasked"),
        ("2 * AROUND + 1, stride=1, padding=AROUND", "1, stride=1", "a late mouth is open unasked"),
    ],
    ("evaluation/windows.py", "drift"): [
        ("(start + times) % chunk_frames == 0", "times % chunk_frames == 1", "seams are looked for beside the borders"),
    ],
}
