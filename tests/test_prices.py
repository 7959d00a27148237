"""What recipes cost: the record that `make recipes` shows, and where its numbers come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill import prices
from distill.config import load, to_yaml
from distill.engine.config import EngineConfig
from distill.listing import recipes
from distill.options import Options
from distill.plan import GB, plan
from distill.standing import Setting

GPU_RECIPES = sorted(path for scale in ("1.3b", "17b") for path in Path("recipes", scale).glob("stage*.yaml"))


@pytest.mark.parametrize("path", GPU_RECIPES, ids=str)
def test_the_price_on_record_is_that_of_the_recipe_as_it_stands(path: Path):
    kept = prices.known()[str(path)]
    assert kept.recipe == prices.digest(path), "run make recipes PLAN=1"
    assert kept.gigabytes < kept.gpu_memory and not kept.tested


def test_the_smallest_offer_that_holds_the_recipe_is_taken():
    path = Path("recipes/1.3b/stage1_ode.yaml")
    found, kept = prices.price(load(path), prices.digest(path)), prices.known()[str(path)]
    assert found == kept
    smaller = [offer for offer in prices.OFFERS if offer < (found.gpus, found.gpu_memory)]
    assert smaller  # or this test compares nothing
    for gpus, memory in smaller:
        setting = Setting(load(path), gpus, EngineConfig(kind="plain" if gpus == 1 else "fsdp2"))
        assert not plan(setting, memory * GB).fits


def test_hours_on_a_cpu_are_those_of_the_fastest_whole_run_of_just_this_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(prices, "RUNS", tmp_path)
    path = Path("recipes/tiny/stage1_ode.yaml")
    recipe = load(path)
    steps = recipe.train.steps
    cells = (
        ("whole", steps, 0.5, ()),
        ("grid/whole-seed1", steps, 0.4, ("seed=1",)),
        ("beside_others", steps, 0.9, ()),
        ("stopped", steps - 1, 0.1, ()),
        ("changed", steps, 0.1, ("optimizer.lr=1e-5",)),
    )
    for run, last, pace, changes in cells:
        folder = tmp_path / run / "stage1"
        folder.mkdir(parents=True)
        (folder / prices.RESOLVED).write_text(to_yaml(load(path, changes)))
        records = [
            {"step": 0, "health/sync": 1.0},
            {"step": 10, "perf/step_s": pace},
            {"step": last, "perf/step_s": pace},
        ]
        (folder / "metrics.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    assert prices._measured(recipe) == pytest.approx(0.4 * steps / 3600, abs=1e-3)
    assert prices._measured(load(path, ("train.steps=9999",))) is None


def test_a_price_of_another_version_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = "recipes/1.3b/stage1_ode.yaml"
    record = json.loads(prices.FILE.read_text())
    record[path]["recipe"] = "0" * 16
    monkeypatch.setattr(prices, "FILE", tmp_path / "costs.json")
    prices.FILE.write_text(json.dumps(record))
    lines = {line.split()[0]: line.split() for line in recipes(Options()).splitlines()}
    assert lines[path][3:6] == ["-", "-", "-"]
    assert lines["recipes/1.3b/stage2_dmd.yaml"][3:5] == ["8x80", "GB"]
