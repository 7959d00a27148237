"""Break one thing at a time and see that a test notices: `python tests/mutants.py [word ...]`.

Each mutant replaces one piece of code in a copy of the packages and runs the tests of that area until the first
failure. Prints a line per mutant and `mutants: N, caught: N`; the exit status is 1 when one survives. A word selects
the mutants whose file or description holds it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mutants_drift import DRIFT
from mutants_health import HEALTH
from mutants_long import LONG
from mutants_objectives import OBJECTIVES

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("teacher", "student", "evaluation", "distill", "recipes", "tests")

# (file, areas whose tests must notice): what is there, what the mutant puts in its place, what that breaks
MUTANTS: dict[tuple[str, str], list[tuple[str, str, str]]] = {
    ("teacher/flow.py", "flow"): [
        ("return eps - x0", "return x0 - eps", "sign of the velocity"),
        (
            "return shift * t / (1 + (shift - 1) * t)",
            "return t / (shift - (shift - 1) * t)",
            "shift and its inverse swapped",
        ),
        ("t / (shift - (shift - 1) * t)\n", "t / (shift + (shift - 1) * t)\n", "unshift with the wrong sign"),
        ("return xt - per_frame(t, xt) * v", "return xt - (1 - per_frame(t, xt)) * v", "x0 with eps's weight"),
        ("return xt + (1 - per_frame(t, xt)) * v", "return xt + per_frame(t, xt) * v", "eps with x0's weight"),
    ],
    ("teacher/guidance.py", "teacher"): [
        ('"none": 1 - guidance.text', '"none": -guidance.text', "guidance as c + s (c - u)"),
        ('"text": cond.drop(audio=True)', '"text": cond.drop(text=True)', "wrong middle branch"),
    ],
    ("teacher/rope.py", "cache teacher"): [
        (
            "positions + torch.tensor([frames, 0, 0]",
            "positions + torch.tensor([0, frames, 0]",
            "time moved along the rows",
        ),
    ],
    ("teacher/attention.py", "teacher cache"): [
        ("angles[-x.shape[1] :]", "angles[: x.shape[1]]", "queries at the places of the context"),
        (
            "    if all(kv.mask is None for kv in context):",
            "    if True:",
            "absent references are seen",
        ),
        ("spans[-1].stop == start:", "spans[-1].stop <= start:", "hidden blocks between two visible ones are seen"),
        (
            "keys = torch.cat([*(kv.k.to(k.dtype) for kv in context), k], 1)",
            "keys = torch.cat([*(kv.k.to(k.dtype).detach() for kv in context), k], 1)",
            "cached keys detached in the network",
        ),
        ("if mask is None and q.is_cuda", "if q.is_cuda", "flash-attn in spite of a mask"),
        (
            "return flash(q, k, v)",
            "return flash(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)",
            "flash-attn with heads before tokens",
        ),
        (" and q.dtype in (torch.bfloat16, torch.half)", "", "flash-attn in fp32"),
    ],
    ("teacher/attention.py", "attention"): [
        ("slice(0, self.free)] if self.free else []", "slice(0, 0)] if self.free else []", "references are not seen"),
        (
            "torch.cat([padding[..., span] for span in spans], -1)",
            "padding[..., : keys.shape[1]]",
            "padding of other keys",
        ),
    ],
    ("teacher/lora.py", "lora"): [
        (
            "nn.Parameter(down.new_zeros(layer.out_features, config.rank))",
            "nn.Parameter(down.new_ones(layer.out_features, config.rank))",
            "adapters have an effect at the start",
        ),
        ("self.scale = config.alpha / config.rank", "self.scale = config.alpha", "alpha without the rank"),
        (
            "return self.scale * self.up @ self.down",
            "return self.up @ self.down",
            "merged without the scale",
        ),
    ],
    ("teacher/adapted.py", "lora"): [
        ("self._hidden = (base,)", "self.inner, self._hidden = base, (base,)", "the base is part of each view"),
        (
            "twin = AdaptedDiT(self.base, self.lora)",
            "twin = AdaptedDiT(copy.deepcopy(self.base), self.lora)",
            "copies copy the base",
        ),
    ],
    ("distill/adapters.py", "lora"): [
        ("return merge(base, view.adapters) | others", "return base | others", "read without the adapters"),
    ],
    ("distill/costs.py", "memory"): [
        ("for_keys = 12 if machine.cuda else 16", "for_keys = 0", "keys alone keep nothing"),
        ("2 * (inside + head + own + memory)", "(inside + head + own + memory)", "gradients of weights cost nothing"),
        ("2 * a * kv + 2 * s * n", "a * kv + 2 * s * n", "values are not kept"),
    ],
    ("distill/standing.py", "plan"): [
        (
            'found = {} if "teacher" in self.trained else {"teacher": whole}',
            "found: dict[str, int] = {}",
            "the teacher weighs nothing",
        ),
    ],
    ("distill/probe.py", "memory"): [
        ("ctx.held = list(context)", "ctx.held = []", "checkpointing keeps no context"),
        ("own.cast = own.gradients = None", "own.cast = None", "gradients stay for ever"),
    ],
    ("teacher/blocks.py", "teacher"): [
        ("past + 1 - self.window :", "past + 2 - self.window :", "audio one frame late"),
    ],
    ("teacher/conditions.py", "teacher student"): [
        ("(stop + PAST))", "(stop + PAST + 1))", "a chunk hears one frame too many"),
    ],
    ("teacher/dit.py", "teacher self_forcing"): [
        ("told[index % 2]", "told[0]", "listen audio not heard"),
        ("(cond.text * cond.text_mask[..., None])", "(cond.text)", "masked words are read"),
        ("moved(base, time) for time in", "moved(base, 0 * time) for time in", "references all at one place"),
    ],
    ("teacher/sampler.py", "flow"): [
        ("if following > 0 else ahead", "if following > 2 else ahead", "Heun is Euler"),
    ],
    ("teacher/codec.py", "teacher"): [
        ("(z * self.scale) @ self.basis.T", "z @ self.basis.T", "decoder without scale"),
    ],
    ("student/mask.py", "cache student"): [
        ("column >= row - window", "column > row - window", "window one chunk short"),
        ("(column < row)", "(column <= row + 1)", "the next chunk is seen"),
        ("(column < sink)", "(column <= sink)", "sink one chunk too long"),
        (
            "Blocks(torch.cat([past, torch.eye(chunks, dtype=torch.bool)], 1)",
            "Blocks(torch.cat([past, torch.eye(chunks, dtype=torch.bool) | past], 1)",
            "the noisy past is seen beside the given history",
        ),
        (
            "Blocks(torch.cat([past, torch.eye",
            "Blocks(torch.cat([past | torch.eye(chunks, dtype=torch.bool), torch.eye",
            "a chunk sees its own clean end",
        ),
    ],
    ("student/kv_cache.py", "cache"): [
        ("[-self.window_chunks :]", "[-self.window_chunks - 1 :]", "window of the cache one chunk too long"),
        ("return len(self.visible) * self.grid[0]", "return self.seen * self.grid[0]", "absolute positions"),
        ("moved(base, index * self.grid[0])", "moved(base, index * self.grid[0] + 1)", "RoPE offset of the history"),
        (
            "grid_positions(*self.grid), self.start)",
            "grid_positions(*self.grid), self.start + 1)",
            "RoPE offset of now",
        ),
        ("len(self.sink) < self.sink_chunks", "len(self.sink) <= self.sink_chunks", "sink of the cache too long"),
        (
            "        return replace(self, window=window, seen=self.seen + 1)",
            "        self.__dict__.setdefault('kept', []).append(chunk)\n"
            "        new = replace(self, window=window, seen=self.seen + 1)\n"
            "        new.__dict__['kept'] = self.__dict__['kept']\n"
            "        return new",
            "forgotten chunks stay in memory",
        ),
        (
            "        window = (*self.window, chunk)[-self.window_chunks :] if self.window_chunks else ()\n",
            "        window = (*self.window, chunk)[-self.window_chunks :] if self.window_chunks "
            "else ()\n"
            "        if self.window and window:\n"
            "            for (k, v), (new_k, new_v) in zip(self.window[0], chunk, strict=True):\n"
            "                k.data.copy_(new_k), v.data.copy_(new_v)\n"
            "            window = (*self.window[1:], self.window[0])\n",
            "rolling buffer written in place",
        ),
    ],
    ("student/causal_dit.py", "cache student"): [
        (
            "cache.push(self.dit.run(x, t, cond, cache.positions(), cache.context())[1])",
            "cache.push(self.dit.run(x, t, cond, cache.positions(), cache.refs)[1])",
            "chunks are remembered without their past",
        ),
        ("self.dit.run(hist, t_hist, cond", "self.dit.run(hist, t, cond", "history at the time of the noisy clip"),
        (
            "context = [[*ref, KV(k, v, positions)]",
            "context = [[*ref, KV(k.detach(), v.detach(), positions)]",
            "given history without gradient",
        ),
        (
            "grid = (self.stream.chunk_frames, rows, columns)",
            "grid = (self.stream.chunk_frames, columns, rows)",
            "transposed",
        ),
    ],
    ("student/stream.py", "student self_forcing"): [
        ("@torch.no_grad()\ndef remember_chunk(", "def remember_chunk(", "what is remembered carries gradient"),
        ("and (exit_step is None or index == exit_step)", "", "every step carries gradient"),
        ("if noise else x0", "if noise > 1 else x0", "history never noised"),
        (
            "return x0, remember_chunk(refiner, x0,",
            "return x0, remember_chunk(refiner, draft,",
            "refiner remembers the draft",
        ),
        (
            "remember_chunk(backbone, draft, told, cache, config.history, generator)",
            "remember_chunk(backbone, draft, told, cache, 0.0, generator)",
            "backbone streams under clean history",
        ),
    ],
    ("student/hearing.py", "session"): [
        ("% len(ENDS) + len(ENDS)  #", "% len(ENDS)  #", "features of the past are taken for new ones"),
        (
            "features[:, -AUDIO_PER_LATENT * PAST :].clone()",
            "features[:, -AUDIO_PER_LATENT * PAST :]",
            "a view is kept",
        ),
    ],
    ("student/session.py", "session"): [
        ('keyed_generator(self.seed, index, "draft")', 'keyed_generator(self.seed, 0, "draft")', "noise of chunk 0"),
        ("        self._drafts = {}\n", "", "a chunk made ahead is shown after the interruption"),
        ("max(self._drafts, default=self.index - 1) + 1", "self.index", "a text for a chunk that is made already"),
        ("= draft.cache, final_cache, draft.heard", "= draft.cache, final_cache, self.heard", "the session stays deaf"),
        ("        self._drafts.pop(self.index, None)\n", "", "drafts pile up"),
        ("self.texts = [(self.index, self.texts[-1][1])]", "pass", "an interruption keeps the old text"),
    ],
    ("student/session_file.py", "session"): [
        ('facts["frames"])', "0)", "audio is resumed at another phase"),
        ('for first, text in facts["texts"]]', 'for first, text in facts["texts"][:1]]', "a text to come is lost"),
    ],
    ("student/fast.py", "session"): [
        ("known[1] is not cache", "False", "the context of another chunk"),
        ("return float(t[0]), None", "return 0.0, None", "the time of another step"),
    ],
    ("student/fast.py", "promise"): [
        ("Part(promise.x, _single(promise.t, None), sight)", "Part(promise.x, (1.0, None), sight)", "history as noise"),
        ("Promise(self, x.clone()", "Promise(self, x", "a chunk that was changed is remembered"),
        ("if not _same(context", "if False and not _same(context", "the step saw what is not in the cache"),
        (
            "table[-1][2:] = known[1][1][-1][2:]",
            "table[-1][2:] = known[0][1][-1][2:]",
            "the last layer at another time",
        ),
    ],
    ("student/sight.py", "session"): [
        ("known[0] is not cond.text or known[1] is not cond.text_mask", "False", "the text before"),
        ("bool(kv.mask.all())", "True", "absent references are seen"),
        ("not torch.equal(known[0], places)", "False", "keys at the places of an earlier window"),
        (
            "None if owed is None else turn[owed]",
            "None if owed is None else turn[-gap.shape[1] :]",
            "the chunk before at the place of the next",
        ),
        ("math.sqrt(width * norm.eps)", "math.sqrt(norm.eps)", "the norm's eps of one channel"),
    ],
    ("student/promise.py", "promise"): [
        ("self.before.push(self.network.write(self))", "self.before", "a promised chunk is forgotten"),
    ],
    ("student/stream.py", "promise"): [
        (
            "backbone.stream, anew(cache)",
            "backbone.stream, cache",
            "a draft thrown away keeps the session's promise",
        ),
    ],
    ("student/session_file.py", "promise"): [
        ('if shape["promised"] else cache', "if False else cache", "the chunk promised at saving is lost"),
    ],
    ("student/online.py", "online"): [
        ("if found != FORMAT:", "if found is None:", "a folder of another format is read"),
    ],
    ("evaluation/sound.py", "streaming"): [
        (".mean(0)", "[0]", "the second channel is not heard"),
    ],
    ("evaluation/film.py", "streaming"): [
        ("temporary.unlink(missing_ok=True)", "pass", "half a film is left"),
        ("SAMPLE_RATE, self.num_samples", "SAMPLE_RATE, 0", "all sound at the start"),
    ],
    ("evaluation/latency.py", "streaming"): [
        ("given[1].shape[0] * given[1].shape[1]", "1", "frames that pass are not counted"),
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
        ("chunks[:, :1].detach() - chunks", "chunks[:, :1] - chunks", "the first chunk is pushed away"),
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
    ("teacher/draws.py", "engine"): [
        ("rank * count, count)", "0, count)", "every process draws the first process's rows"),
    ],
    ("recipes/self_forcing.py", "engine"): [
        ("torch.arange(rows) + rank * rows if", "torch.arange(rows) if", "neighbors of the first process's clips"),
    ],
    ("distill/engine/config.py", "engine"): [
        ("if key in OURS:", "if False:", "DeepSpeed's file contradicts the recipe"),
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
        ("optimizer.update_lp_params()", "pass", "masters that change reach no weights"),
        (
            "if not (forward and torch._C",
            "if True or not (forward and torch._C",
            "a repeated layer is let go too early",
        ),
        ("self.dtype != torch.float32 and whole", "False", "masters that start from bf16 weights"),
    ],
    ("teacher/naming.py", "weights"): [
        ('"d c p q -> d (p q c)"', '"d c p q -> d (q p c)"', "rows and columns of a patch swapped"),
        ("weight[:, :channels, 0]", "weight[:, -channels:, 0]", "the wrong channels of I2V kept"),
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
    ],
    ("distill/roles.py", "adversarial"): [
        ('if name in own or not name.startswith("heads.")', "", "heads not asked for are loaded"),
        ("tensors = own | {", "tensors = {", "a new head is missed in the checkpoint"),
    ],
    ("distill/trainer.py", "trainer"): [
        ("requires_grad_(role in self.trained)", "requires_grad_(True)", "gradients in the teacher"),
        ("requires_grad_(role == phase.update)", "requires_grad_(True)", "gradients left in other roles"),
        ("            self.ema.update(model, step)", "            pass", "EMA not applied"),
        ("        self.ema.copy_to(averaged)\n", "", "samples without the average"),
        ("        self.ema.load(", "        dict(", "EMA lost at resume"),
        ("            checkpoint.unpack_optimizer(", "            (lambda *_: None)(", "optimizer lost at resume"),
        (
            "        if finite:\n            for group",
            "        if True:\n            for group",
            "non-finite updates are made",
        ),
        ("bool(torch.isfinite(norm)) and ", "", "overflowing gradients are taken"),
        ("loss / train.grad_accumulation", "loss", "micro steps are summed"),
        ("step, micro, index)", "0, micro, index)", "the same batch at every step"),
        ("spec.weight * ramp * term.value", "spec.weight * term.value", "ramp ignored"),
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
    ],
    ("student/live/scheduler.py", "serve serve_model"): [
        ("self._ring.append(job)", "self._ring.appendleft(job)", "one session goes on until its sound is used up"),
        ("job.inbox.popleft()", "job.inbox.pop()", "what a session is told comes in the wrong order"),
    ],
    ("student/live/connection.py", "serve serve_limits"): [
        ("round(at * SAMPLE_RATE) + one.dropped", "round(at * SAMPLE_RATE)", "interrupted sound is not counted"),
        ("self.drawn - self.shown >= self.limits.frames_waiting", "False", "a slow client's pictures pile up"),
        ("self.studio.leave(len(self.running))", "self.studio.leave(0)", "places are never given back"),
        ("if waiting > self.limits.backlog_seconds", "if False", "sound piles up"),
        ("        self.done += dropped\n", "", "interrupted sound counts as waiting"),
        ("if ahead > self.limits.ahead_seconds", "if False", "sound faster than real time"),
    ],
    ("student/live/guard.py", "serve serve_limits"): [
        ("if name in self.names", "if name.startswith(tuple(self.names))", "a name that begins like ours"),
        ("urlsplit(origins[0]).netloc.lower() != hosts[0].lower()", "False", "pages from anywhere may connect"),
    ],
    ("student/live/wire.py", "serve serve_limits"): [
        ("(samples, silence) if channel == SPEAK", "(samples, silence) if channel == LISTEN", "channels swapped"),
    ],
    ("student/live/studio.py", "serve serve_model"): [
        ("seed=told.seed", "seed=0", "every session has the same noise"),
        ("self.references[told.character]", "next(iter(self.references.values()))", "all get the first character"),
    ],
    ("student/live/meters.py", "serve_model"): [
        ("return 1.0 - float(", "return float(", "likeness instead of distance"),
        ("maxlen=RECENT", "maxlen=None", "a real-time factor of the whole past"),
    ],
    ("student/serve.py", "serve_limits serving"): [
        ("self.loop.call_later(CUT_SECONDS, self.transport.abort)", "pass", "a client that never reads is never cut"),
        ("listener.bind(address)", 'listener.bind(("", address[1]))', "bound to every address"),
    ],
    ("distill/modules.py", "modules"): [
        ("if own is not None and name in shipped_names:", "if own == 0:", "a file takes a shipped loss's place"),
        ("found.setdefault(path.stem, path)", "found[path.stem] = path", "the farthest folder wins"),
    ],
    ("distill/runs.py", "modules"): [
        ('"utf-8")) != meaning(path', '"utf-8")) == meaning(path', "a changed loss goes on in the old run"),
    ],
    ("distill/grid.py", "ablate"): [
        ("own_seed = seed if last or", "own_seed = seed if last and", "parents of another seed"),
        ('"code": {path.name', '"mode": {path.name[:0]', "an edited loss counts as the old one"),
    ],
    ("distill/progress.py", "ablate"): [
        (
            "if any(part.key == job.key for part in plan.chain(other.key)):",
            "if other.key == job.key:",
            "what needs a failed job waits for ever",
        ),
    ],
    ("distill/jobs.py", "ablate"): [
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
    ("evaluation/arms.py", "arms"): [
        ("if not abs(entry.error) >= metric.matters or not", "if not", "marks for what nobody would notice"),
        (
            "metric.errors(ours) - metric.errors(theirs)",
            "metric.errors(theirs) - metric.errors(ours)",
            "better and worse change places",
        ),
    ],
}


def run(folder: Path, areas: str) -> bool:
    """Do the tests of these areas pass on the copy?"""
    files = [f"tests/test_{area}.py" for area in areas.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True).returncode == 0


def main(words: list[str]) -> int:
    table = MUTANTS | OBJECTIVES | DRIFT | LONG | HEALTH
    every = [(path, areas, *mutant) for (path, areas), mutants in table.items() for mutant in mutants]
    chosen = [mutant for mutant in every if not words or any(word in mutant[0] + mutant[4] for word in words)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in (*PACKAGES, "docs"):  # a test reads the table of objectives
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
        for name in ("pyproject.toml", "Makefile", "README.md"):
            shutil.copy(ROOT / name, folder)
        if not run(folder, " ".join(dict.fromkeys(" ".join(mutant[1] for mutant in chosen).split()))):
            print("The tests fail without any mutant: mend them first.")
            return 1
        caught = sum(notice(folder, *mutant) for mutant in chosen)
    print(f"mutants: {len(chosen)}, caught: {caught}")
    return int(caught < len(chosen))


def notice(folder: Path, path: str, areas: str, old: str, new: str, about: str) -> bool:
    """Make one mutant in the copy, run its tests, mend it again: was it caught?"""
    file = folder / path
    text = file.read_text(encoding="utf-8")
    if text.count(old) != 1:
        print(f"STALE     {path}: {about}: its piece of code is there {text.count(old)} times", flush=True)
        return False
    file.write_text(text.replace(old, new), encoding="utf-8")
    caught = not run(folder, areas)
    file.write_text(text, encoding="utf-8")
    print(f"{'caught' if caught else 'SURVIVED':9} {path}: {about}", flush=True)
    return caught


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
