"""Mutants of the alternative objectives and of what they added to student and trajectories; see tests/mutants.py."""

from __future__ import annotations

OBJECTIVES: dict[tuple[str, str], list[tuple[str, str, str]]] = {
    ("recipes/dmd.py", "variants"): [
        ("return (h / h.mean())", "return h", "weights of a divergence change the length of the step"),
        ("F.softplus(-log_r)", "F.softplus(log_r)", "Jensen-Shannon looks where the teacher is not"),
        (".clamp(1 / cfg.limit, cfg.limit)", "", "a divergence's weight without bounds"),
    ],
    ("recipes/decoupled_dmd.py", "variants"): [
        ("* (plain - guided)", "* (guided - plain)", "guidance pushes away"),
        ("* (fake - plain)", "* (plain - fake)", "sign of the distribution's part"),
        ("roles, cfg.guidance)", "roles, cfg.distribution)", "guidance at the distribution's times"),
        ("distribution + guidance)", "distribution)", "guidance left out"),
    ],
    ("recipes/sid.py", "variants"): [
        ("gap * (fake - x0)", "gap * (fake - x0).detach()", "score identity without the sample's own gradient"),
        ("(1 - cfg.alpha)", "(1 + cfg.alpha)", "sign of alpha"),
        ("gap = real - fake", "gap = fake - real", "score identity away from the teacher"),
    ],
    ("recipes/causal_flow_matching.py", "forcing"): [
        ('if cfg.forcing == "teacher" else ()', 'if cfg.forcing != "teacher" else ()', "the two forcings swapped"),
        ('"b i -> b (i k)"', '"b i -> b (k i)"', "times of frames instead of chunks"),
        ("x0, size = roll.x0.detach()", "x0, size = roll.x0", "the flow's aim carries gradient"),
    ],
    ("recipes/consistency.py", "forcing"): [
        ('if cfg.target == "average" else None', "", "the average is always the target"),
    ],
    ("distill/rollout.py", "forcing"): [
        (" if weights is None else functional_call(student, weights, given)", "", "the average is never the target"),
    ],
    ("recipes/flow_map.py", "flow_map"): [
        ("target = v - per_frame", "target = v + per_frame", "sign of the derivative"),
        ("(up - down)", "(2 * (up - down))", "half the derivative"),
        ("(sizes + 1e-3)", "(sizes.mean() + 1e-3)", "all clips of a flow map have one weight"),
        (
            "with torch.no_grad():\n        v =",
            "with torch.enable_grad():\n        v =",
            "gradient through the derivative",
        ),
        ("torch.where(u[0] < cfg.instant, t, r)", "r", "the velocity itself never trained"),
    ],
    ("distill/trajectories.py", "forcing"): [
        ("teacher.remember(states[-1]", "teacher.remember(states[0]", "an autoregressive teacher remembers noise"),
        ("noise[:, start : start + size]", "noise[:, :size]", "every chunk from the same noise"),
        (
            "zip(heard, caches, strict=True)\n            return",
            "zip(heard, caches[:1] * 9)\n            return",
            "one memory for all",
        ),
    ],
    ("student/causal_dit.py", "flow_map"): [
        ("return torch.zeros_like(t) if r is None else r", "return torch.zeros_like(t)", "r is never heard"),
        ("return torch.zeros_like(t) if r is None else r", "return r", "no end told is no end at all"),
    ],
    ("student/stream.py", "flow_map"): [
        ("xt = x if model.flow_map and index else add_noise", "xt = add_noise", "a flow map noised afresh"),
        ("cache.at(index), r), t - r)", "cache.at(index), r), t)", "a flow map jumps to the end at every step"),
    ],
    ("teacher/dit.py", "flow_map"): [
        ("nn.init.zeros_(last.weight)", "nn.init.ones_(last.weight)", "the second time input speaks at once"),
    ],
    ("distill/pipeline.py", "chains"): [
        ("    if made_by != wanted:\n", "    if False:\n", "trajectories of another teacher are taken"),
        ('if stage == "stage4" and not recipe.student.refined', "if False", "a refiner without a step"),
    ],
}
