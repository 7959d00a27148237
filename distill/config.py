"""A recipe: one YAML file that says what is trained, from what, by which losses, for how long.

`load(path, overrides, variant)` merges base <- file <- variant (`quick:` or `smoke:` block) <- overrides, checks
every key against frozen dataclasses and reports all problems in one UserError with file:line. The blocks of
losses, rollouts and networks are checked against the dataclass beside their code, found by name at run time.
"""

import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from distill import modules
from distill.errors import UserError
from distill.schema import COMMAND_LINE, KeyPath, Report, Source, bounded, build, choice, merge, override, read_yaml

STAGES = ("teacher", "ar-teacher", "trajectories", "stage1", "stage2", "stage3", "stage4")
SCALES = ("tiny", "1.3b", "17b")
ROLES = ("teacher", "student", "critic", "refiner")
VARIANTS = ("quick", "smoke")
COMMON = ("weight", "ramp_steps", "cap")  # of every term


@dataclass(frozen=True)
class OptimConfig:
    """AdamW of one role."""

    lr: float = bounded(low=0.0)
    betas: tuple[float, float] = (0.0, 0.999)
    weight_decay: float = bounded(0.0, 0.0)
    warmup_steps: int = bounded(0, 0)
    schedule: str = choice("constant", "cosine", default="constant")
    eps: float = bounded(1e-8, 0.0)

    def __post_init__(self) -> None:
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must both lie in [0, 1)")


@dataclass(frozen=True)
class TrainConfig:
    """How long, how large, how often; all counts are optimizer steps."""

    steps: int = bounded(0, 0)
    batch_size: int = bounded(1, 1)
    grad_accumulation: int = bounded(1, 1)
    clip: float = bounded(10.0, 1e-3)  # largest norm of a gradient; 0 would not be "off", it would still all
    ema: float = bounded(0.99, 0.0, 1.0)
    ema_start: int = bounded(0, 0)
    log_every: int = bounded(10, 1)
    sample_every: int = bounded(500, 1)
    save_every: int = bounded(500, 1)
    keep: int = bounded(2, 2)
    max_nonfinite: int = bounded(5, 1)
    precision: str = choice("fp32", "bf16", default="fp32")
    compile: bool = False  # the trained networks' blocks with torch.compile; needs a C++ compiler


@dataclass(frozen=True)
class DataRef:
    """The prepared data set: its folder, and what `make data` puts there; or, of clips made elsewhere, their sizes."""

    path: str = "data/tiny"
    prepare: Any = field(default=None, metadata={"schema": "distill.data.prepare:PrepareConfig", "always": True})
    clip: Any = field(default=None, metadata={"schema": "distill.batches:Clip"})  # where `make data` prepares nothing


@dataclass(frozen=True)
class TermSpec:
    """One weighted loss: `config` is an instance of the Config in the loss's file, `source` where that is."""

    name: str
    weight: float = 1.0
    ramp_steps: int = bounded(0, 0)
    cap: float = bounded(0.0, 0.0)  # largest share of the other terms' gradient in the samples; 0 = no limit
    config: Any = None
    source: str = ""  # the path of a file outside the repository


@dataclass(frozen=True)
class Phase:
    """Who learns (`update`), how often (`every` n-th step), from which terms."""

    update: str = choice(*ROLES)
    every: int = bounded(1, 1)
    terms: Any = ()  # tuple[TermSpec, ...]


