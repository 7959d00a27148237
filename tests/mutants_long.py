"""Mutants of the long rollout, of history and sinks, and of the terms that hold identity and motion; see mutants.py."""

from __future__ import annotations

LONG: dict[tuple[str, str], list[tuple[str, str, str]]] = {
    ("recipes/long.py", "long"): [
        ("chunk.weight * part * x0", "part * x0", "late chunks count no more than early ones"),
        ("index == begin:", "index == begin - 1:", "replay begins early"),
        ("_run(chunk, with_refs(cache, self._refs()))", "_run(chunk, cache)", "references learn nothing"),
        ("real=real", "real=batch.latents", "another character's clip passes for real"),
        ("identity=before.identity", "identity=batch.identity", "a stream that goes on has the batch's name"),
        ("(row - piece)", "(row + piece)", "texts of other clips than the audio's"),
    ],
    ("recipes/carried.py", "long"): [
        ("seen=seen, later=()", "seen=0, later=()", "a stream that goes on believes itself new"),
    ],
    ("student/history.py", "history"): [
        ('"matched": step}', '"matched": 0.0}', "matched history is clean off-policy"),
        ("noisy, self.noise * level, 0.0)", "noisy, self.noise * level, self.noise)", "levels of frames without noise"),
    ],
    ("student/kv_cache.py", "history"): [
        (
            "decay * kept.to(dtype) + (1 - decay)",
            "(1 - decay) * kept.to(dtype) + decay",
            "average sink, shares swapped",
        ),
        ("self.later[step - 1]", "self.later[0]", "the last step sees the second one's history"),
    ],
    ("distill/balance.py", "levers"): [
        (
            "sizes[1] / sizes[0].clamp_min(1e-30)).clamp",
            "sizes[0] / sizes[1].clamp_min(1e-30)).clamp",
            "cap upside down",
        ),
        (".clamp(max=1.0)", "", "a cap that drives weak terms up"),
    ],
    ("recipes/identity_drift.py", "levers"): [
        ("other, size) - chunks + cfg.gap", "other, size) - chunks - cfg.gap", "contrast without its distance"),
        ("who != who.roll(shift, 0)", "who == who.roll(shift, 0) | True", "a clip of the same character is a stranger"),
        ("roll.time > cfg.high", "roll.time < cfg.high", "identity at high noise alone"),
    ],
    ("recipes/data_forcing.py", "levers"): [
        ("x0_from_v(yt, ", "x0_from_v(xt, ", "the teacher is asked at the sample"),
    ],
    ("recipes/reward_dmd.py", "levers"): [
        ("reward - cfg.baseline", "reward + cfg.baseline", "a baseline that adds to the reward"),
    ],
    ("recipes/recover.py", "levers"): [
        ("index = begin + cfg.chunks + 1", "index = begin + cfg.chunks", "a chunk that was made already is the aim"),
    ],
}
