"""`make compare RUNS="a b c"`: gather what runs and grids have measured and put it side by side on one page.

RUNS names grids (all their finished cells), cells without their seed, or single runs; `run:stage2` takes that row of a
run. Runs of one name that differ in the seed alone become one arm. Everything is read from what training and scoring
kept; runs of other data or with another measurement are refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from distill.data import dataset
from distill.errors import ExitCode, UserError
from distill.evaluate import LatentDataset
from distill.listing import flatten
from distill.options import Options
from distill.progress import CARD, STATE, done_cells
from distill.runs import RESOLVED, RUNS, existing_run, read_status, run_folder
from distill.schema import differing_keys
from evaluation.arms import Arm, over_minutes
from evaluation.arms_page import Comparison, Reel, write_comparison
from evaluation.bench import decode
from evaluation.drift import Drift
from evaluation.metrics import COSTS, STAGES
from evaluation.report import Figure
from evaluation.scores import Values, load_values
from evaluation.video import as_image, contact_sheet, enlarge, mp4_bytes, png_bytes

SCORED = (*STAGES, "online_lpm")  # rows of a run that are students, the last one first choice
FILMED = {"speaking": 1, "listening": 2, "silent": 0}
PAST_SAMPLES = 24000  # 1.5 s before the first frame
CURVES = ("train/", "health/")


@dataclass(frozen=True)
class Member:
    """One run of an arm: the folder, which of its rows, and its seed."""

    arm: str
    seed: int
    folder: Path
    row: str

    @property
    def kept(self) -> Path:
        return self.folder / "report" / "rows" / self.row

    @property
    def key(self) -> dict[str, Any]:
        return json.loads((self.kept / "key.json").read_text())

    @property
    def stages(self) -> list[str]:
        """The stages that led to the row."""
        last = STAGES[-1] if self.row not in STAGES else self.row
        upto = STAGES[: STAGES.index(last) + 1]
        return [stage for stage in upto if (self.folder / stage / RESOLVED).is_file()]

    def resolved(self) -> dict[str, Any]:
        """Dotted keys of the recipes of all its stages, without the seeds."""
        out: dict[str, Any] = {}
        for stage in self.stages:
            data = yaml.safe_load((self.folder / stage / RESOLVED).read_text(encoding="utf-8"))
            out |= {f"{stage}.{key}": value for key, value in flatten({**data, "seed": None}).items()}
        return out


def compare(options: Options) -> str:
    """Write the page, the table and the figures."""
    names = options.own.get("runs", "").split()
    if not names:
        raise UserError("No runs were named: give RUNS='stage1-losses' or RUNS='run-a run-b'.")
    members = [member for name in names for member in find(name, several=len(names) > 1)]
    _same_measurement(members)
    arms = {name: [m for m in members if m.arm == name] for name in dict.fromkeys(m.arm for m in members)}
    if len(arms) < 2:
        raise UserError(f"Only '{next(iter(arms))}' was found: a comparison needs two runs, or a grid with two cells.")
    seeds = _common_seeds(arms)
    test = _data_of(members[0])
    count = members[0].key["bench"]["clips"]
    rows = torch.arange(min(count, len(test)))
    baseline = _baseline(options.own.get("baseline", ""), names, list(arms))
    made = [_arm(name, [m for seed in seeds for m in found if m.seed == seed]) for name, found in arms.items()]
    _same_minutes(made)
    first = {name: next(m for m in found if m.seed == seeds[0]) for name, found in arms.items()}
    sheet, reels = _pictures(test, first)
    setting = {**members[0].key["bench"], "data": members[0].key["data"], "runs": names}
    title = " against ".join(arms) if len(arms) < 4 else f"{' '.join(names)}: {len(arms)} arms"
    comparison = Comparison(title, made, baseline, test.all().identity[rows], setting, sheet, reels)
    page = write_comparison(_out(options.own.get("out", ""), names), comparison)
    return f"Wrote {page} with compare.md and compare.json; next: open it in a browser."


def find(name: str, several: bool = False) -> list[Member]:
    """The runs behind one name of RUNS; UserError when there are none that were scored."""
    name, _, row = name.partition(":")
    folder = run_folder(name)
    if (folder / STATE).is_file():
        prefix = f"{name}/" if several else ""
        return [_member(f"{prefix}{cell}", folder / f"{cell}-seed{seed}", row) for cell, seed in done_cells(folder)]
    seeded = [path for path in folder.parent.glob(f"{folder.name}-seed*") if re.search(r"-seed\d+$", path.name)]
    if seeded and not folder.is_dir():
        return [_member(name, path, row) for path in sorted(seeded)]
    return [_member(re.sub(r"-seed\d+$", "", name), existing_run(name), row)]


def _member(arm: str, folder: Path, row: str) -> Member:
    rows = folder / "report" / "rows"
    scored = [known for known in SCORED if (rows / known / "values.safetensors").is_file()]
    if not scored or (row and row not in scored):
        what = f"row '{row}'" if row else "scores"
        run = folder.relative_to(RUNS)
        raise UserError(f"The run {folder} has no {what}: run `make score RUN={run}` first.", ExitCode.DATA)
    row = row or scored[-1]
    card = json.loads((folder / CARD).read_text()) if (folder / CARD).is_file() else {}
    member = Member(arm, int(card.get("seed", 0)), folder, row)
    if card or not member.stages:
        return member
    data = yaml.safe_load((folder / member.stages[-1] / RESOLVED).read_text(encoding="utf-8"))
    return Member(arm, int(data.get("seed", 0)), folder, row)


def _same_measurement(members: list[Member]) -> None:
    """Refuse runs that were scored on other data or in another way."""
    first = members[0]
    for other in members[1:]:
        a, b = first.key, other.key
        if a["data"] != b["data"]:
            raise UserError(
                f"{first.folder} and {other.folder} were scored on different data ({a['data'][:8]} and "
                f"{b['data'][:8]}), so they cannot be compared: score both again on one data set."
            )
        if a["code"] != b["code"]:
            run = other.folder.relative_to(RUNS)
            raise UserError(
                f"{first.folder} and {other.folder} were scored by different versions of the code, so they cannot be "
                f"compared: score both again, `make score RUN={run}`; of a grid, the same `make ablate`."
            )
        differ = differing_keys({"bench": a["bench"]}, {"bench": b["bench"]})
        if differ:
            key = differ[0].removeprefix("bench.")
            raise UserError(
                f"{first.folder} and {other.folder} were measured differently ({key}: {a['bench'].get(key)} and "
                f'{b["bench"].get(key)}): score one again, `make score RUN=... SET="evaluation.{key}=..."`.'
            )


def _common_seeds(arms: dict[str, list[Member]]) -> list[int]:
    for name, found in arms.items():
        seeds = [member.seed for member in found]
        if len(set(seeds)) < len(seeds):
            raise UserError(f"'{name}' has two runs with seed {seeds[0]}: name them apart.")
        recipes = [member.resolved() for member in found]
        odd = next((k for k in recipes[0] for other in recipes if other.get(k) != recipes[0][k]), None)
        if odd:
            raise UserError(f"The runs of '{name}' differ in {odd}, not in the seed alone: name them apart.")
    seeds = sorted(set.intersection(*({member.seed for member in found} for found in arms.values())))
    if not seeds:
        raise UserError("The runs have no seed in common, so nothing can be paired: train them with the same seeds.")
    return seeds


def _baseline(wanted: str, names: list[str], arms: list[str]) -> str:
    """BASELINE=, else what the first grid says, else the first arm."""
    state = run_folder(names[0].partition(":")[0]) / STATE
    said = json.loads(state.read_text())["baseline"] if state.is_file() else ""
    for name in (wanted, said, f"{names[0]}/{said}"):
        if name in arms:
            return name
    if wanted:
        raise UserError(f"BASELINE={wanted} is none of the arms {', '.join(arms)}.")
    return arms[0]


def _data_of(member: Member) -> LatentDataset:
    data = yaml.safe_load((member.folder / member.stages[-1] / RESOLVED).read_text(encoding="utf-8"))["data"]["path"]
    test = dataset.load(Path(data), "test")
    if test.fingerprint != member.key["data"]:
        raise UserError(
            f"{data} is not the data that {member.folder} was scored on (now {test.fingerprint[:8]}, then "
            f"{member.key['data'][:8]}): score it again.",
            ExitCode.DATA,
        )
    return test


def _arm(name: str, members: list[Member]) -> Arm:
    tables: list[Values] = [load_values(member.kept / "values.safetensors") for member in members]
    shared = [key for key in tables[0] if all(key in table for table in tables)]
    values = {key: torch.stack([table[key] for table in tables]) for key in shared}
    drifts = [member.kept / "drift.safetensors" for member in members]
    drift = [Drift(**load_values(path)) for path in drifts] if all(path.is_file() for path in drifts) else []
    curves = [_curves(member.folder / member.stages[-1] / "metrics.jsonl") for member in members]
    tags = [tag for tag in curves[0] if all(tag in curve for curve in curves)]
    costs = [_cost(member) for member in members]
    cost = {key: sum(c[key] for c in costs) / len(costs) for key in costs[0] if all(key in c for c in costs)}
    long = _long(members)
    if long:
        values |= over_minutes(long)
    cost |= {key: float(values[key].nanmean()) for key in COSTS if key in values}
    return Arm(
        name,
        tuple(member.seed for member in members),
        values,
        drift,
        {tag: [curve[tag] for curve in curves] for tag in tags},
        members[0].resolved(),
        cost,
        long,
    )


def _long(members: list[Member]) -> list[dict[str, Any]]:
    """drift.json of every member, where all have one of the row that is compared."""
    paths = [member.folder / "report" / "drift.json" for member in members]
    long = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
    if len(long) < len(members) or any(told["subject"] != m.row for told, m in zip(long, members, strict=True)):
        return []
    for member, told in zip(members, long, strict=True):
        if told["weights"] != member.key["source"]:
            run = member.folder.relative_to(RUNS)
            raise UserError(f"{member.folder}/report/drift.json is of other weights: run `make drift RUN={run}` again.")
    return long


def _same_minutes(arms: list[Arm]) -> None:
    """Refuse long measurements of which one says nothing about the other."""
    told = [(arm.name, seed, one) for arm in arms for seed, one in zip(arm.seeds, arm.long, strict=False)]
    for name, seed, one in told:
        other = next(first for _, same, first in told if same == seed)
        if any(one.get(part) != other.get(part) for part in ("identities", "measured_by")):
            raise UserError(
                f"drift.json of '{name}', seed {seed}, was measured otherwise or with other characters than that "
                f"of '{told[0][0]}': run `make drift` for both with the same MINUTES, CHARACTERS and code."
            )


def _curves(path: Path) -> dict[str, dict[int, float]]:
    """{tag: {step: value}} of what the last stage logged; a line that an interruption cut off does not count."""
    out: dict[str, dict[int, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        for tag, value in entry.items():
            if tag.startswith(CURVES) and isinstance(value, int | float):
                out.setdefault(tag, {})[entry["step"]] = float(value)
    return out


def _cost(member: Member) -> dict[str, float]:
    """Steps and seconds of all stages, the pace of the last one, the most memory of any."""
    steps, seconds, peaks = 0, 0.0, []
    for stage in member.stages:
        real = (member.folder / stage).resolve()  # a shared stage is a link to the run that made it
        status, timings = read_status(real), real.parent / "timings.json"
        steps += int(status.get("step", 0))
        seconds += json.loads(timings.read_text()).get(stage, 0.0) if timings.is_file() else 0.0
        peaks += [status["peak_gib"]] if "peak_gib" in status else []
    last = read_status(member.folder / member.stages[-1])
    out = {"steps": float(steps), "train_s": seconds, **({"peak_gib": max(peaks)} if peaks else {})}
    paces = [value for value in _pace(member.folder / member.stages[-1] / "metrics.jsonl") if value > 0]
    return out | ({"step_s": sum(paces) / len(paces)} if paces and last else {})


def _pace(path: Path) -> list[float]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line)["perf/step_s"] for line in lines if '"perf/step_s"' in line and line.endswith("}")]


def _pictures(test: LatentDataset, members: dict[str, Member]) -> tuple[Figure, list[Reel]]:
    """A contact sheet and films of one clip per state: the data, then every arm with the first common seed."""
    codec, batch = test.codec(), test.all()
    assert batch.latents is not None
    clips: dict[str, Tensor] = {"data": batch.latents}
    clips |= {
        name: load_file(member.kept / "latents.safetensors")["latents"].float() for name, member in members.items()
    }
    count = min(len(latents) for latents in clips.values())
    chosen: dict[str, int] = {}
    for state, number in FILMED.items():
        whole = (batch.state[:count] == number).all(1).nonzero().flatten().tolist()
        chosen |= {state: whole[0]} if whole else {}
    chosen = chosen or {"clip": 0}
    frames = {(n, i): decode(codec, clips[n][i : i + 1])[0] for n in clips for i in chosen.values()}
    sheet = contact_sheet([(name, frames[name, index]) for index in list(chosen.values())[:2] for name in clips])
    picture = Figure("Contact sheet", "Time runs to the right; a block per clip.", png_bytes(sheet), "png")
    reels = []
    for state, index in chosen.items():
        speak, listen = test.waves(batch.index[index : index + 1])
        wave = (speak + listen)[0, PAST_SAMPLES:]
        films = []
        for name in clips:
            shown = frames[name, index]
            poster = png_bytes(as_image(enlarge(shown[len(shown) // 2 :][:1], 3)[0]))
            films.append((name, mp4_bytes(shown, wave, scale=3), poster))
        reels.append(Reel(state, test.captions[index], films))
    return picture, reels


def _out(given: str, names: list[str]) -> Path:
    """OUT=, else beside the grid, else runs/compare/<names>."""
    if given:
        return Path(given)
    if len(names) == 1:
        return run_folder(names[0].partition(":")[0]) / "compare"
    return RUNS / "compare" / re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(names))