@dataclass(frozen=True)
class RolloutSpec:
    """Where the samples come from: `config` is an instance of the Config beside the rollout."""

    kind: str
    config: Any = None
    source: str = ""  # as in TermSpec


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `resolved` is the same as plain data, every default filled in."""

    name: str
    scale: str = choice(*SCALES)
    stage: str = choice(*STAGES)
    seed: int = bounded(0, 0)
    parent: str | None = None
    teacher: str = "kept"
    data: DataRef = field(default_factory=DataRef)
    model: Any = field(default=None, metadata={"schema": "teacher.dit:DiTConfig", "always": True})
    student: Any = field(default=None, metadata={"schema": "student.causal_dit:StreamConfig", "always": True})
    trajectories: Any = field(default=None, metadata={"schema": "distill.rollout:TrajectoryConfig"})
    evaluation: Any = field(default=None, metadata={"schema": "evaluation.bench:BenchConfig"})
    lora: Any = field(default=None, metadata={"schema": "distill.adapters:LoRARoles"})
    health: Any = field(default=None, metadata={"schema": "distill.health:HealthConfig", "always": True})
    gate: Any = field(default=None, metadata={"schema": "distill.gates:GateConfig"})
    rollout: RolloutSpec | None = None
    phases: tuple[Phase, ...] = ()
    optimizer: dict[str, OptimConfig] = field(default_factory=dict)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.parent is not None and self.parent not in STAGES[: STAGES.index(self.stage)]:
            raise ValueError(f"parent: {self.parent} does not come before {self.stage}")
        if self.phases and self.train.steps < 1:
            raise ValueError("train.steps: at least 1 is needed where there are phases")
        updated = [phase.update for phase in self.phases]
        for role in [role for role in ROLES if getattr(self.lora, role, None) is not None]:
            if role not in updated:
                raise ValueError(f"lora.{role}: no phase updates {role}")
            if self.train.compile:
                raise ValueError("train.compile: blocks that several roles share are not compiled, drop it or lora")
        for role, optim in self.optimizer.items():
            if optim.warmup_steps > self.train.steps:
                raise ValueError(f"optimizer.{role}.warmup_steps is longer than train.steps")

    @property
    def resolved(self) -> dict[str, Any]:
        """Plain data that `load` would read back to this same recipe."""
        return _plain(self)


# ---- public functions -------------------------------------------------------------------------------------


def load(path: str | Path, overrides: Sequence[str] = (), variant: str | None = None) -> Recipe:
    """The recipe at `path`, or one UserError (code 2) that lists everything wrong with it."""
    source = read(path, overrides, variant)
    report = Report(source, str(path))
    data = dict(source.data)
    _schemas(Recipe, data, (), report)
    roles = _phases(data, report)
    _rollout(data, report)
    _optimizer(data, roles, report)
    recipe = build(Recipe, data, (), report)
    report.stop_if_any()
    assert recipe is not None
    return recipe


def read(path: str | Path, overrides: Sequence[str] = (), variant: str | None = None) -> Source:
    """The merged mapping of a recipe, unchecked: enough to know its scale and stage without importing torch."""
    source = _with_bases(Path(path), ())
    blocks = {name: source.data.pop(name, None) for name in VARIANTS}
    if variant is not None and isinstance(blocks[variant], dict):
        where = {at[1:]: place for at, place in source.where.items() if at[0] == variant and len(at) > 1}
        source = merge(source, Source(blocks[variant], where))
    for text in overrides:
        override(source, text)
    return source


def default_recipe(stage: str, scale: str = "tiny") -> Path:
    """The one recipe of a stage in recipes/<scale>: `<stage>.yaml` or `<stage>_<method>.yaml`."""
    folder = Path("recipes") / scale
    found = [*folder.glob(f"{stage}.yaml"), *sorted(folder.glob(f"{stage}_*.yaml"))]
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"There is no recipe for {stage} in {folder}; name one with RECIPE=path.")
    raise UserError(f"Several recipes fit {stage}: {', '.join(map(str, found))}; name one with RECIPE=path.")


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe; it can be given back to `load`."""
    return yaml.safe_dump(recipe.resolved, sort_keys=False, allow_unicode=True)


def fingerprint(recipe: Recipe) -> str:
    """SHA-256 of the resolved recipe."""
    return hashlib.sha256(json.dumps(recipe.resolved, sort_keys=True).encode()).hexdigest()


def term_function(name: str, source: str = "") -> Callable[..., Any]:
    """The function `term` of a loss's file; `source` as in its TermSpec."""
    return modules.load(name, source).term


def head_function(name: str, source: str = "") -> Callable[..., Any] | None:
    """The function `head` of a loss's file, which makes what a term learns on the critic's features, or None."""
    return getattr(modules.load(name, source), "head", None)


