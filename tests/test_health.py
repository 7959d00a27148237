"""The verdict, the bands and the gates: what they say, and that they say nothing of what is healthy or unknown."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from collapses import Silent
from conftest import batch_of, conditions, latents, small_roles
from shrunk import BANDED, KEPT, STEPS, shrunk, trainer_of
from test_trainer import RECIPE, FakeSource, make

from distill import bands, config, gates, trainer
from distill.contracts import Roll
from distill.data.batch import Batch
from distill.data.prepare import code_version
from distill.data.version import made_by
from distill.errors import ExitCode, UserError
from distill.gates import GateConfig
from distill.health import LIMITS, HealthConfig, judge
from distill.monitor import Monitor, muted
from distill.reference import Band, Origin, Reference, as_json, band_of, find, measured, read, settings
from distill.samples import one_step_error
from distill.state import checkpoint, lineage
from distill.trainer import Source
from evaluation.quality import color_drift, color_shift, contrast_ratio
from student.causal_dit import StreamConfig
from teacher.codec import PCACodec
from teacher.conditions import SILENCE

PLAIN = HealthConfig()
# Small random networks are far from healthy: of their signals only the pictures are judged here.
FAR = ", ".join(f"{name}: [90, 99]" for name in ("gap", "gradient", "update", "rise", "level", "clipped"))
CALM = f"health: {{stop: collapse, spread: [-9, -9], {FAR}}}\n"


# ---- the verdict ------------------------------------------------------------------------------------------


def test_the_three_words_of_the_verdict() -> None:
    assert str(judge({}, PLAIN, 1)) == str(judge({"health/contrast": 0.95}, PLAIN, 1)) == "healthy"
    assert str(judge({"health/motion_of_teacher": 0.21}, PLAIN, 1)) == "watch: motion 0.21 of teacher"
    stopped = judge({"health/contrast": 0.1, "health/motion_of_teacher": 0.21}, PLAIN, 1)
    assert str(stopped) == "STOP: collapsed (solid color)" and stopped.level == 2


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.tag + limit.field)
def test_every_limit_is_silent_at_its_ideal_watches_and_stops(limit) -> None:
    watch, stop = getattr(PLAIN, limit.field)
    levels = [judge({limit.tag: value}, PLAIN, 1).level for value in (limit.ideal, watch, stop)]
    assert levels == [0, 1, 2]
    assert judge({limit.tag: math.nan}, PLAIN, 1).level == 0
    collapse = judge({limit.tag: stop}, PLAIN, 1)
    assert collapse.stops("any") and collapse.stops("collapse") == limit.picture and not collapse.stops("never")


def test_pictures_of_a_network_from_nothing_are_not_judged_before_after() -> None:
    late = HealthConfig(after=10)
    assert judge({"health/contrast": 0.1}, late, 9).level == 0 and judge({"health/contrast": 0.1}, late, 10).level == 2
    assert judge({"health/muted": 1.0}, late, 1).level == 2  # what it hears can be judged at once


def test_limits_that_lie_on_both_sides_of_the_ideal_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE + "health: {motion: [0.5, 0.7]}\n")
    with pytest.raises(UserError, match="one side of the ideal"):
        config.load(path)
    path.write_text(RECIPE + "health: {motoin: [0.5, 0.1]}\n")
    with pytest.raises(UserError, match="did you mean 'motion'"):
        config.load(path)


# ---- signals ----------------------------------------------------------------------------------------------


def spoken(audio: float | None = None) -> Batch:
    """Four clips that speak; with `audio`, all that is heard is this value."""
    batch = batch_of(conditions(2, 4), latents(2, 4))
    batch = replace(batch, state=torch.ones(4, 8, dtype=torch.uint8))
    if audio is not None:
        heard = {name: torch.full_like(getattr(batch.cond, name), audio) for name in ("speak", "listen")}
        batch = replace(batch, cond=replace(batch.cond, **heard))
    return batch


def test_silent_audio_counts_where_the_state_says_that_somebody_speaks() -> None:
    assert muted(spoken()) == 0 and muted(spoken(SILENCE)) == 1
    assert muted(replace(spoken(SILENCE), state=torch.zeros(4, 8))) == 0  # nobody speaks, nothing is missing
    half = spoken()
    half.cond.speak[:2] = SILENCE
    assert muted(half) == 0.5


def monitor(text: str = RECIPE) -> Monitor:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r.yaml"
        path.write_text(text)
        return Monitor(config.load(path), "student", Reference())


def test_samples_of_one_color_have_no_spread_and_good_ones_have_the_datas() -> None:
    watcher, batch = monitor(), spoken()
    solid = torch.full_like(batch.latents, 0.3)
    seen = watcher.signals(batch, Roll(solid, batch.cond), "student")
    assert seen["health/spread"] < 1e-6 and judge({k: float(v) for k, v in seen.items()}, PLAIN, 1).stops("collapse")
    good = watcher.signals(batch, Roll(batch.latents.clone(), batch.cond), "student")
    assert good["health/spread"] == 1 and good["health/level_offset"] == 0
    assert set(watcher.signals(batch, Roll(solid, batch.cond), "critic")) == {"health/muted"}


def test_a_critic_that_stands_still_and_weights_torn_apart_are_seen() -> None:
    watcher = monitor()
    watcher.counts = {"optim/update_student": 1, "optim/update_critic": 4}
    healthy = watcher.derived({"optim/update_student": 1e-3, "optim/update_critic": 1e-3}, True)
    assert healthy["health/critic_pace"] == 4 and judge(healthy, PLAIN, 4).level == 0
    still = watcher.derived({"optim/update_student": 1e-3, "optim/update_critic": 0.0}, True)
    assert str(judge(still, PLAIN, 4)) == "STOP: the critic stands still"
    assert judge(watcher.derived({"optim/update_student": 0.2}, False), PLAIN, 4).level == 2


def test_a_rising_critic_loss_is_held_against_what_it_was() -> None:
    watcher = monitor()
    levels = [judge(watcher.derived({"train/critic_flow_matching": loss}, True), PLAIN, 1).level
              for loss in (0.25, 0.15, 0.2, 0.21, 0.51, 1.3)]  # fmt: skip
    assert levels == [0, 0, 0, 0, 1, 2]


def test_a_gradient_that_the_clipping_cuts_down_again_and_again_is_seen() -> None:
    watcher = monitor()
    limit = watcher.recipe.train.clip
    say = [str(judge(watcher.derived({"optim/grad_norm_student": size * limit, "optim/grad_norm_critic": limit}, whole),
                     PLAIN, 1)) for size, whole in ((0.8, True), (9, True), (70, True), (70, False))]  # fmt: skip
    assert say == [
        "healthy",
        "watch: gradient norm 9 times train.clip",
        "STOP: gradient norm 70 times train.clip",
        "healthy",
    ]


def test_contrast_color_and_drift_of_pictures() -> None:
    data = torch.rand(2, 24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    flat = data.mean((-1, -2), keepdim=True).expand_as(data)
    assert contrast_ratio(data, data).allclose(torch.ones(2).double()) and contrast_ratio(flat, data).abs().max() < 1e-4
    exposure, chroma = color_shift(data + 0.1, data)
    torch.testing.assert_close(exposure, torch.full((2,), 0.1).double(), atol=1e-5, rtol=0)
    assert chroma.max() < 1e-5
    red = torch.tensor([0.3, -0.15, -0.15])[:, None, None]
    assert color_shift(data + red, data)[0].abs().max() < 1e-5 and color_shift(data + red, data)[1].min() > 0.2
    fading = flat * 0 + 0.5 - torch.linspace(0, 0.4, 24)[:, None, None, None]
    assert color_drift(fading).min() > 0.15 and color_drift(flat * 0 + 0.5).max() < 1e-6


# ---- the trainer ------------------------------------------------------------------------------------------


def sampler_of(values: dict[int, float]):
    """Gauges with this contrast at a step, 1 at others."""
    return lambda step, roles: ({"health/contrast": values.get(step, 1.0)}, {})


def test_a_collapse_ends_the_run_before_it_is_saved_and_the_best_checkpoint_stays(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE + CALM)
    recipe = config.load(path, ["train.steps=12", "train.save_every=2", "train.sample_every=2", "train.keep=2"])
    run = make(recipe, tmp_path / "run")
    with pytest.raises(UserError, match=r"solid color.*step_00000004") as stopped:
        run.fit(sampler_of({0: 0.85, 2: 0.9, 4: 0.99, 6: 0.9, 8: 0.9, 10: 0.1}))
    assert stopped.value.code == ExitCode.NUMERICS
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step_00000004", "step_00000006", "step_00000008"]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "step 4: healthy" in log and "step 10: STOP: collapsed (solid color)" in log
    assert run.run.facts["health"] == "STOP: collapsed (solid color)"
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {r["step"]: r["health/level"] for r in records if "health/level" in r}[10] == 2


def test_a_run_that_may_go_on_says_stop_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    final = make(config.load(path), tmp_path / "run").fit(sampler_of({8: 0.1}))
    assert final.name == "step_00000008" and lineage.read(final).metrics["health/contrast"] == 0.1


def test_updates_are_measured_relative_to_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    run = make(config.load(path), tmp_path / "run")
    before = [p.detach().clone() for p in run.roles.models["critic"].parameters()]
    logs = run.update(1, 0, run.recipe.phases[0])
    after = [p.detach() for p in run.roles.models["critic"].parameters()]
    moved = sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True))
    whole = sum(float(b.square().sum()) for b in before)
    assert float(logs["optim/update_critic"]) == pytest.approx((moved / whole) ** 0.5, rel=1e-4)


# ---- bands ------------------------------------------------------------------------------------------------


def test_a_band_holds_further_healthy_runs_and_not_others() -> None:
    def run(seed: int, factor: float = 1.0) -> dict[int, float]:
        noise = torch.randn(10, generator=torch.Generator().manual_seed(seed)).mul(0.05).exp()
        return {10 * (k + 1): factor * float(noise[k]) / (k + 1) for k in range(10)}

    band = Band(Origin("s"), 100, {"train/dmd": band_of([run(0), run(1), run(2)])})
    told = [band.outside(step, {"train/dmd": value}) for seed in range(3, 43) for step, value in run(seed).items()]
    assert sum(map(bool, told)) <= 4  # of 400; one in a thousand is expected
    assert all(band.outside(step, {"train/dmd": value}) for step, value in run(3, 2.0).items())
    assert Reference(band).compare(20, {"train/dmd": 0.5}) == "inside band"
    assert Reference(band).compare(20, {"train/dmd": 2.0}).startswith("outside band: train/dmd 2 (0.")
    assert Reference(band).compare(110, {"train/dmd": 9.0}) == ""  # beyond what was measured
    assert Reference(band).compare(20, {"train/sid": 9.0}) == ""


def test_what_all_seeds_share_is_not_expected_to_the_last_digit_of_another_cpu() -> None:
    tag = "health/identity_of_teacher"
    band = Band(Origin("s"), 0, {tag: band_of([{0: 0.961098}] * 3)})
    told = [bool(band.outside(0, {tag: value})) for value in (0.961104, 0.9605, 0.9575, 0.9650)]
    assert told == [False, False, True, True]


def test_bands_speak_only_where_nothing_that_matters_differs(tmp_path: Path) -> None:
    recipe = shrunk(next(path for path in BANDED if path.stem == "stage2_dmd"))
    own = settings(recipe.resolved)
    free = [replace(recipe, seed=5), replace(recipe, name="x"), replace(recipe, health=HealthConfig(stop="any"))]
    free.append(replace(recipe, train=replace(recipe.train, save_every=1)))
    assert all(settings(other.resolved) == own for other in free)
    bound = [replace(recipe, train=replace(recipe.train, log_every=3)), replace(recipe, phases=recipe.phases[:1])]
    assert all(settings(other.resolved) != own for other in bound)
    band = Band(Origin(own, "data", "teacher", "parent"), 4, {"train/dmd": {4: (1.0, 0.5, 2.0)}}, {"seeds": [0, 1]})
    (tmp_path / "b.json").write_text(as_json([band]))
    assert read(tmp_path / "b.json") == [band] and find(tmp_path, band.origin).band == band
    for what in ("data", "teacher", "parent"):
        found = find(tmp_path, replace(band.origin, **{what: "other"}))
        assert found.band is None and f"another {what}" in found.why
    assert "no band" in find(tmp_path, replace(band.origin, settings="x")).why


@pytest.mark.parametrize("path", BANDED, ids=lambda path: path.stem)
def test_the_first_steps_of_every_tiny_recipe_lie_inside_its_band(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With small networks on random clips: a change of its rollout, losses or optimizers beyond the seeds' spread fails
    here; where it was meant, `python tests/shrunk.py` measures again."""
    monkeypatch.setattr(trainer, "bands_of", lambda recipe: KEPT.parent)
    with pytest.raises(UserError):
        trainer_of(shrunk(path), tmp_path).fit(until=STEPS)
    told = [line for line in (tmp_path / "log.txt").read_text().splitlines() if "band" in line]
    assert len(told) == STEPS // 2 and all("inside band" in line for line in told), told


