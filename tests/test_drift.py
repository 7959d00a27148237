"""The long measurement: audio that returns to the sample, windows cut from streams, controls that behave, the page."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import SIDE, small_codec
from small_online import small_model, tone
from torch import Tensor

from distill import drift as command
from distill import drift_rows
from distill.config import default_recipe, load
from distill.data import motion, puppet, recurrent, speech
from distill.data.batch import Batch
from distill.data.recurrent import Plan, lay_out, people, recurrent_case
from distill.data.speech import Utterance
from distill.data.timeline import LISTEN, SPEAK
from distill.drift import Subject, injected_distance, layout_of
from distill.drift_keep import Keeper
from distill.drift_rows import Source, controls, moved, streamed
from distill.errors import UserError
from distill.options import Options
from evaluation import aging
from evaluation.arms import Arm
from evaluation.arms_charts import LONG, long_lines
from evaluation.drift_page import drawn, page, table
from evaluation.drift_report import row_facts, shuffled_row
from evaluation.geometry import measure
from evaluation.identity import stills_identity
from evaluation.judge import Judge, face_distance, prototype_loss
from evaluation.recurrence import Layout, Measured, Truth, copy_distance, liveliness, motion_curves, unasked_curve
from evaluation.windows import TRACKS, Anchor, Windows, border_changes
from student.stream import stream
from teacher.audio import log_mel
from teacher.conditions import AUDIO_PER_LATENT, PAST, Conditions, encode_text
from teacher.randomness import keyed_generator

PLAN = Plan(minutes=0.5, silence=1.0, speak=1.5, listen=1.0, filler=2.0, seed=7)  # 4 returns in 30 seconds


def said() -> list[Utterance]:
    return [
        Utterance(tone(20_000, seed=i), "noise", role, "test", "") for i in range(4) for role in ("speak", "listen")
    ]


@dataclass(frozen=True)
class Data:
    """Three characters of 32 pixels, as a split of prepared data."""

    folder: Path
    size: int = 32
    split: str = "test"
    fingerprint: str = "noise"

    @property
    def characters(self) -> Tensor:
        return puppet.sample_identities(3, 0, "test-drift")

    def codec(self):
        return small_codec()

    def all(self) -> Batch:
        stills = puppet.render(self.characters, torch.zeros(3, 2, len(puppet.MOTION)), self.size).float() / 255
        refs = self.codec().float().encode_image(stills.flatten(0, 1)).unflatten(0, (3, 2))
        text, mask = encode_text(["a calm person"] * 3, dim=6)
        heard = torch.zeros(3, AUDIO_PER_LATENT * (PAST + 1), 32)
        cond = Conditions(heard, heard, text, mask, refs, torch.tensor([[True, True], [True, False], [True, True]]))
        nothing, rows = torch.zeros(3, 1), torch.arange(3)
        return Batch(None, cond, nothing, nothing, nothing, nothing, torch.zeros(3, 3).long(), rows, rows)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Data:
    monkeypatch.setattr(speech, "corpus", lambda cache: said())
    monkeypatch.setattr(recurrent, "encode_text", lambda captions: encode_text(captions, dim=6))
    monkeypatch.setattr(Data, "codec", lambda self: small_codec().float())
    return Data(tmp_path / "data")


def utterances() -> dict[int, list[Utterance]]:
    return {state: [u for u in said() if u.role == role] for state, role in ((SPEAK, "speak"), (LISTEN, "listen"))}


# audio


def test_measured_windows_hear_the_same_at_every_return():
    speak, listen, state = lay_out(utterances(), PLAN, 0)
    assert len(state) == PLAN.frames and PLAN.returns == 4
    for wave in (speak, listen):
        heard = log_mel(wave)
        windows = [heard[2 * start : 2 * stop + AUDIO_PER_LATENT * PAST] for start, stop in PLAN.spans()]
        first = windows[: len(PLAN.parts())]
        for index, window in enumerate(windows):
            assert torch.equal(window, first[index % len(first)])
        assert heard.std() > 0


def test_between_the_returns_something_else_is_said_and_every_character_has_its_own():
    speak, _, _ = lay_out(utterances(), PLAN, 0)
    other, _, _ = lay_out(utterances(), PLAN, 1)
    second = PLAN.period * 2000 // 3
    block = PLAN.block * 2000 // 3
    past = 24_000
    assert torch.equal(speak[past : past + block], speak[past + second : past + second + block])
    assert not torch.equal(speak[past + block : past + second], speak[past + second + block : past + 2 * second])
    assert not torch.equal(speak, other)


def test_a_plan_without_two_returns_is_refused():
    with pytest.raises(ValueError, match="two returns"):
        Plan(minutes=0.3)
    with pytest.raises(ValueError, match="half a second"):
        Plan(speak=5.3)


def test_more_characters_than_there_are_are_refused(data: Data):
    with pytest.raises(UserError, match="CHARACTERS"):
        people(data, 4)


@pytest.mark.parametrize(("minutes", "characters"), [("ten", ""), ("0.2", ""), ("10.3", ""), ("", "1"), ("", "2.5")])
def test_sizes_that_make_no_sense_are_refused_in_a_sentence(minutes: str, characters: str):
    with pytest.raises(UserError, match="MINUTES|CHARACTERS"):
        command._sizes(Options(own={"minutes": minutes, "characters": characters}))


# windows


def test_windows_are_cut_from_the_one_stream_wherever_chunks_end(data: Data):
    """Chunks of 5 latent frames do not end where windows do."""
    model, case = small_model(chunk=5), recurrent_case(data, torch.arange(2), PLAN)
    codec = data.codec()
    row = streamed("row", "hash", model.backbone, model.refiner, codec, seed=3)
    spans = [(0, 12), (48, 72), (72, 108), (130, 140)]
    found = list(row.play(case, spans))

    def fresh(index: int, part: str) -> torch.Generator:
        return keyed_generator(3, "drift noise", 0, index, part)

    whole = stream(model.backbone, model.refiner, case.cond.frames(0, 40), fresh)
    frames = torch.cat([drift_rows.to_bytes(codec.decode(chunk)) for chunk in whole], 1)
    for (start, stop), window in zip(spans, found, strict=True):
        assert torch.equal(window, frames[:, start:stop])


def test_a_jump_at_chunk_borders_is_a_seam():
    frames = torch.zeros(1, 48, 3, 8, 8)
    frames[:, 4:] += 0.1
    for start in (12, 24, 36):
        frames[:, start:] += 0.3
    border, inner = border_changes(frames, start=120, chunk_frames=12)
    assert border.item() == pytest.approx(0.3, abs=1e-6)
    assert inner.item() == pytest.approx(0.1 / 8, abs=1e-6)  # 8 borders of latent frames that are none of chunks


def layout() -> Layout:
    return layout_of(PLAN)


def windows(motion: float, people: int = 6, nearest: float = 0.5) -> Windows:
    frames = sum(part.stop - part.start for part in layout().parts.values())
    generator = torch.Generator().manual_seed(1)
    shape = (people, PLAN.returns)
    return Windows(
        tracks=motion * torch.randn(*shape, frames, len(TRACKS), generator=generator),
        nearest=nearest + 0.1 * torch.rand(*shape, frames, generator=generator),
        identity=torch.zeros(*shape, frames // 12, 20),
        face=torch.ones(*shape, frames // 12, 4),
        color=torch.zeros(*shape, 3, 3),
        sharpness=torch.ones(*shape, 3),
        border=torch.ones(*shape, 3),
        inner=torch.ones(*shape, 3),
    )


def test_motion_is_measured_against_the_data_in_the_same_state():
    data, calm = windows(1.0), windows(0.5)
    for curve in motion_curves(calm, data, layout()).values():
        assert curve.mean().item() == pytest.approx(0.5, rel=0.05)
    for curve in motion_curves(windows(0.0), data, layout()).values():
        assert curve.abs().max().item() == 0.0


def test_a_jump_from_clip_to_clip_is_no_motion():
    wave = torch.sin(torch.arange(96.0) * torch.pi / 24)  # a whole period in each clip of 48 frames
    jumping = wave + torch.tensor([0.0, 5.0]).repeat_interleave(48)
    assert liveliness(jumping[None, None], 48).item() == pytest.approx(
        liveliness(wave[None, None], 48).item(), rel=1e-6
    )
    assert liveliness(jumping[None, None], 96).item() > 3 * liveliness(wave[None, None], 96).item()
    odd = torch.cat([wave, torch.full((11,), 9.0)])  # what is no whole piece does not count; a short part is one piece
    assert liveliness(odd[None, None], 48).item() == pytest.approx(math.sqrt(0.5), rel=1e-6)
    assert liveliness(odd[None, None, :24], 48).item() == pytest.approx(wave[:24].std(correction=0).item(), rel=1e-6)


def test_a_mouth_that_opens_in_one_return_is_counted_there_alone():
    held, quiet = windows(0.0), layout().parts["silence"]
    frames = held.tracks.shape[2]
    held.tracks[:, 1, quiet.start : quiet.start + 6, TRACKS.index("mouth")] = 0.5
    driven = torch.zeros(6, frames)
    driven[:, layout().parts["speak"]] = 0.6
    truth = Truth(driven, driven, Anchor(torch.zeros(6, 20), torch.ones(6, 4)), held, {})
    found = unasked_curve(held, truth).mean(0)
    far = (quiet.stop - quiet.start - 6) + (layout().parts["listen"].stop - layout().parts["listen"].start - 6)
    assert found[1].item() == pytest.approx(6 / far)
    assert found[[0, 2, 3]].tolist() == [0.0, 0.0, 0.0]


def test_a_copy_is_nearer_than_the_data_ever_comes():
    data = windows(1.0)
    usual = copy_distance(data)
    assert (data.nearest < usual).double().mean().item() == pytest.approx(0.01, abs=0.005)
    assert (windows(1.0, nearest=0.1).nearest < usual).all()


# the judge


def test_the_judge_gives_unit_vectors_and_survives_the_disk(tmp_path: Path):
    judge = Judge().requires_grad_(False)
    judge.about = {"content": "x"}
    frames = torch.rand(2, 3, 3, 64, 64)
    judge.save(tmp_path)
    again = Judge.load(tmp_path)
    assert torch.allclose(judge(frames).norm(dim=-1), torch.ones(2, 3))
    assert torch.equal(again(frames), judge(frames)) and again.about == judge.about


def test_the_loss_of_the_judge_falls_when_pictures_lie_at_their_own_prototype():
    faces = torch.nn.functional.one_hot(torch.arange(8)).float()
    kept = faces[:, None].repeat(1, 2, 1)
    assert prototype_loss(faces, kept) < 0.01
    assert prototype_loss(faces.roll(1, 0), kept) > 10
    assert face_distance(faces[0], 3 * faces[0]).item() == pytest.approx(0.0, abs=1e-9)


# controls and the whole


def test_injected_parameters_move_at_their_rate(data: Data):
    case = recurrent_case(data, torch.arange(2), PLAN)
    on = drift_rows.on_the_way(data, case.index, torch.tensor([0.0, 0.5, 1.0]))
    assert torch.allclose(on[:, 0], case.characters)
    assert torch.allclose(on[:, 2], data.characters[[1, 2]], atol=1e-6)
    still = torch.zeros(2, 2, len(motion.MOTION))
    minute = moved(data, case, still, start=24 * 60, rate=1.0)
    there = puppet.render(data.characters[[1, 2]], still, data.size)
    assert (minute.int() - there.int())[:, 0].abs().max() <= 1


def test_references_are_measured_apart_whatever_lies_in_empty_slots():
    stills = puppet.render(puppet.sample_identities(3, 1, "stills"), 0.5 * torch.rand(3, 3, 10), 64).float() / 255
    one = torch.tensor([[True, False, False]]).expand(3, -1)
    gray = stills.clone()
    gray[:, 1:] = 0.5
    assert torch.equal(stills_identity(stills, one), stills_identity(gray, one))
    alone = measure(stills[:, :1]).identity[:, 0]
    assert torch.allclose(stills_identity(stills, one), alone, atol=1e-5)


def test_drift_is_measured_kept_and_told(data: Data, tmp_path: Path):
    model, rows = small_model(), torch.arange(3)
    judge = Judge().requires_grad_(False)
    told = {"threshold": 0.5, "true_match_rate": 1.0, "equal_error_rate": 0.0}
    judge.about = {"content": "random", "characters": 9, "geometry": told, "judge": told}
    recipe = load(default_recipe("stage3", "tiny"), (), None)
    subject = Subject("stage3", "hash", model.backbone, model.refiner, recipe)
    played: list[str] = []

    def counted(source: Source) -> Source:
        def play(case, spans):
            played.append(source.name)
            return source.play(case, spans)

        return Source(**{**vars(source), "play": play})

    sources = [counted(streamed("stage3", "hash", model.backbone, model.refiner, data.codec(), 0))]
    for _ in range(2):
        keeper = Keeper(data, rows, PLAN, judge, tmp_path / "report")
        held = keeper.measure([counted(source) for source in controls(data, PLAN, 12)], beside_data=True)
        found = keeper.measure(sources)
    assert sorted(played) == ["codec", "frozen", "injected", "stage3", "truth"]  # the second time nothing is played
    facts = command.without_nan(command._facts(keeper, subject, found, held, {}))
    again = json.loads(json.dumps(facts))
    assert set(again["slope_per_min"]) == {"mean", "low", "high"}
    assert set(again["motion_ratio"]) == {"speak", "listen", "silence"}
    ages = [f"{what}_{chunk}" for what in ("chunk_seconds", "peak_mb") for chunk in (100, 10_000)]
    ends = [f"{what}_{which}_minute" for what in ("identity", "sync") for which in ("first", "last")]
    for key in (*ages, *ends, "failed", "censored"):
        assert key in again
    assert again["failed"] + again["censored"] == 3
    frozen = again["rows"]["frozen"]
    assert max(entry["mean"] for entry in frozen["motion_ratio"].values()) < 0.05
    assert frozen["identity_slope_per_min"]["mean"] == pytest.approx(0.0, abs=1e-9)
    assert frozen["copy_last_minute"]["mean"] == 1.0
    assert again["rows"]["truth"]["unasked_last_minute"]["mean"] == 0.0
    assert len(again["rows"]["stage3"]["per_character"]["unasked"]) == 3
    assert len(again["rows"]["stage3"]["per_character"]["identity_slope_per_min"]) == 3
    assert "frozen reference" in page(again) and "injected drift" in table(again)
    of_rows = [line for chart in drawn(again) if "Motion" not in chart.title for line in chart.series]
    colors = {(line.name, line.place) for line in of_rows}
    assert len(colors) == len({name for name, _ in colors}) == len({place for _, place in colors}) == 5


def test_what_is_expected_of_the_injected_drift_starts_at_the_truth(data: Data):
    count = torch.zeros(2, PLAN.returns, 7, 20)  # half seconds of a return: 2 silent, 3 speaking, 2 listening
    seen = windows(1.0, 2)
    truth = Windows(**{**vars(seen), "identity": count})
    expected = injected_distance(data, torch.arange(2), truth, torch.zeros(2, 20), layout())
    assert expected.shape == (2, PLAN.returns)
    assert (expected[:, 0] < expected[:, -1]).all()


def test_a_session_is_timed_young_and_old():
    model = small_model()
    audio = iter(lambda: (tone(4000), torch.zeros(4000)), None)
    references = torch.rand(1, 3, 8 * SIDE, 8 * SIDE)
    found = aging.age(model, references, "", audio, lambda chunks: iter(chunks), young=6, old=20, pairs=4)
    assert found["chunk_seconds_100"] > 0 and found["chunk_seconds_10000"] > 0
    assert found["peak_mb_10000"] >= found["peak_mb_100"] > 0


def test_compared_arms_show_their_minutes_over_each_other():
    def told(level: float) -> dict:
        curve = {"minutes": [0.2, 0.7], "mean": [level, level + 1]}
        return {"subject": "stage3", "rows": {"stage3": {"curves": dict.fromkeys(LONG, curve)}}}

    arms = [Arm("a", (0, 1), {}, long=[told(1.0), told(3.0)]), Arm("b", (0, 1), {}, long=[told(5.0), told(5.0)])]
    charts = long_lines([*arms, Arm("without", (0, 1), {})])
    assert len(charts) == len(LONG)
    assert [(line.name, line.y) for line in charts[0].series] == [("a", [2.0, 3.0]), ("b", [5.0, 6.0])]
    assert long_lines([Arm("without", (0,), {})]) == []
    late = long_lines([arms[0], Arm("without", (0, 1), {}), arms[1]])
    assert [line.place for line in late[0].series] == [0, 2]  # an arm has its color whoever has no minutes


def test_a_slope_is_surely_seen_and_shuffled_time_hardly_ever_shows_one():
    minutes, broken = torch.arange(20).double() / 2, 0
    place = Layout({}, minutes[:, None], 10.0)
    for seed in range(30):
        curve = 0.1 + 0.02 * torch.randn(24, 20, generator=torch.Generator().manual_seed(seed))
        row = Measured({"identity": curve + 0.01 * minutes}, {})
        assert row_facts(row, place)["identity_slope_surely"]["low"] > 0
        shuffle = row_facts(shuffled_row(row, seed), place)["identity_slope_surely"]
        broken += not shuffle["low"] <= 0 <= shuffle["high"]
    assert broken <= 1
