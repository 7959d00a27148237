"""Online LPM as a folder: round trip, the model card, sharing through the Hub, errors of one sentence, the demo."""

from __future__ import annotations

import json
import wave
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from small_online import images, small_model, tone

from distill import card as cards
from distill import demo as demos
from distill.data import speech
from distill.state import checkpoint
from distill.state.lineage import Manifest
from student.card import card
from student.demo import Demo, read_demo
from student.online import OnlineLPM


def test_a_loaded_model_streams_the_same_frames_and_keeps_its_fingerprint(tmp_path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    loaded = OnlineLPM.from_pretrained(str(tmp_path))
    shown = []
    for one in (model, loaded):
        session = one.stream(images(), "smiling")
        session.push(speak=tone(16000))
        shown.append(torch.cat([chunk.frames for chunk in session]))
    assert torch.equal(*shown) and shown[0].float().std() > 1
    assert loaded.fingerprint() == model.fingerprint() != small_model(seed=9).fingerprint()
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors", ".md"}


def test_a_folder_of_the_first_format_without_its_entry_is_read(tmp_path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("format") == 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "README.md").unlink()
    assert OnlineLPM.from_pretrained(tmp_path).fingerprint() == model.fingerprint()


def damage(folder, what: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    if what == "no config":
        (folder / "config.json").unlink()
    elif what == "no JSON":
        (folder / "config.json").write_text("{")
    elif what == "a list":
        (folder / "config.json").write_text("[]")
    elif what == "newer":
        (folder / "config.json").write_text(json.dumps({**config, "format": 7}))
    elif what == "unknown key":
        config["model"]["wings"] = 2
        (folder / "config.json").write_text(json.dumps(config))
    elif what == "no section":
        del config["stream"]
        (folder / "config.json").write_text(json.dumps(config))
    elif what == "other sizes":
        config["model"]["ffn_dim"] = 8
        (folder / "config.json").write_text(json.dumps(config))
    elif what == "no refiner":
        (folder / "refiner.safetensors").unlink()
    elif what == "no codec":
        (folder / "codec.safetensors").unlink()
    elif what == "cut short":
        data = (folder / "backbone.safetensors").read_bytes()
        (folder / "backbone.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("what", "sentence"),
    [("no config", "holds no Online LPM"), ("no JSON", "is no JSON object"), ("a list", "is no JSON object"),
     ("newer", "format 7, this version reads 1"), ("unknown key", "no configuration of this version.*wings"),
     ("no section", "no configuration of this version.*stream"), ("other sizes", "does not fit config.json"),
     ("no refiner", "refiner.safetensors is missing"), ("no codec", "codec.safetensors is missing"),
     ("cut short", "backbone.safetensors is damaged")],
)  # fmt: skip
def test_a_damaged_folder_is_told_in_one_sentence(tmp_path, what: str, sentence: str) -> None:
    small_model().save_pretrained(tmp_path)
    damage(tmp_path, what)
    with pytest.raises(ValueError, match=sentence) as told:
        OnlineLPM.from_pretrained(tmp_path)
    assert "\n" not in str(told.value)


# ---- the Hub ----------------------------------------------------------------------------------------------


def test_push_to_hub_uploads_the_whole_folder_with_what_lay_beside_the_weights(tmp_path, monkeypatch) -> None:
    small_model().save_pretrained(tmp_path / "made")
    for name in ("characters/ada/reference_0.png", "demo.json", "manifest.json", "unrelated.txt"):
        (tmp_path / "made" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "made" / name).write_text(name)
    (tmp_path / "made" / "README.md").write_text("the card of the export")
    sent: dict = {}

    class Api:
        def __init__(self, token=None):
            sent["token"] = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            sent.update(private=private, exist_ok=exist_ok)
            return SimpleNamespace(repo_id=f"someone/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            from pathlib import Path

            files = [path for path in Path(folder_path).rglob("*") if path.is_file()]
            sent.update(repo=repo_id, files={str(p.relative_to(folder_path)): p.read_bytes() for p in files})
            return "https://hub/commit/1"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    model = OnlineLPM.from_pretrained(tmp_path / "made")
    assert model.push_to_hub("lpm", private=True, token="secret") == "https://hub/commit/1"
    assert (sent["repo"], sent["private"], sent["exist_ok"], sent["token"]) == ("someone/lpm", True, True, "secret")
    assert set(sent["files"]) == {
        "README.md", "config.json", "backbone.safetensors", "refiner.safetensors", "codec.safetensors", "manifest.json",
        "demo.json", "characters/ada/reference_0.png",
    }  # fmt: skip
    assert sent["files"]["README.md"] == b"the card of the export"
    assert sent["files"]["backbone.safetensors"] == (tmp_path / "made" / "backbone.safetensors").read_bytes()


def test_a_repository_of_the_hub_is_downloaded_and_a_missing_folder_is_not(tmp_path, monkeypatch) -> None:
    small_model().save_pretrained(tmp_path)
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **k: asked.append((name, k)) or tmp_path)
    assert OnlineLPM.from_pretrained("someone/lpm", revision="v1").folder == tmp_path
    assert asked == [("someone/lpm", {"revision": "v1"})]
    for missing in (tmp_path / "nothing", "runs/no-such-run/online-lpm"):
        with pytest.raises(ValueError, match="holds no Online LPM"):
            OnlineLPM.from_pretrained(missing)
    assert len(asked) == 1


def manifests(tmp_path) -> Manifest:
    """A refiner whose parent is there, and whose grandparent is gone."""
    recipe = {
        "data": {"prepare": {"train_identities": 500, "train_clips": 4}},
        "rollout": {"kind": "self"},
        "phases": [{"update": "student", "terms": {"dmd": {}, "identity_drift": {}}}],
    }
    gone = {"path": str(tmp_path / "gone"), "manifest_sha256": "0" * 64}
    meta = {"stage": "stage3", "scale": "tiny", "step": 7, "name": "tiny-three", "recipe": recipe, "parent": gone}
    with checkpoint.committed(tmp_path / "three", meta):
        pass
    digest = checkpoint.file_hash(tmp_path / "three" / "manifest.json")
    above = {"path": str(tmp_path / "three"), "manifest_sha256": digest}
    data = {**meta, "stage": "stage4", "name": "tiny-four", "parent": above, "data_fingerprint": "abc123"}
    with checkpoint.committed(tmp_path / "four", data):
        pass
    return Manifest(tmp_path / "four", "f" * 64, data)


def test_the_card_tells_data_stages_scores_and_licence_and_the_hub_can_read_it(tmp_path) -> None:
    refiner, stream = manifests(tmp_path), small_model().backbone.stream
    before = cards.export_card(stream, refiner, tmp_path)
    assert "## Scores" not in before and "model-index" not in before
    scores = {"online_lpm": {"sync_corr": {"mean": 0.8984, "se": 0.01}, "sync_lag_ms": {"mean": None, "se": None}}}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    told = ModelCard(cards.export_card(stream, refiner, tmp_path))
    assert told.data.license == "apache-2.0" and told.data.library_name == "online-lpm-distill"
    assert "audio-to-video" in told.data.tags
    assert [(r.metric_type, r.metric_value) for r in told.data.eval_results] == [("sync_corr", 0.898)]
    for line in (
        "500 drawn characters with 4 clips",
        "abc123",
        "| lip sync ↑ | 0.898 |",
        "Apache-2.0, weights and code",
    ):
        assert line in told.text
    assert "| stage4 | tiny-four | self | dmd (student), identity_drift (student) | 7 |" in told.text
    assert "| stage3 | tiny-three |" in told.text and "(gone, manifest 000000000000)" in told.text
    assert ModelCard(card(stream)).data.license == "apache-2.0"  # of a model without lineage


def test_the_card_is_replaced_in_a_sealed_folder_and_the_folder_still_verifies(tmp_path) -> None:
    with checkpoint.committed(tmp_path / "sealed", {"stage": "online-lpm"}) as folder:
        small_model().save_pretrained(folder)
    checkpoint.replace_text(tmp_path / "sealed", "README.md", "with scores")
    assert checkpoint.verify(tmp_path / "sealed") is None
    assert (tmp_path / "sealed" / "README.md").read_text() == "with scores"
    assert not list((tmp_path / "sealed").glob(".*"))
    (tmp_path / "sealed" / "README.md").write_text("by hand")
    assert checkpoint.verify(tmp_path / "sealed") is not None


# ---- the demo ---------------------------------------------------------------------------------------------


def test_a_demo_of_drawn_characters_and_synthesized_voices_is_written_and_read_back(tmp_path, monkeypatch) -> None:
    from distill.data import puppet

    people = puppet.sample_identities(3, 0, "test")
    rows = torch.tensor([0, 0, 1, 1, 2, 2])
    batch = SimpleNamespace(identity=10 + rows)
    test = SimpleNamespace(all=lambda: batch, characters=people[rows], size=32)
    monkeypatch.setattr(demos.dataset, "load", lambda folder, split: {"test": test}[split])

    def said(role: str, voice: str, split: str, number: int) -> speech.Utterance:
        return speech.Utterance(tone(4000, number), voice, role, split, f"{role} {number}.")

    corpus = [said(role, f"{role}er*1.0", "validation", n) for role in ("speak", "listen") for n in range(9)]
    corpus += [said("speak", "recorded*1.0", "test", 77), said("speak", "speaker*1.0", "train", 88)]
    monkeypatch.setattr(demos.speech, "corpus", lambda cache: corpus)
    demos.write_demo(tmp_path / "data", tmp_path)
    demo = read_demo(tmp_path)
    assert list(demo.characters) == ["ada", "bo", "cleo"] and next(iter(demo.texts)) == "calm"
    pictures = [demo.references(name) for name in demo.characters]
    assert all(p.shape == (3, 3, 32, 32) and 0 <= p.min() and p.max() <= 1 for p in pictures)
    same, other = (pictures[0][0] - pictures[0][1]).abs().mean(), (pictures[0][0] - pictures[1][0]).abs().mean()
    assert 0 < same < other  # stills of one character differ less than two characters
    assert {voice.role for voice in demo.voices.values()} == {"speak", "listen"}
    spoken = " ".join(voice.text for voice in demo.voices.values())
    assert "77" not in spoken and "88" not in spoken  # neither recordings of people nor what training heard
    for voice in demo.voices.values():
        with wave.open(str(voice.file)) as file:
            assert (file.getnchannels(), file.getframerate(), file.getsampwidth()) == (1, 16000, 2)
            assert file.getnframes() == len(voice.text.split(".")[:-1]) * (4000 + 5600)


def test_a_folder_without_or_with_a_broken_demo_says_so(tmp_path) -> None:
    assert read_demo(tmp_path) == Demo()
    with pytest.raises(ValueError, match="no character 'zoe'.*there are: none"):
        read_demo(tmp_path).references("zoe")
    for number, size in enumerate((16, 32)):
        Image.new("RGB", (size, size)).save(tmp_path / f"{number}.png")
    index = {"characters": {"ada": {"references": ["0.png", "1.png"]}, "bo": {"references": ["gone.png"]}}}
    (tmp_path / "demo.json").write_text(json.dumps({**index, "voices": {}, "texts": {}}))
    with pytest.raises(ValueError, match="must be of one size"):
        read_demo(tmp_path).references("ada")
    with pytest.raises(ValueError, match="gone.png cannot be read"):
        read_demo(tmp_path).references("bo")
    (tmp_path / "demo.json").write_text("[]")
    with pytest.raises(ValueError, match="is damaged"):
        read_demo(tmp_path)