def rollout_function(kind: str, source: str = "") -> Callable[..., Any]:
    """The rollout registered under `kind` in some module's ROLLOUTS."""
    return _rollouts(kind, source)[kind][0]


def own_files(recipe: Recipe) -> dict[str, Path]:
    """Files of losses and rollouts that are not the repository's, by name."""
    terms = {spec.name: spec.source for phase in recipe.phases for spec in phase.terms}
    rollout = {} if recipe.rollout is None else {recipe.rollout.kind: recipe.rollout.source}
    return {name: Path(source) for name, source in {**terms, **rollout}.items() if source}


# ---- pieces -----------------------------------------------------------------------------------------------


def _with_bases(path: Path, seen: tuple[Path, ...]) -> Source:
    source = read_yaml(path)
    base = source.data.pop("extends", None)
    if base is None:
        return source
    place = source.where.pop(("extends",), str(path))
    if not isinstance(base, str):
        raise UserError(f"{place}: extends takes the path of one file, this is {base!r}.")
    target = path.parent / base
    if target.resolve() in {p.resolve() for p in (*seen, path)}:
        raise UserError(f"{place}: extends goes round in a circle through {target}.")
    if not target.is_file():
        raise UserError(f"{place}: extends names {target}, which does not exist.")
    return merge(_with_bases(target, (*seen, path)), source)


def _schemas(cls: type, data: dict[str, Any], path: KeyPath, report: Report) -> None:
    """Build, in place, every block whose dataclass lives in another module (`metadata["schema"]`)."""
    for spec in fields(cls):
        at = (*path, spec.name)
        if spec.name == "data":
            block = data.setdefault("data", {})
            if isinstance(block, dict):
                data["data"] = dict(block)
                _schemas(DataRef, data["data"], at, report)
        elif "schema" in spec.metadata and (data.get(spec.name) is not None or spec.metadata.get("always")):
            module, _, name = spec.metadata["schema"].partition(":")
            block = data.get(spec.name) or {}
            data[spec.name] = build(getattr(importlib.import_module(module), name), block, at, report)


def _phases(data: dict[str, Any], report: Report) -> list[str]:
    """Turn every phase's `terms` mapping into TermSpecs; return the roles that the phases update."""
    phases = data.get("phases") or []
    if not isinstance(phases, list):
        report.add(("phases",), "a list of phases is needed here")
        data["phases"] = []
        return []
    checked, roles = [], []
    for index, phase in enumerate(phases):
        at = ("phases", str(index))
        if not isinstance(phase, dict):
            report.add(at, f"a mapping with update, every, terms is needed here, this is {phase!r}")
            continue
        terms = phase.get("terms")
        if not isinstance(terms, dict) or not terms:
            report.add(at, "a phase needs `terms`, a mapping from the name of a loss to its settings")
            terms = {}
        built = tuple(_term(str(name), block, (*at, "terms", str(name)), report) for name, block in terms.items())
        checked.append({**phase, "terms": built})
        roles.append(str(phase.get("update")))
    data["phases"] = checked
    return roles


def _term(name: str, block: Any, path: KeyPath, report: Report) -> TermSpec | None:
    block = {} if block is None else block
    try:
        source = modules.find(name, modules.shipped(), report.folders)
        module = None if source is None else modules.load(name, source)
    except UserError as error:
        report.add(path, error.message)
        return None
    if module is None or not hasattr(module, "term") or not hasattr(module, "Config"):
        lacks = "there is no loss of this name in recipes/ or beside the recipe"
        if source:
            report.add(path, f"{source} is no loss: it needs a dataclass Config and a function term")
        else:
            report.unknown(path, [*modules.shipped(), *modules.beside(report.folders)], lacks)
        return None
    if not isinstance(block, dict):
        report.add(path, f"a mapping is needed here, this is {block!r}")
        return None
    common = {key: block[key] for key in COMMON if key in block}
    rest = {key: value for key, value in block.items() if key not in common}
    config = _config(module.Config, rest, path, report, COMMON)
    return build(TermSpec, {"name": name, **common, "config": config, "source": source}, path, report)


