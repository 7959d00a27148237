"""Mutants of losses, rollouts, engines and the trainer: see tests/mutants.py."""

TRAINING: dict[tuple[str, str], list[tuple[str, str, str]]] = {
    ("distill/adapters.py", "lora"): [
        ("return merge(base, view.adapters) | others", "return base | others", "read without the adapters"),
    ],
    ("recipes/dmd.py", "recipes"): [
        ("g = (fake - real)", "g = (real - fake)", "sign of the DMD gradient"),
        (".square().mean() / 2", ".square().mean()", "DMD twice as strong"),
        (
            "fake = x0_from_v(xt, critic(",
            'fake = x0_from_v(xt, roles.dit("teacher")(',
            "teacher in the place of the critic",
        ),
        ("chunk = size if frames % size == 0 else frames", "chunk = frames", "normalizer over the whole clip"),
        (
            "with torch.no_grad():\n        gradient = dmd_gradient(roll.x0.detach()",
            "with torch.enable_grad():\n        gradient = dmd_gradient(roll.x0",
            "gradient through teacher and critic",
        ),
    ],
    ("recipes/flow_matching.py", "recipes"): [
        ("x0 = roll.x0.detach()", "x0 = roll.x0", "critic's loss reaches the student"),
        ("text=both | (u[0] < self.drop_text)", "text=both", "text never dropped alone"),
    ],
    ("distill/rollout.py", "recipes"): [
        (
            "xt = states[rows, choice, frames]",
            "xt = states[rows, choice * 0, frames]",
            "state and time of different steps",
        ),
        (
            "x0_from_v(xt, v, t), batch.cond, target=x0",
            "x0_from_v(xt, v, t), batch.cond, target=x0 * 0",
            "wrong target",
        ),
    ],
    ("recipes/identity_drift.py", "recipes"): [
        ("early = chunks[:, :1].detach()", "early = chunks[:, :1]", "the first chunk is pushed away"),
        ("(float(embedder.natural) - chunks).relu()", "(float(embedder.natural) - chunks)", "likeness without end"),
        ("hidden = ~mask[:, None]", "hidden = mask[:, None] & ~mask[:, None]", "absent references count"),
    ],
    ("recipes/perceptual.py", "recipes"): [
        ("total = total + (", "total = total + 0 * (", "perceptual term is empty"),
    ],
    ("recipes/self_forcing.py", "self_forcing"): [
        ('roles.generator("rollout/exit", shared=True)', 'roles.generator("rollout/exit")', "exit step per rank"),
        ('roles.generator("rollout/length", shared=True)', 'roles.generator("rollout/length")', "length per rank"),
        (
            "index >= plan.chunks - cfg.grad_chunks):\n            x0 = denoise_chunk(student",
            "index >= 0):\n            x0 = denoise_chunk(student",
            "all chunks carry gradient",
        ),
        (
            "stream.history, noise)\n        chunks.append(x0)\n"
            "    return _scored(chunks, plan, stream.steps[exit_step])",
            "CLEAN, noise)\n        chunks.append(x0)\n    return _scored(chunks, plan, stream.steps[exit_step])",
            "training under clean history",
        ),
        (
            "index >= plan.chunks - cfg.grad_chunks):\n            x0 = denoise_chunk(student",
            "index > plan.chunks - cfg.grad_chunks):\n            x0 = denoise_chunk(student",
            "one chunk with gradient too few",
        ),
        (
            "with torch.no_grad():\n            draft = denoise_chunk(",
            "with torch.enable_grad():\n            draft = denoise_chunk(",
            "the refiner's loss reaches the backbone",
        ),
        ("range(pieces - 1, 0, -1)", "range(1, pieces)", "pieces in the wrong order"),
        (
            "plan.cond.frames(total - plan.clip, total)",
            "plan.cond.frames(0, plan.clip)",
            "scored with the first clip's audio",
        ),
    ],
    ("distill/contracts.py", "self_forcing"): [
        (
            "key = (self.key[0], *self.key[2:]) if shared",
            "key = self.key if shared",
            "nothing is shared between ranks",
        ),
        ("return keyed_generator(*key, tag)", "return keyed_generator(key[0], tag)", "the same noise at every step"),
    ],
    ("recipes/self_forcing.py", "engine"): [
        ("torch.arange(rows) + rank * rows if", "torch.arange(rows) if", "neighbors of the first process's clips"),
    ],
    ("distill/engine/config.py", "engine"): [
        ("if key in OURS:", "if False:", "DeepSpeed's file contradicts the recipe"),
    ],
    ("distill/schema.py", "config"): [
        ("if overrides and _is_open(", "if False and (", "a mapping on the command line falls apart at its spaces"),
        ('value.startswith(("[", "{")) and', "True and", "a bracket in a name takes the next override in"),
    ],
    ("distill/launch.py", "engine"): [
        ('if several and config.kind == "plain":', "if False:", "several processes that train the same alone"),
    ],
    ("distill/state/shards.py", "engine"): [
        ("if len(files) != expected:", "if False:", "a checkpoint with a shard missing"),
        ("if end != prod(shape):", "if False:", "a tensor with elements missing"),
        ("- first * row : stop - first * row]", "- first : stop - first]", "elements counted as rows"),
    ],
    ("distill/engine/replicated.py", "spread"): [
        ("flat /= dist.get_world_size()", "pass", "gradients summed over processes, not averaged"),
        ("stacked / self.processes", "stacked", "curves summed over processes"),
    ],
    ("distill/engine/fsdp.py", "spread"): [
        ("                module.reshard()", "                pass", "gathered weights outlive their masters"),
        ("        self.refresh(role)\n\n    def pieces", "\n    def pieces", "recomputed adapters stay gathered"),
    ],
    ("distill/engine/zero.py", "spread"): [
        ("boundary(last)", "boundary(True)", "only the last micro-step counts"),
        ("if not _reaches(loss, self.models[role]):", "if False:", "a replayed rollout finds no bucket to reduce"),
        ("optimizer.update_lp_params()", "pass", "masters that change reach no weights"),
        (
            "if not (forward and torch._C",
            "if True or not (forward and torch._C",
            "a repeated layer is let go too early",
        ),
        ("self.dtype != torch.float32 and whole", "False", "masters that start from bf16 weights"),
    ],
    ("recipes/consistency.py", "objectives"): [
        ("per_frame(s - t, xt)", "per_frame(t - s, xt)", "a step up instead of down"),
        (
            "teacher_forced(batch, roles, xs, s, x0, weights).x0",
            "teacher_forced(batch, roles, xt, t, x0, weights).x0",
            "target at the same time",
        ),
        (
            "    with torch.no_grad():\n        target",
            "    with torch.enable_grad():\n        target",
            "gradient through the target",
        ),
        ("own + guided - teacher(", "own + guided + teacher(", "guidance added wrongly"),
    ],
    ("recipes/adversarial.py", "adversarial"): [
        ("logits(roll.x0.detach(), ", "logits(roll.x0, ", "the critic's side reaches the student"),
        ("Term(F.softplus(-fake).mean()", "Term(F.softplus(fake).mean()", "the student against itself"),
        (
            "F.softplus(-real).mean() + F.softplus(fake).mean()",
            "F.softplus(real).mean() + F.softplus(-fake).mean()",
            "real and fake swapped",
        ),
        ("                start /= PACE\n", "                pass\n", "a head starts ten times too large"),
        ("return PACE * self.out", "return self.out", "a head's last layer is as slow as the critic"),
    ],
    ("distill/roles.py", "chains"): [
        ("torch.manual_seed(recipe.seed)\n        made", "made", "a flow map begins otherwise every time"),
        ("own | fresh", "own", "nothing fills what the teacher lacks of a network that was made empty"),
    ],
    ("distill/roles.py", "adversarial"): [
        ('if name in own or not name.startswith("heads.")', "", "heads not asked for are loaded"),
        ("tensors = own | {", "tensors = {", "a new head is missed in the checkpoint"),
    ],
    ("distill/trainer.py", "trainer"): [
        ("requires_grad_(role == phase.update)", "requires_grad_(True)", "gradients left in other roles"),
        ("            engine.update_average(self.ema, phase.update, step)", "            pass", "EMA not applied"),
        ("        if finite:\n            with", "        if True:\n            with", "non-finite updates are made"),
        ("bool(torch.isfinite(norm)) and ", "", "overflowing gradients are taken"),
        ("loss / train.grad_accumulation", "loss", "micro steps are summed"),
        ("step, micro, index)", "0, micro, index)", "the same batch at every step"),
        ("spec.weight * ramp * term.value", "spec.weight * term.value", "ramp ignored"),
    ],
    ("distill/state/store.py", "trainer resume"): [
        ("        ema.load(", "        dict(", "EMA lost at resume"),
        ("            checkpoint.unpack_optimizer(", "            (lambda *_: None)(", "optimizer lost at resume"),
    ],
    ("distill/state/ema.py", "trainer"): [
        ("1.0 - self.decay", "self.decay", "average and parameter exchanged"),
    ],
    ("distill/state/checkpoint.py", "checkpoint"): [
        (
            "for path in reversed(folders):\n        reason = verify(path)",
            "for path in folders:\n        reason = verify(path)",
            "the oldest checkpoint resumes",
        ),
        (
            "        reason = verify(path)\n        if reason is None:",
            "        reason = None\n        if reason is None:",
            "damaged checkpoints resume",
        ),
    ],
    ("distill/tracking.py", "cli resume"): [
        ("start_step if start_step else -1)", "start_step)", "step 0 stands in the curves twice"),
        ('["step"] <= step:', '["step"] <= step + 99:', "records beyond the checkpoint stay"),
        ("{name: count for name, (_, count)", "{name: 0 for name, (_, count)", "half an interval weighs nothing"),
        (
            "        self.bar.close()\n        self.records",
            "        self.sums and self._write()\n        self.records",
            "half an interval is recorded",
        ),
    ],
    ("distill/engine/plain.py", "trainer"): [
        ("if wrong:", "if len(wrong) > 10**9:", "bf16 masters are trained"),
        ("        ema.copy_to(copied)\n", "", "samples without the average"),
    ],
}
