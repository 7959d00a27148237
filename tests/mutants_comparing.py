"""Mutants of plans, grids and comparisons: see tests/mutants.py."""

COMPARING: dict[tuple[str, str], list[tuple[str, str, str]]] = {
    ("distill/costs.py", "memory"): [
        ("for_keys = 12 if machine.cuda else 16", "for_keys = 0", "keys alone keep nothing"),
        ("2 * (inside + head + own + memory)", "(inside + head + own + memory)", "gradients of weights cost nothing"),
        ("2 * a * kv + 2 * s * n", "a * kv + 2 * s * n", "values are not kept"),
    ],
    ("evaluation/crossed.py", "minutes"): [
        ("(scored.sum(0) > 1).any()", "(scored.sum(0) > 0).any()", "seeds with own characters count as crossed"),
        ("means.std() / math.sqrt(len(means))", "means.std()", "the error of a seed, not of their mean"),
    ],
    ("evaluation/arms.py", "minutes"): [
        ("at = [people.index(who) for who in", "at = [who % 8 for who in", "seeds lend each other characters"),
    ],
    ("distill/compare.py", "minutes"): [
        ('if a["code"] != b["code"]:', "if False:", "scores of other code are compared"),
        ('told["weights"] != member.key["source"]', "False", "minutes of other weights are shown"),
        ('for part in ("identities", "measured_by")', 'for part in ("identities",)', "other plans are compared"),
    ],
    ("distill/samples.py", "health"): [
        ("roles.stream.visible_chunks * roles.stream.chunk_frames", "10**6", "clips longer than what is in sight"),
    ],
    ("distill/data/version.py", "health"): [
        ('if key != "speech"', "", "what a CPU rounds decides which band fits"),
    ],
    ("distill/standing.py", "memory"): [
        ("head_parameters(self.recipe) if", "0 if", "heads weigh nothing"),
    ],
    ("distill/standing.py", "plan"): [
        (
            'found = {} if "teacher" in self.trained else {"teacher": whole}',
            "found: dict[str, int] = {}",
            "the teacher weighs nothing",
        ),
    ],
    ("distill/probe.py", "memory"): [
        ("            head.flops = 0.0\n", "            pass\n", "heads cost more with every draw"),
        ("storage not in self.known and storage not in weights", "False", "heads keep nothing"),
        ("trained + any(", "any(", "the weights of a head learn for nothing"),
        ("value in (*inputs, *named.values())", "value in (*inputs, *inputs)", "a head's named inputs are lost"),
        ("ctx.held = list(context)", "ctx.held = []", "checkpointing keeps no context"),
        ("own.cast = own.gradients = None", "own.cast = None", "gradients stay for ever"),
    ],
    ("distill/prices.py", "prices"): [
        ("kept.tested or made.hours is None", "made.hours is None", "an estimate takes the place of what was tested"),
        ('machine["threads"] >= machine["cores"]', "True", "a thread of its own is the whole machine"),
    ],
    ("distill/modules.py", "modules"): [
        ("if own is not None and name in shipped_names:", "if own == 0:", "a file takes a shipped loss's place"),
        ("found.setdefault(path.stem, path)", "found[path.stem] = path", "the farthest folder wins"),
    ],
    ("distill/errors.py", "cli"): [
        (
            'return str(error) if Path(last.f_code.co_filename).parent == shipped else ""',
            "return str(error)",
            "bugs hide",
        ),
    ],
    ("distill/runs.py", "cli"): [
        ('all(one.schedule == "constant"', 'all(one.schedule != "never"', "a cosine goes on at other rates"),
        (' and asked["train"]["steps"] > known["train"]["steps"]', "", "fewer steps go on as well"),
    ],
    ("distill/runs.py", "modules"): [
        ('"utf-8")) != meaning(path', '"utf-8")) == meaning(path', "a changed loss goes on in the old run"),
    ],
    ("distill/grid.py", "ablate"): [
        ("own_seed = seed if last or", "own_seed = seed if last and", "parents of another seed"),
        ("TRAINED.index(parent) + 1", "TRAINED.index(parent)", "the same stage again"),
        ('.get("parent") in gone[:-1]', '.get("parent") in ()', "a cell begins where PARENT= is not"),
        ('"code": {path.name', '"mode": {path.name[:0]', "an edited loss counts as the old one"),
    ],
    ("distill/progress.py", "ablate"): [
        (
            "if any(part.key == job.key for part in plan.chain(other.key)):",
            "if other.key == job.key:",
            "what needs a failed job waits for ever",
        ),
        ("if not report.is_symlink():", "if report.is_symlink():", "reports of other grids are made again"),
        ('status") == "done" and not stage.is_symlink()', 'status")', "a half-trained stage counts as made"),
    ],
    ("distill/jobs.py", "ablate"): [
        ("standing.place(job).unlink()", "pass", "a link that no longer holds is written through"),
        ("one.process.send_signal(signal.SIGTERM)", "one.process.poll()", "ctrl-C does not reach the jobs"),
        ("_ready(plan, progress)[: count - len(running)]", "_ready(plan, progress)", "all jobs at once"),
    ],
    ("evaluation/crossed.py", "arms"): [
        (
            "total = ms_seeds + torch.where(more, ms_people - ms_rest, 0.0)",
            "total = torch.where(more, ms_people, ms_rest)",
            "the luck of a training counts as an effect",
        ),
        ("sums * sums.shape[1] / count", "sums / count", "people weigh too little"),
        ("p * len(known) / (len(known) - above)", "p", "p-values for one test among many"),
    ],
    ("evaluation/arms_page.py", "arms"): [
        ("if better == worse > 0]", "if False]", "who has a better and a worse mark does not differ"),
    ],
    ("evaluation/arms.py", "arms"): [
        ("if not abs(entry.error) >= metric.matters or not", "if not", "marks for what nobody would notice"),
        (
            "metric.errors(ours) - metric.errors(theirs)",
            "metric.errors(theirs) - metric.errors(ours)",
            "better and worse change places",
        ),
    ],
}
