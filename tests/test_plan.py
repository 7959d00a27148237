"""`make plan` and the large recipes: built, planned, run with their dimensions shrunk; import of weights."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SMALL, small_dit
from measured import one_step, trainer_of

from distill import cli, gpu_check
from distill.batches import Clip, clip_of
from distill.config import Recipe, load
from distill.engine.config import EngineConfig
from distill.errors import ExitCode
from distill.plan import GB, make_fit, plan
from distill.standing import Setting
from distill.state import checkpoint, lineage
from teacher.dit import DiT
from teacher.weights import save_wan

LARGE = [
    path for scale in ("1.3b", "17b") for path in sorted(Path("recipes", scale).glob("*.yaml")) if path.stem != "base"
]
TRAINED = [path for path in LARGE if path.stem != "trajectories"]
ROOT = Path(__file__).resolve().parents[1]


def shrunk(path: Path) -> Recipe:
    """A recipe with other dimensions and two steps, everything else as written."""
    recipe = load(path)
    model = replace(recipe.model, dim=32, depth=2, heads=2, ffn_dim=48, channels=4, text_dim=6)
    data = replace(recipe.data, clip=Clip(recipe.data.clip.frames, 4, 4, 5))
    train = replace(recipe.train, batch_size=2, grad_accumulation=2)
    return replace(recipe, model=model, data=data, train=train)


@pytest.mark.parametrize("path", LARGE, ids=str)
def test_a_large_recipe_has_the_published_sizes(path: Path) -> None:
    recipe = load(path)
    with torch.device("meta"):
        model = DiT(recipe.model)
    counts = {name: p.numel() for name, p in model.named_parameters()}
    audio = sum(n for name, n in counts.items() if "audio_" in name)
    encoders = sum(n for name, n in counts.items() if name.startswith(("speak_embedding.", "listen_embedding.")))
    whole = sum(counts.values()) - encoders
    base, with_branches = {"1.3b": (1.4190e9, 1.6315e9), "17b": (14.2885e9, 17.4348e9)}[recipe.scale]
    assert whole - audio == pytest.approx(base, abs=5e4) and whole == pytest.approx(with_branches, rel=1e-4)
    clip = clip_of(recipe.data)
    assert clip.rows * clip.columns // 4 * recipe.student.chunk_frames == 9360
    assert clip.frames % recipe.student.chunk_frames == 0 and clip.text_length == 512


@pytest.mark.parametrize("path", TRAINED, ids=str)
def test_a_large_recipe_takes_two_steps_with_its_dimensions_shrunk(path: Path, tmp_path: Path) -> None:
    recipe = shrunk(path)
    trainer = trainer_of(recipe, tmp_path)
    before = {role: [p.clone() for p in trainer.roles.models[role].parameters()] for role in trainer.trained}
    for step in (1, 2):
        logs = one_step(trainer, step)
        assert all(torch.isfinite(torch.as_tensor(value)) for value in logs.values()) and logs["optim/skipped"] == 0
    for role, weights in before.items():
        now = trainer.roles.models[role].parameters()
        assert any(not torch.equal(old, new) for old, new in zip(weights, now, strict=True)), role


@pytest.mark.parametrize(
    "path", [path for path in TRAINED if path.parent.name == "1.3b" or "stage3" not in path.stem], ids=str
)
def test_a_large_recipe_is_planned(path: Path) -> None:
    recipe = load(path)
    result = plan(Setting(recipe, 8, EngineConfig("fsdp2")), 141 * GB)
    assert result.batch == 64 and result.micro_batch == 1 and not result.warnings
    assert result.flops > result.model_flops > 1e15 and result.seconds > 1 and result.traffic > 1e9
    assert min(result.memory.values()) >= 0 and result.total > 10 * GB


def test_the_17b_stage_3_fits_on_8x80_and_on_8x141_gb_with_reasons() -> None:
    setting = Setting(load("recipes/17b/stage3_self_forcing.yaml"), 8, EngineConfig("ddp"))
    needed = {80: ["fsdp2.yaml", "offload_frozen", "grad_chunks=1"], 141: ["fsdp2.yaml"]}
    for memory, expected in needed.items():
        assert not plan(setting, memory * GB).fits
        changes, last = make_fit(setting, memory * GB)
        assert last.fits and last.gpus == 8 and last.total < 0.95 * memory * GB
        assert [word in change.what for word, change in zip(expected, changes, strict=True)] == [True] * len(expected)
        assert all(change.why for change in changes) and changes[-1].after == last.total
        assert last.memory["KV cache"] > 40 * GB, "what FSDP does not shard"


def test_plan_speaks_json_and_warns_of_a_batch_that_cannot_be_split(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "--recipe", "recipes/tiny/stage2_dmd.yaml", "--gpus", "3", "--gpu-mem", "24"]
    assert cli.main([*asked, "--json"]) == ExitCode.DONE
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] and told["gpus"] == 3 and told["batch"] == 8 and "cannot be split over 3" in told["warnings"][0]
    assert told["total"] == pytest.approx(sum(told["memory"].values()))
    assert cli.main([*asked]) == ExitCode.DONE
    text = capsys.readouterr().out
    assert "EFFECTIVE BATCH 8 clips" in text and "usable: fits" in text and "WARNING" in text
    assert cli.main(["plan", "--recipe", "recipes/tiny/trajectories.yaml"]) == ExitCode.USAGE
    assert cli.main([*asked[:-1], "much"]) == ExitCode.USAGE and "GPU_MEM=much" in capsys.readouterr().err


# ---- import -----------------------------------------------------------------------------------------------


def test_imported_weights_are_the_teacher_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill.roles import find_teacher, network
    from teacher.weights import load_wan

    model = small_dit(1, torch.float32, mels=32, references=("global", "expression", "expression"))
    save_wan(model, tmp_path / "wan", audio=False)
    sizes = {**SMALL, "mels": 32, "references": ["global", "expression", "expression"]}
    (tmp_path / "base.yaml").write_text(f"scale: 1.3b\nmodel: {json.dumps(sizes)}\n")
    monkeypatch.chdir(tmp_path)
    asked = ["import-wan", "--recipe", "base.yaml", "--weights", "wan"]
    assert cli.main(asked) == ExitCode.DONE
    recipe = load("base.yaml", ("name=x", "stage=stage1", "parent=teacher"))
    manifest = find_teacher(recipe, Path("runs/1.3b"))
    assert manifest.step == 0 and checkpoint.verify(manifest.path) is None
    assert lineage.tree(manifest.path).startswith("teacher 1.3b step 0")
    imported = network(recipe.model, manifest, "ema")
    reference, report = load_wan("wan", recipe.model)
    for name, parameter in imported.named_parameters():
        if name in report.loaded:
            assert torch.equal(parameter, reference.get_parameter(name)), name
        else:
            ours, theirs = parameter.std(), reference.get_parameter(name).std()
            assert (ours == theirs == 0) if ".audio_o." in name else 0.5 < ours / theirs < 2, name
    assert cli.main(asked) == ExitCode.USAGE  # never written over
    assert cli.main(["import-wan", "--scale", "17b", "--weights", "wan"]) == ExitCode.USAGE


# ---- without the data libraries ---------------------------------------------------------------------------

BLOCK = """
import importlib.util, sys
BLOCKED = {"datasets", "av", "PIL", "torchmetrics", "tensorboard", "pyarrow", "pandas", "piper", "espeakng_loader",
           "transformers", "diffusers", "pytest"}
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in BLOCKED else real(name, *rest)
class Hook:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Hook())
import torch
from dataclasses import replace
from distill import gpu_check
from distill.batches import Clip
recipe = gpu_check.at_width("stage3_self_forcing", 256)
small = replace(recipe.model, dim=32, depth=2, heads=2, ffn_dim=48, channels=4, text_dim=6)
recipe = replace(recipe, model=small, data=replace(recipe.data, clip=Clip(18, 4, 4, 5)))
seconds, _ = gpu_check.train(recipe, "cpu", steps=1)
assert seconds > 0
from distill.cli import main
sys.exit(main(["gpu-check"]))
"""


def test_gpu_check_starts_and_trains_without_the_libraries_of_the_data() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCK], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    if not torch.cuda.is_available():
        assert "there is no GPU here" in done.stdout


def test_attention_back_ends_are_compared_with_gradients() -> None:
    (torch_row, flash_row) = gpu_check.attention_rows("cpu")
    assert torch_row[1] == "OK" and flash_row[1] in ("OK", "skipped")
