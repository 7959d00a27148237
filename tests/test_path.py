"""Pieces of the path between the stages: trajectory times, identity embedder, Online LPM on disk, the kept teacher."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distill.rollout import TrajectoryConfig
from distill.state import checkpoint
from distill.trajectories import step_times
from student.causal_dit import CausalDiT, StreamConfig
from student.online import OnlineLPM
from teacher.codec import PCACodec
from teacher.conditions import AUDIO_PER_LATENT, PAST, TEXT_LENGTH, Conditions
from teacher.dit import DiT, DiTConfig

KEPT = Path("recipes/tiny/teacher")


@pytest.mark.parametrize("steps", [(1.0, 0.8, 0.45), (1.0, 0.5), (1.0, 0.9375, 0.8333, 0.625)])
def test_trajectory_times_fall_and_hold_every_student_step_exactly(steps):
    times, kept = step_times(TrajectoryConfig(steps=16, shift=3.0), steps)
    assert (times.diff() < 0).all()
    assert times[0] == 1 and times[-1] == 0
    assert times[kept].tolist() == [*steps, 0.0]
    assert times.diff().abs().min() > 0.01  # no step is wasted beside another


def test_online_lpm_streams_the_same_frames_after_a_round_trip_to_disk(tmp_path):
    torch.manual_seed(0)
    config = DiTConfig(dim=32, depth=2, heads=2, ffn_dim=32, channels=4)
    nets = [CausalDiT(DiT(config), StreamConfig(chunk_frames=1)) for _ in range(2)]
    for net in nets:
        torch.nn.init.normal_(net.dit.head.head.weight, std=0.1)
    codec = PCACodec(torch.zeros(768), torch.linalg.qr(torch.randn(768, 4))[0], torch.ones(4))
    model = OnlineLPM(nets[0], nets[1], codec)
    model.save_pretrained(tmp_path)
    loaded = OnlineLPM.from_pretrained(tmp_path)
    audio = torch.randn(1, AUDIO_PER_LATENT * (PAST + 3), config.mels)
    text = torch.randn(1, TEXT_LENGTH, config.text_dim)
    refs = torch.randn(1, 1, 4, 8, 8)
    cond = Conditions(audio, audio, text, text[..., 0] < 9, refs, torch.ones(1, 1, dtype=torch.bool))
    ours, theirs = (list(m.frames(cond, torch.Generator().manual_seed(1))) for m in (model, loaded))
    assert [chunk.shape for chunk in ours] == [(1, 4, 3, 64, 64)] * 3
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[0], ours[1])


def test_a_folder_without_a_model_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="holds no Online LPM"):
        OnlineLPM.from_pretrained(tmp_path)


def test_the_kept_teacher_is_whole_and_has_the_shape_of_the_recipes():
    from distill import config
    from distill.roles import network
    from distill.state import lineage

    assert checkpoint.verify(KEPT) is None
    recipe = config.load(Path("recipes/tiny/stage1_ode.yaml"))
    model = network(recipe.model, lineage.read(KEPT), "ema")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}  # masters, though kept in fp16
    assert PCACodec.load(KEPT / "codec").channels == recipe.model.channels


def test_a_parent_that_stopped_halfway_is_refused_unless_named(tmp_path, monkeypatch):
    from distill import config, pipeline
    from distill.errors import UserError
    from distill.runs import write_status

    (tmp_path / "stage1").mkdir()
    manifest = SimpleNamespace(path=tmp_path / "stage1" / "checkpoints" / "step_00000010", hash="x")
    monkeypatch.setattr(pipeline.lineage, "find_parent", lambda *_: manifest)
    recipe = config.load(Path("recipes/tiny/stage2_dmd.yaml"))
    write_status(tmp_path / "stage1", "stopped", {"step": 10})
    with pytest.raises(UserError, match=r"not finished \(step 10\)"):
        pipeline._parent(recipe, tmp_path, None, None)
    assert pipeline._parent(recipe, tmp_path, None, str(manifest.path)) is manifest
    write_status(tmp_path / "stage1", "done", {"step": 20})
    assert pipeline._parent(recipe, tmp_path, None, None) is manifest