def test_a_loss_that_is_not_what_it_was_leaves_its_band(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = next(path for path in BANDED if path.stem == "stage2_dmd")
    monkeypatch.setattr(trainer, "bands_of", lambda recipe: KEPT.parent)
    run = trainer_of(shrunk(path), tmp_path)
    term = run.terms["flow_matching"]
    run.terms["flow_matching"] = lambda *given: replace(term(*given), value=4 * term(*given).value)
    with pytest.raises(UserError):
        run.fit(until=STEPS)
    assert "outside band: " in (tmp_path / "log.txt").read_text()


def test_one_step_takes_of_a_clip_what_a_stream_has_in_sight() -> None:
    roles = small_roles(StreamConfig(1, sink_chunks=0, window_chunks=1))  # two of four chunks
    batch = batch_of(conditions(4), latents(4).float())
    batch.latents[:, 0] *= 3
    found = one_step_error(roles, batch) * batch.latents.std().item()
    later = batch_of(batch.cond, torch.cat([batch.latents[:, :2], torch.zeros_like(batch.latents[:, 2:])], 1))
    assert one_step_error(roles, later) * later.latents.std().item() == pytest.approx(found, rel=1e-6)
    other = batch_of(batch.cond, batch.latents.flip(1))
    assert one_step_error(roles, other) * other.latents.std().item() != pytest.approx(found, rel=1e-3)


def test_the_kept_bands_belong_to_recipes_and_data_as_they_are_on_any_machine() -> None:
    known, data = set(), set()
    for path in BANDED:
        for variant in (None, *config.VARIANTS):
            recipe = config.load(path, (), variant)
            known.add(settings(recipe.resolved))
            codec = PCACodec.load(recipe.data.prepare.codec).fingerprint()
            inputs = {"config": asdict(recipe.data.prepare), "code": code_version(), "codec": codec}
            data |= {made_by({"inputs": {**inputs, "speech": heard}}) for heard in ("of one CPU", "of another")}
    assert len(data) == 1
    for path in sorted(Path("recipes/tiny/bands").glob("*.json")):
        for band in read(path):
            assert band.origin.settings in known, f"{path}: the recipe has changed, measure again with make bands"
            assert band.origin.data in data, f"{path}: the data has changed, measure again with make bands"
            assert len(band.about["seeds"]) >= 3 and band.curves


@pytest.mark.parametrize("path", BANDED, ids=lambda path: path.stem)
def test_every_tiny_recipe_that_trains_has_a_band_of_its_full_size(path: Path) -> None:
    kept = Path("recipes/tiny/bands", f"{path.stem}.json")
    own = settings(config.load(path).resolved)
    assert own in [band.origin.settings for band in read(kept)], f"make bands RECIPE={path}"


def test_the_command_writes_a_band_of_its_seeds_and_keeps_other_variants(tmp_path: Path) -> None:
    runs = []
    for seed in range(2):
        runs.append(tmp_path / f"{seed}.jsonl")
        lines = [{"step": step, "train/dmd": 1.0 + 0.1 * seed, "perf/step_s": 3.0} for step in (2, 4, 6)]
        runs[-1].write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = (measured(Origin(name), runs, 4, {"seeds": [0, 1], "variant": name}) for name in ("a", "b"))
    assert list(first.curves) == ["train/dmd"] and list(first.curves["train/dmd"]) == [2, 4]
    for band in (first, second, first):
        bands.write(tmp_path / "bands" / "x.json", band)
    assert [band.origin.settings for band in read(tmp_path / "bands" / "x.json")] == ["b", "a"]
    changed = measured(Origin("c"), runs, 4, {"seeds": [0, 1], "variant": "b"})  # the recipe says something else now
    bands.write(tmp_path / "bands" / "x.json", changed)
    assert [band.origin.settings for band in read(tmp_path / "bands" / "x.json")] == ["a", "c"]
    other = measured(Origin("d"), runs, 4, {"seeds": [0, 1], "variant": "b", "set": ["train.batch_size=2"]})
    bands.write(tmp_path / "bands" / "x.json", other)
    assert [band.origin.settings for band in read(tmp_path / "bands" / "x.json")] == ["a", "c", "d"]


# ---- gates ------------------------------------------------------------------------------------------------


def parent(**metrics: float) -> lineage.Manifest:
    values = {f"health/{name}": value for name, value in metrics.items()}
    return lineage.Manifest(Path("runs/a/stage1"), "h", {"stage": "stage1", "metrics": values})


def test_a_stage_refuses_a_parent_that_fails_its_gate_unless_forced(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = SimpleNamespace(stage="stage2", gate=GateConfig(seam=1.3, motion=0.6))
    assert gates.check(recipe, parent(seam=1.1, motion_of_teacher=0.8), "") == ""
    assert "passed" in capsys.readouterr().out
    for bad in (parent(seam=1.4, motion_of_teacher=0.8), parent(seam=1.1, motion_of_teacher=0.5), parent(seam=1.1)):
        with pytest.raises(UserError, match="does not pass the gate of stage2") as refused:
            gates.check(recipe, bad, "")
        assert refused.value.code == ExitCode.CHECKPOINT and refused.value.message.count(". ") == 0
        assert gates.check(recipe, bad, "a test").startswith("a test (")
    off = SimpleNamespace(stage="stage2", gate=GateConfig(check=False, seam=1.3))
    assert gates.check(off, parent(seam=1.4), "") == ""
    assert "gate of stage1: off in this variant; health/seam must be at most 1.3 and is 1.4" in capsys.readouterr().out


def test_the_reason_stands_in_the_manifest_and_in_the_family_tree(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    run = make(config.load(path), tmp_path / "run")
    run.notes = {"teacher": "t", "forced": "I know (health/seam ...)"}
    final = run.fit()
    assert lineage.read(final).data["forced"].startswith("I know") and "(forced: I know" in lineage.tree(final)
    assert checkpoint.verify(final) is None


@pytest.mark.parametrize("path", BANDED, ids=lambda path: path.stem)
def test_short_variants_switch_the_gate_off_in_the_recipe(path: Path) -> None:
    whole = config.load(path)
    assert (whole.gate is not None) == (whole.stage in ("stage2", "stage3", "stage4"))
    for variant in config.VARIANTS:
        gate = config.load(path, (), variant).gate
        assert gate is None or not gate.check


def test_the_state_of_the_monitor_survives_json() -> None:
    one, other = monitor(), monitor()
    one.gauges(4, {"health/contrast": 0.9, "health/sync": math.nan})
    one.derived({"train/critic_flow_matching": 0.5}, True)
    assert one.keep(4) == 4
    other.load(json.loads(json.dumps(one.state())))
    assert other.state() == one.state() and other.best == one.best and other.measured == {"health/contrast": 0.9}
    assert FakeSource.fingerprint == "none"


def test_a_source_whose_audio_is_lost_is_the_same_in_all_else() -> None:
    """tests/collapses.py trains on it, outside of what runs here."""
    whole, lost = FakeSource(), Silent(FakeSource())
    assert [getattr(lost, name) for name in Source.__annotations__] == ["none", "none"]
    told, heard = (source.sample(2, torch.Generator().manual_seed(0)) for source in (whole, lost))
    assert (heard.cond.speak == SILENCE).all() and (heard.cond.listen == SILENCE).all()
    assert not (told.cond.speak == SILENCE).all()
    assert torch.equal(heard.latents, told.latents) and torch.equal(heard.cond.refs, told.cond.refs)
