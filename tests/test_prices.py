"""What recipes cost: the record that `make recipes` shows, and where its numbers come from."""

from __future__ import annotations

import json
import shutil
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


ODE = Path("recipes/tiny/stage1_ode.yaml")
STEPS = load(ODE).train.steps


def trained(run: str, last: int, pace: float, changes: tuple[str, ...] = (), threads: int = 2) -> None:
    """A stage 1 of two cores in runs/, as far as its price looks at it."""
    folder = prices.RUNS / run / "stage1"
    folder.mkdir(parents=True)
    (folder / prices.RESOLVED).write_text(to_yaml(load(ODE, changes)))
    (folder / "env.json").write_text(json.dumps({"cores": 2, "threads": threads}))
    records = [
        {"step": 0, "health/sync": 1.0},
        {"step": 10, "perf/step_s": pace},
        {"step": last, "perf/step_s": pace},
    ]
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(record) for record in records))


def test_hours_on_a_cpu_are_those_of_the_fastest_whole_run_of_just_this_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(prices, "RUNS", tmp_path)
    trained("stopped", STEPS - 1, 0.1)
    trained("changed", STEPS, 0.1, ("optimizer.lr=1e-5",))
    assert prices._measured(load(ODE)) == (None, False)
    trained("one_thread", STEPS, 0.3, threads=1)
    trained("another_thread", STEPS, 0.35, threads=1)
    assert prices._measured(load(ODE)) == (pytest.approx(0.3 * STEPS / 3600, abs=1e-3), False)
    trained("whole", STEPS, 0.5)
    trained("grid/whole-seed1", STEPS, 0.4, ("seed=1", "health.after=7"))
    trained("beside_others", STEPS, 0.9)
    assert prices._measured(load(ODE)) == (pytest.approx(0.4 * STEPS / 3600, abs=1e-3), True)
    assert prices._measured(load(ODE, ("train.steps=9999",))) == (None, False)


def test_hours_on_record_outlive_the_runs_that_they_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prices, "FILE", tmp_path / "costs.json")
    monkeypatch.setattr(prices, "RUNS", tmp_path / "runs")
    trained("whole", STEPS, 0.5)
    prices.renew([ODE])
    first = prices.known()[str(ODE)]
    monkeypatch.setattr(prices, "RUNS", tmp_path / "none")
    prices.renew([ODE])
    assert prices.known()[str(ODE)] == first and first.tested and first.hours
    trained("one_thread", STEPS, 0.1, threads=1)  # an estimate does not take the place of what was tested
    prices.renew([ODE])
    assert prices.known()[str(ODE)] == first
    shutil.rmtree(prices.RUNS)
    record = json.loads(prices.FILE.read_text())
    record[str(ODE)]["recipe"] = "0" * 16  # of another version of the recipe
    prices.FILE.write_text(json.dumps(record))
    prices.renew([ODE])
    assert prices.known()[str(ODE)].hours is None


def test_a_price_of_another_version_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = "recipes/1.3b/stage1_ode.yaml"
    record = json.loads(prices.FILE.read_text())
    record[path]["recipe"] = "0" * 16
    monkeypatch.setattr(prices, "FILE", tmp_path / "costs.json")
    prices.FILE.write_text(json.dumps(record))
    lines = {line.split()[0]: line.split() for line in recipes(Options()).splitlines()}
    assert lines[path][3:6] == ["-", "-", "-"]
    assert lines["recipes/1.3b/stage2_dmd.yaml"][3:5] == ["8x80", "GB"]
