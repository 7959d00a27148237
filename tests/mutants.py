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

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("teacher", "student", "evaluation", "distill", "recipes", "tests")

# (file, what is there, what the mutant puts in its place, what that breaks, tests that must notice)
MUTANTS = [
    ("teacher/flow.py", "return eps - x0", "return x0 - eps", "sign of the velocity", "teacher"),
    ("teacher/flow.py", "return shift * t / (1 + (shift - 1) * t)", "return t / (shift - (shift - 1) * t)", "shift and its inverse swapped", "teacher"),
    ("teacher/guidance.py", '"none": 1 - guidance.text', '"none": -guidance.text', "guidance as c + s (c - u)", "teacher"),
    ("teacher/guidance.py", '"text": cond.drop(audio=True)', '"text": cond.drop(text=True)', "wrong middle branch", "teacher"),
    ("teacher/rope.py", "positions + torch.tensor([frames, 0, 0]", "positions + torch.tensor([0, frames, 0]", "time moved along the rows", "student teacher"),
    ("teacher/attention.py", "angles[-x.shape[1] :]", "angles[: x.shape[1]]", "queries at the places of the context", "teacher"),
    ("teacher/attention.py", "return padding if mask is None else padding & mask", "return mask if mask is not None else None", "absent references are seen", "teacher student"),
    ("teacher/attention.py", "keys = torch.cat([*(kv.k.to(k.dtype) for kv in context), k], 1)", "keys = torch.cat([*(kv.k.to(k.dtype).detach() for kv in context), k], 1)", "cached keys detached in the network", "teacher student"),
    ("teacher/blocks.py", "past + 1 - self.window :", "past + 2 - self.window :", "audio one frame late", "teacher"),
    ("teacher/conditions.py", "(stop + PAST))", "(stop + PAST + 1))", "a chunk hears one frame too many", "teacher student"),
    ("teacher/dit.py", "told[index % 2]", "told[0]", "listen audio not heard", "teacher"),
    ("teacher/dit.py", "(cond.text * cond.text_mask[..., None])", "(cond.text)", "masked words are read", "teacher"),
    ("teacher/dit.py", "moved(base, time) for time in", "moved(base, 0 * time) for time in", "references all at one place", "teacher self_forcing"),
    ("teacher/sampler.py", "if following > 0 else ahead", "if following > 2 else ahead", "Heun is Euler", "teacher"),
    ("teacher/codec.py", "(z * self.scale) @ self.basis.T", "z @ self.basis.T", "decoder without scale", "teacher"),
    ("student/mask.py", "column >= row - window", "column > row - window", "window one chunk short", "student"),
    ("student/mask.py", "(column < row)", "(column <= row + 1)", "the next chunk is seen", "student"),
    ("student/mask.py", "(column < sink)", "(column <= sink)", "sink one chunk too long", "student"),
    ("student/kv_cache.py", "[-self.window_chunks :]", "[-self.window_chunks - 1 :]", "window of the cache one chunk too long", "student"),
    ("student/kv_cache.py", "return len(self.visible) * self.grid[0]", "return self.seen * self.grid[0]", "absolute positions", "student"),
    ("student/kv_cache.py", "moved(base, index * self.grid[0])", "moved(base, index * self.grid[0] + 1)", "RoPE offset of the history", "student"),
    ("student/kv_cache.py", "        window = (*self.window, chunk)[-self.window_chunks :] if self.window_chunks else ()\n", "        window = (*self.window, chunk)[-self.window_chunks :] if self.window_chunks else ()\n        if self.window and window:\n            for (k, v), (new_k, new_v) in zip(self.window[0], chunk, strict=True):\n                k.data.copy_(new_k), v.data.copy_(new_v)\n            window = (*self.window[1:], self.window[0])\n", "rolling buffer written in place", "student"),
    ("student/stream.py", "and (exit_step is None or index == exit_step)", "", "every step carries gradient", "student self_forcing"),
    ("student/stream.py", "if noise else x0", "if noise > 1 else x0", "history never noised", "student"),
    ("student/stream.py", "final_cache = remember_chunk(refiner, x0,", "final_cache = remember_chunk(refiner, draft,", "refiner remembers the draft", "student"),
    ("student/stream.py", "draft_cache = remember_chunk(backbone, draft, told, draft_cache, config.history_noise, generator)", "draft_cache = remember_chunk(backbone, draft, told, draft_cache, 0.0, generator)", "backbone streams under clean history", "student"),
    ("recipes/dmd.py", "return (fake - real)", "return (real - fake)", "sign of the DMD gradient", "recipes"),
    ("recipes/dmd.py", ".square().mean() / 2", ".square().mean()", "DMD twice as strong", "recipes"),
    ("recipes/dmd.py", "fake = x0_from_v(xt, critic(", "fake = x0_from_v(xt, teacher(", "teacher in the place of the critic", "recipes"),
    ("recipes/dmd.py", "if x0.shape[1] % roles.stream.chunk_frames == 0 else x0.shape[1]", "* 0 + x0.shape[1]", "normalizer over the whole clip", "recipes"),
    ("recipes/dmd.py", "with torch.no_grad():\n        gradient = dmd_gradient(roll.x0.detach()", "with torch.enable_grad():\n        gradient = dmd_gradient(roll.x0", "gradient through teacher and critic", "recipes"),
    ("recipes/flow_matching.py", "x0 = roll.x0.detach()", "x0 = roll.x0", "critic's loss reaches the student", "recipes"),
    ("recipes/flow_matching.py", "text=both | (u[0] < cfg.drop_text)", "text=both", "text never dropped alone", "recipes"),
    ("distill/rollout.py", "xt = states[rows, choice, frames]", "xt = states[rows, choice * 0, frames]", "state and time of different steps", "recipes"),
    ("distill/rollout.py", "x0_from_v(xt, v, t), batch.cond, target=x0", "x0_from_v(xt, v, t), batch.cond, target=x0 * 0", "wrong target", "recipes"),
    ("recipes/identity_drift.py", "chunks[:, :1].detach() - chunks", "chunks[:, :1] - chunks", "the first chunk is pushed away", "recipes"),
    ("recipes/identity_drift.py", "(embedder.natural - chunks).relu()", "(embedder.natural - chunks)", "likeness without end", "recipes"),
    ("recipes/identity_drift.py", "hidden = ~mask[:, None]", "hidden = mask[:, None] & ~mask[:, None]", "absent references count", "recipes"),
    ("recipes/perceptual.py", "total = total + (", "total = total + 0 * (", "perceptual term is empty", "recipes"),
    ("recipes/self_forcing.py", 'roles.generator("rollout/exit", shared=True)', 'roles.generator("rollout/exit")', "exit step per rank", "self_forcing"),
    ("recipes/self_forcing.py", 'roles.generator("rollout/length", shared=True)', 'roles.generator("rollout/length")', "length per rank", "self_forcing"),
    ("recipes/self_forcing.py", "index >= plan.chunks - cfg.grad_chunks):\n            x0 = denoise_chunk(student", "index >= 0):\n            x0 = denoise_chunk(student", "all chunks carry gradient", "self_forcing"),
    ("recipes/self_forcing.py", "stream.history_noise, noise)\n        chunks.append(x0)\n    return _scored(chunks, plan)\n\n\ndef roll_refine", "0.0, noise)\n        chunks.append(x0)\n    return _scored(chunks, plan)\n\n\ndef roll_refine", "training under clean history", "self_forcing"),
    ("recipes/self_forcing.py", "range(pieces - 1, 0, -1)", "range(1, pieces)", "pieces in the wrong order", "self_forcing"),
    ("recipes/self_forcing.py", "plan.cond.frames(total - plan.clip, total)", "plan.cond.frames(0, plan.clip)", "scored with the first clip's audio", "self_forcing"),
    ("distill/contracts.py", "key = (self.key[0], *self.key[2:]) if shared", "key = self.key if shared", "nothing is shared between ranks", "self_forcing"),
    ("distill/trainer.py", "requires_grad_(role in self.trained)", "requires_grad_(True)", "gradients in the teacher", "trainer"),
    ("distill/trainer.py", "requires_grad_(role == phase.update)", "requires_grad_(True)", "gradients left in other roles", "trainer"),
    ("distill/trainer.py", "            self.ema.update(model, step)", "            pass", "EMA not applied", "trainer"),
    ("distill/trainer.py", "        self.ema.copy_to(averaged)\n", "", "samples without the average", "trainer"),
    ("distill/trainer.py", "        self.ema.load(", "        dict(", "EMA lost at resume", "trainer"),
    ("distill/trainer.py", "            checkpoint.unpack_optimizer(", "            (lambda *_: None)(", "optimizer lost at resume", "trainer"),
    ("distill/trainer.py", "        if finite:\n            for group", "        if True:\n            for group", "non-finite updates are made", "trainer"),
    ("distill/trainer.py", "bool(torch.isfinite(norm)) and ", "", "overflowing gradients are taken", "trainer"),
    ("distill/trainer.py", "loss / train.grad_accumulation", "loss", "micro steps are summed", "trainer"),
    ("distill/trainer.py", "step, micro, index)", "0, micro, index)", "the same batch at every step", "trainer"),
    ("distill/trainer.py", "spec.weight * ramp * term.value", "spec.weight * term.value", "ramp ignored", "trainer"),
    ("distill/engine.py", "if wrong:", "if len(wrong) > 10**9:", "bf16 masters are trained", "trainer"),
]  # fmt: skip


def run(folder: Path, areas: str) -> bool:
    """Do the tests of these areas pass on the copy?"""
    files = [f"tests/test_{area}.py" for area in areas.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True).returncode == 0


def main(words: list[str]) -> int:
    survivors, chosen = 0, [m for m in MUTANTS if not words or any(w in m[0] or w in m[3] for w in words)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in PACKAGES:
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        for path, old, new, about, areas in chosen:
            file = folder / path
            text = file.read_text(encoding="utf-8")
            if text.count(old) != 1:
                print(f"STALE     {path}: {about}: its piece of code is there {text.count(old)} times", flush=True)
                survivors += 1
                continue
            file.write_text(text.replace(old, new), encoding="utf-8")
            caught = not run(folder, areas)
            file.write_text(text, encoding="utf-8")
            survivors += not caught
            print(f"{'caught' if caught else 'SURVIVED':9} {path}: {about}", flush=True)
        if not run(folder, " ".join(dict.fromkeys(" ".join(m[4] for m in chosen).split()))):
            print("The tests fail without any mutant: the count below means nothing.")
            survivors += 1
    print(f"mutants: {len(chosen)}, caught: {len(chosen) - survivors}")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