def _config(cls: type, block: dict[str, Any], path: KeyPath, report: Report, also: Iterable[str]) -> Any:
    """Build `cls`, naming the keys in `also` as valid too when another is unknown."""
    names = [f.name for f in fields(cls)]
    unknown = [key for key in block if key not in names]
    for key in unknown:
        report.unknown((*path, str(key)), [*names, *also])
    return build(cls, {key: value for key, value in block.items() if key not in unknown}, path, report)


def _rollout(data: dict[str, Any], report: Report) -> None:
    block = data.pop("rollout", None)
    if block is None:
        return
    if not isinstance(block, dict) or "kind" not in block:
        report.add(("rollout",), "a mapping with a `kind` is needed here")
        return
    kind = str(block["kind"])
    try:
        own = modules.find(kind, modules.shipped(), report.folders) or ""  # a rollout of one's own is named as its file
        kinds = _rollouts(kind, own)
    except UserError as error:
        report.add(("rollout", "kind"), error.message)
        return
    if kind not in kinds:
        hint = f"one of {', '.join(sorted(kinds))}"
        report.add(("rollout", "kind"), f"there is no rollout '{kind}', it must be {hint}")
        return
    rest = {key: value for key, value in block.items() if key != "kind"}
    config = _config(kinds[kind][1], rest, ("rollout",), report, ("kind",))
    data["rollout"] = RolloutSpec(kind, config, own)


def _optimizer(data: dict[str, Any], roles: list[str], report: Report) -> None:
    """Flat keys are shared by all roles, a key named like a role overrides them for it."""
    block = data.pop("optimizer", None) or {}
    if not isinstance(block, dict):
        report.add(("optimizer",), f"a mapping is needed here, this is {block!r}")
        return
    names = [f.name for f in fields(OptimConfig)]
    shared = {key: value for key, value in block.items() if key in names}
    for key in block:
        if key not in names and key not in ROLES:
            report.unknown(("optimizer", str(key)), [*names, *roles])
    built = {}
    for role in dict.fromkeys(roles):
        own = block.get(role, {})
        if not isinstance(own, dict):
            report.add(("optimizer", role), f"a mapping is needed here, this is {own!r}")
            continue
        merged = {**shared, **own}
        at = ("optimizer", role) if role in block else ("optimizer",)
        if "lr" not in merged:
            report.add(at, f"the role '{role}' has no learning rate; give lr or {role}.lr")
            continue
        built[role] = build(OptimConfig, merged, at, report)
    for key in shared:  # an override that changes nothing would be a silent lie
        hidden = roles and all(key in (block.get(role) or {}) for role in roles)
        if hidden and report.where.get(("optimizer", key)) == COMMAND_LINE:
            report.add(("optimizer", key), f"every role has its own {key}; set optimizer.{roles[0]}.{key} instead")
    data["optimizer"] = built


def _rollouts(kind: str, own: str) -> dict[str, tuple[Callable[..., Any], type]]:
    """Every rollout by kind, with its Config: ROLLOUTS of distill.rollout, of the recipe modules, of the own file."""
    found: dict[str, tuple[Callable[..., Any], type]] = {}
    places = [importlib.import_module("distill.rollout"), *map(modules.load, modules.shipped())]
    for module in [*places, *([modules.load(kind, own)] if own else [])]:
        for name, entry in getattr(module, "ROLLOUTS", {}).items():
            found[name] = entry if isinstance(entry, tuple) else (entry, module.Config)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, RolloutSpec):
        return {"kind": value.kind, **(_plain(value.config) or {})}
    if isinstance(value, Phase):
        terms = {term.name: _plain(term) for term in value.terms}
        return {"update": value.update, "every": value.every, "terms": terms}
    if isinstance(value, TermSpec):
        cap = {"cap": value.cap} if value.cap else {}
        return {"weight": value.weight, "ramp_steps": value.ramp_steps, **cap, **(_plain(value.config) or {})}
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.init}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
