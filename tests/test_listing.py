"""What the looking commands print: recipes checked, runs listed, checkpoints compared."""

import json
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from distill import cli, config
from distill.errors import ExitCode
from distill.state.checkpoint import file_hash

ROOT = Path(__file__).resolve().parents[1]
RECIPES = [path for path in (ROOT / "recipes").rglob("*.yaml") if "stage:" in path.read_text()]  # the rest are bases
SHIPPED = sorted(path.relative_to(ROOT) for path in RECIPES)
RECIPE = "name: r\nscale: tiny\nstage: stage1\nrollout: {kind: data}\ntrain: {steps: 3, batch_size: 4, %s}\n"
PHASES = "phases:\n  - {update: student, terms: {ode_regression: {weight: 2.0}}}\noptimizer: {lr: 1.0e-4}\n"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_valid_recipe_tells_what_it_will_do(capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.yaml").write_text(RECIPE % "grad_accumulation: 2" + PHASES)
    assert cli.main(["validate", "--recipe", "r.yaml"]) == ExitCode.DONE
    told = capsys.readouterr().out
    assert "3 steps of 8 clips" in told and "student every 1: 2 ode_regression, lr 0.0001" in told


def test_every_problem_of_a_recipe_is_told_at_once_also_those_of_its_variants(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("r.yaml").write_text(RECIPE % "clipp: 1.0" + PHASES + "quick: {train: {stepz: 1}}\n")
    assert cli.main(["validate", "--recipe", "r.yaml"]) == ExitCode.USAGE
    told = capsys.readouterr().err
    assert "r.yaml:5" in told and "clip" in told and "r.yaml:9" in told and "steps" in told
    assert len(told.splitlines()) == 2


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_in_every_variant_and_of_the_scale_and_stage_its_place_says(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert cli.main(["validate", "--recipe", str(path)]) == ExitCode.DONE
    for variant in (None, *config.VARIANTS):
        recipe = config.load(path, (), variant)
        assert (recipe.scale, recipe.stage) == (path.parts[1], path.stem.partition("_")[0])
        assert recipe.model.channels == (32 if recipe.scale == "tiny" else 16)  # the codec of the scale


def test_runs_are_listed_with_status_step_and_scores(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs"]) == ExitCode.DONE and "no runs yet" in capsys.readouterr().out
    for stage, status, age in (("stage1", "done", 0), ("stage2", "running", 5), ("stage3", "running", 600)):
        folder = Path("runs/a") / stage
        folder.mkdir(parents=True)
        facts = {"status": status, "step": 7, "heartbeat": time.time() - age}
        (folder / "STATUS.json").write_text(json.dumps(facts))
    Path("runs/a/report").mkdir()
    scores = {"online_lpm": {"sync_corr": {"mean": 0.9, "se": 0.1}, "seam_ratio": {"mean": None, "se": None}}}
    Path("runs/a/report/scores.json").write_text(json.dumps(scores))
    assert cli.main(["runs"]) == ExitCode.DONE
    told = capsys.readouterr().out
    assert "stage1 done at 7, stage2 running at 7, stage3 dead for 10 min at 7" in told
    assert "online_lpm: sync 0.900\n" in told


def test_diff_names_what_differs_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    for name, rate in (("a", 1e-4), ("b", 2e-4)):
        Path(name).mkdir()
        recipe = {"optimizer": {"lr": rate}, "phases": [{"update": "student"}], "seed": 0}
        metrics = {"health/sync": 0.91234567 + rate, "health/text": 0.5 + 1e-9 * rate}
        manifest = {"stage": "stage1", "step": 5, "recipe": recipe, "files": [{"sha256": name}], "metrics": metrics}
        manifest |= {"environment": {"host": name}}
        (Path(name) / "manifest.json").write_text(json.dumps(manifest))
    assert cli.main(["diff", "--a", "a", "--b", "b"]) == ExitCode.DONE
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in lines[1:]] == [  # causes before what came of them
        "recipe.optimizer.lr: 0.0001 -> 0.0002",
        "environment.host: a -> b",
        "metrics.health/sync: 0.9124 -> 0.9125",
        f"metrics.health/text: {0.5 + 1e-13} -> {0.5 + 2e-13}",
    ]
    assert cli.main(["diff", "--a", "a", "--b", "a"]) == ExitCode.DONE
    assert "nothing differs" in capsys.readouterr().out
    assert cli.main(["diff", "--a", "a"]) == ExitCode.USAGE and "A=path B=path" in capsys.readouterr().err


def test_the_family_tree_is_a_picture_too_eldest_first_and_a_lost_parent_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def put(folder: str, stage: str, parent: dict[str, str] | None) -> dict[str, str]:
        path = Path(folder) / "manifest.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"stage": stage, "scale": "tiny", "step": 5, "parent": parent, "files": []}))
        return {"path": folder, "manifest_sha256": file_hash(path)}

    lost = {"path": "gone/teacher", "manifest_sha256": "0" * 64}
    child = put("runs/a/stage2", "stage2", put("runs/a/stage1", "stage1", lost))
    assert cli.main(["lineage", "--run", "a"]) == ExitCode.DONE
    told = capsys.readouterr().out
    assert "Wrote runs/a/lineage.svg." in told and told.index("stage2 tiny") < told.index("stage1 tiny")
    picture = ElementTree.parse("runs/a/lineage.svg")
    words = [text.text or "" for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert words[::2] == ["teacher", "stage1", "stage2"]
    assert "gone" in words[1] and child["manifest_sha256"][:8] in words[5]
    assert cli.main(["lineage", "--parent", "runs/a/stage1", "--out", "deep/tree.svg"]) == ExitCode.DONE
    assert "stage2" not in Path("deep/tree.svg").read_text()


def test_a_grid_is_listed_with_its_cells_and_validated_as_a_grid(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [{"cell": "a", "seed": "0", "state": "done", "reason": ""}]
    cells += [{"cell": "b", "seed": "0", "state": "failed", "reason": "The reason."}]
    Path("runs/g/a-seed0/stage1").mkdir(parents=True)
    Path("runs/g/a-seed0/stage1/STATUS.json").write_text('{"status": "done", "step": 3}')
    Path("runs/g/GRID.json").write_text(json.dumps({"cells": cells, "baseline": "a"}))
    assert cli.main(["runs"]) == ExitCode.DONE
    told = capsys.readouterr().out
    assert "grid, 1 of 2 cells done" in told and "stage1 done at 3" in told and "failed: The reason." in told
    Path("g.yaml").write_text("name: g\nstages: [stage1]\ncellz: []\n")
    assert cli.main(["validate", "--recipe", "g.yaml"]) == ExitCode.USAGE
    assert "cellz: unknown key, did you mean 'cells'?" in capsys.readouterr().err
