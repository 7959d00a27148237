"""`make plan`: what a recipe costs before it runs, whether it fits, and the cheapest change that makes it fit.

recipe, GPUs, memory per GPU, engine -> parameters per role, bytes per GPU by kind, FLOPs, traffic, hours, disk.
Calls and lifetimes come from the recipe's own code (`distill/probe.py`), bytes and FLOPs per call from the
configuration (`distill/costs.py`). Seconds assume a share of the card's peak (`UTILIZATION`), unconfirmed by any GPU
so far: docs/GPU.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from distill.adapters import LoRARoles
from distill.batches import clip_of
from distill.config import Recipe, load
from distill.costs import parameters
from distill.engine.config import EngineConfig, load_engine
from distill.errors import UserError
from distill.meter import KINDS, Meter
from distill.options import Options
from distill.probe import Step, simulate
from distill.standing import SHARDED, Setting
from teacher.lora import LoRAConfig

GB = 1e9
# Dense bf16 FLOP/s by memory in GB, from the makers' data sheets: RTX 4090, A100, A100/H100, H200, B200.
PEAK = {24: 165e12, 40: 312e12, 80: 989e12, 141: 989e12, 192: 2250e12}
UTILIZATION = 0.4  # of that peak, in matrix products
NVLINK, NETWORK, NODE = 300e9, 40e9, 8  # bytes per second and GPU within and between nodes, GPUs per node
CONTEXT, FRAGMENTED = 1.5 * GB, 0.05  # of every GPU: CUDA's and NCCL's own, and what the allocator cannot use
DRAWS = 3  # of a rollout's length and exit step


@dataclass(frozen=True)
class Plan:
    """One setting, worked out. Bytes and FLOPs are per GPU; `memory` is at the worst moment, by kind."""

    recipe: str
    engine: str
    gpus: int
    gpu_memory: float
    parameters: dict[str, dict[str, int]]
    memory: dict[str, float]
    flops: float
    model_flops: float
    traffic: float
    seconds: float
    hours: float
    batch: int
    micro_batch: int
    accumulation: int
    checkpoint: float
    warnings: tuple[str, ...]

    @property
    def total(self) -> float:
        return sum(self.memory.values())

    @property
    def room(self) -> float:
        """What a step may use of the GPU."""
        return self.gpu_memory * (1 - FRAGMENTED) - CONTEXT

    @property
    def fits(self) -> bool:
        return self.total <= self.room


@dataclass(frozen=True)
class Change:
    """One thing done to make it fit: what to write, why, and the bytes per GPU after it."""

    what: str
    why: str
    after: float


def command(options: Options) -> str:
    """`python -m distill plan`: the plan as text, or as JSON with --json."""
    if options.recipe is None:
        raise UserError("Nothing to plan: give RECIPE=recipes/17b/stage3_self_forcing.yaml.")
    recipe = load(options.recipe, options.overrides, options.variant)
    gpus, memory = _number(options, "gpus", 8), _number(options, "gpu-mem", 80)
    engine = _engine(options, gpus)
    first = plan(Setting(recipe, gpus, engine), memory * GB)
    changes, last = ([], first) if first.fits else make_fit(Setting(recipe, gpus, engine), memory * GB)
    if options.own.get("json"):
        return json.dumps(as_data(first, changes, last), indent=1)
    return text(first, changes, last)


def plan(setting: Setting, gpu_memory: float) -> Plan:
    """Work out one setting."""
    recipe = setting.recipe
    if not recipe.phases:
        raise UserError(f"{recipe.name} trains nothing, there is no step to plan: give a recipe of a stage.")
    small = replace(recipe, train=replace(recipe.train, batch_size=setting.micro_batch))
    peak, steps = _simulated(small, setting)
    memory = dict(peak)
    for row in setting.bytes().values():
        for kind, size in row.items():
            memory[kind] += size
    flops, model_flops = (_per_step(small, steps, executed) for executed in (True, False))
    traffic = _traffic(setting, small, steps)
    speed = NVLINK if setting.processes <= NODE else NETWORK
    compute, talk = flops / (_peak(gpu_memory) * UTILIZATION), traffic / speed
    seconds = max(compute, talk) if setting.engine.kind in SHARDED else compute + talk
    train = recipe.train
    return Plan(
        recipe=recipe.name,
        engine=setting.engine.kind,
        gpus=setting.processes,
        gpu_memory=gpu_memory,
        parameters=_parameters(setting),
        memory=memory,
        flops=flops,
        model_flops=model_flops,
        traffic=traffic,
        seconds=seconds,
        hours=seconds * train.steps / 3600,
        batch=train.batch_size * train.grad_accumulation,
        micro_batch=setting.micro_batch,
        accumulation=train.grad_accumulation,
        checkpoint=setting.checkpoint_bytes(),
        warnings=tuple(_warnings(setting)),
    )


_known: dict[str, tuple[dict[str, float], list[Step]]] = {}


def _simulated(recipe: Recipe, setting: Setting) -> tuple[dict[str, float], list[Step]]:
    """(bytes by kind at the worst moment beside what stands, steps); the same question is worked out once."""
    states = {role: setting.state(role) for role in ("teacher", "backbone", *setting.trained)}
    key = repr((recipe, setting.machine, states))
    if key not in _known:
        meter = Meter()
        steps = simulate(recipe, clip_of(recipe.data), setting.machine, meter, setting.state, DRAWS)
        _known[key] = (meter.peak, steps)
    return _known[key]


# ---- making it fit ----------------------------------------------------------------------------------------


def make_fit(setting: Setting, gpu_memory: float) -> tuple[list[Change], Plan]:
    """Changes in order of what they cost the user, until it fits; what later ones make needless is dropped."""
    taken: list[str] = []
    current, now = setting, plan(setting, gpu_memory)
    for name in REMEDIES:
        if now.fits:
            break
        for changed in _variants(name, current):
            after = plan(changed, gpu_memory)
            if after.total < 0.99 * now.total:
                current, now = changed, after
                taken += [name] if name not in taken else []
            if now.fits:
                break
    for name in reversed(taken[:-1]):
        without = _apply(setting, [other for other in taken if other != name], gpu_memory)
        if plan(without, gpu_memory).fits:
            taken.remove(name)
    changes, current = [], setting
    for name in taken:
        current = _apply(current, [name], gpu_memory)
        changes.append(Change(*_told(name, current), plan(current, gpu_memory).total))
    return changes, plan(current, gpu_memory)


def _apply(setting: Setting, names: list[str], gpu_memory: float) -> Setting:
    for name in names:
        for changed in _variants(name, setting):
            setting = changed
            if plan(setting, gpu_memory).fits:
                break
    return setting


def _variants(name: str, setting: Setting) -> Iterator[Setting]:
    """The setting with a remedy, in growing doses; nothing where it does not apply."""
    recipe, engine = setting.recipe, setting.engine
    several = setting.processes > 1
    if name == "checkpointing" and not recipe.model.checkpoint_blocks:
        yield replace(setting, recipe=replace(recipe, model=replace(recipe.model, checkpoint_blocks=True)))
    elif name == "sharding" and several and engine.kind not in SHARDED:
        yield replace(setting, engine=EngineConfig(kind="fsdp2"))
    elif name in ("LoRA critic", "LoRA student"):
        role = "critic" if name == "LoRA critic" else setting.product
        lora = recipe.lora or LoRARoles()
        if role in setting.trained and role != "teacher" and lora.of(role) is None:
            rank = LoRAConfig(64, 64.0) if role == "critic" else LoRAConfig(128, 128.0)
            changed = replace(recipe, lora=replace(lora, **{role: rank}))
            yield replace(setting, recipe=changed, from_the_start=True)
    elif name == "offload optimizer" and engine.kind not in ("plain", "ddp") and not engine.offload_optimizer:
        yield replace(setting, engine=replace(engine, offload_optimizer=True))
    elif name == "offload teacher" and engine.kind in SHARDED and not engine.offload_frozen:
        yield replace(setting, engine=replace(engine, offload_frozen=True))
    elif name == "fewer gradient chunks" and hasattr(recipe.rollout and recipe.rollout.config, "grad_chunks"):
        assert recipe.rollout is not None
        for count in range(recipe.rollout.config.grad_chunks - 1, 0, -1):
            config = replace(recipe.rollout.config, grad_chunks=count)
            yield replace(setting, recipe=replace(recipe, rollout=replace(recipe.rollout, config=config)))
    elif name == "smaller batch" and setting.micro_batch > 1:
        train = recipe.train
        whole = train.batch_size * train.grad_accumulation
        for batch in [setting.processes * k for k in range(setting.micro_batch - 1, 0, -1)]:
            if whole % batch == 0:
                smaller = replace(train, batch_size=batch, grad_accumulation=whole // batch)
                yield replace(setting, recipe=replace(recipe, train=smaller))
    elif name == "more GPUs" and engine.kind != "plain":
        for times in (2, 4, 8, 16):
            yield replace(setting, processes=setting.processes * times)


REMEDIES = (
    "checkpointing",
    "sharding",
    "LoRA critic",
    "LoRA student",
    "offload optimizer",
    "offload teacher",
    "fewer gradient chunks",
    "smaller batch",
    "more GPUs",
)


def _told(name: str, setting: Setting) -> tuple[str, str]:
    """(what to write, why it comes at this place)."""
    recipe, product = setting.recipe, setting.product
    chunks = getattr(recipe.rollout and recipe.rollout.config, "grad_chunks", 0)
    batch = f"train.batch_size={recipe.train.batch_size} train.grad_accumulation={recipe.train.grad_accumulation}"
    return {
        "checkpointing": ('SET="model.checkpoint_blocks=true"', "a block is computed twice, the numbers are the same"),
        "sharding": (
            "ACCELERATE=recipes/accelerate/fsdp2.yaml",
            "weights, gradients and moments in shards, the numbers are the same",
        ),
        "LoRA critic": (
            'SET="lora.critic.rank=64"',
            "the critic only follows the student; its gradients and moments shrink to those of the adapters",
        ),
        "LoRA student": (
            f'SET="lora.{product}.rank=128", in the stages before as well',
            "the same for what is learned; one base then serves teacher, critic and student",
        ),
        "offload optimizer": ("offload_optimizer: true in ACCELERATE", "the numbers are the same, every update waits"),
        "offload teacher": ("offload_frozen: true in ACCELERATE", "the numbers are the same, its weights travel"),
        "fewer gradient chunks": (f'SET="rollout.grad_chunks={chunks}"', "fewer chunks learn per rollout"),
        "smaller batch": (f'SET="{batch}"', "the same effective batch in more, smaller steps"),
        "more GPUs": (f"GPUS={setting.processes}", "smaller shards; keys and values stay whole on each"),
    }[name]


# ---- numbers ----------------------------------------------------------------------------------------------


def _per_step(recipe: Recipe, steps: list[Step], executed: bool) -> float:
    """FLOPs of an average optimizer step: phases by their cadence, rollouts by the mean of their draws."""
    total = 0.0
    for phase in recipe.phases:
        own = [step.flops(recipe, executed) for step in steps if step.role == phase.update]
        total += sum(own) / len(own) / phase.every
    return total * recipe.train.grad_accumulation


def _traffic(setting: Setting, recipe: Recipe, steps: list[Step]) -> float:
    """Bytes that a GPU takes in per average step: gathered weights for every call, gradients to be shared."""
    n, kind, whole = setting.processes, setting.engine.kind, parameters(recipe.model)
    if n == 1:
        return 0.0
    part, total = (n - 1) / n, 0.0
    for phase in recipe.phases:
        own = [step for step in steps if step.role == phase.update]
        gathers = sum(1 + call.graph for step in own for call in step.calls) / len(own)
        gathered = gathers * setting.machine.compute * whole * (kind in SHARDED)
        shared = setting.sizes(phase.update) * (4.0 if kind in SHARDED else 8.0)
        total += part * (gathered * recipe.train.grad_accumulation + shared) / phase.every
    return total


def _peak(gpu_memory: float) -> float:
    return PEAK[min(PEAK, key=lambda size: abs(size - gpu_memory / GB))]


def _parameters(setting: Setting) -> dict[str, dict[str, int]]:
    rows = {role: {"learns": setting.sizes(role), "frozen": 0} for role in setting.trained}
    return rows | {name: {"learns": 0, "frozen": size} for name, size in setting.frozen().items()}


def _warnings(setting: Setting) -> Iterator[str]:
    train, n = setting.recipe.train, setting.processes
    if train.batch_size % n:
        aim = train.batch_size * train.grad_accumulation
        hint = (
            f'SET="train.batch_size={n} train.grad_accumulation={aim // n}"'
            if aim % n == 0
            else "another number of GPUs"
        )
        yield (
            f"the recipe aims at {aim} clips per update, {train.batch_size} at a time, which cannot be split over {n} "
            f"GPUs and would become {setting.micro_batch * n * train.grad_accumulation}: take {hint}"
        )
    if n > 1 and setting.engine.kind == "plain":
        yield f"the engine is plain, {n - 1} of {n} GPUs would idle: give ACCELERATE="


def _number(options: Options, name: str, default: int) -> int:
    given = options.own.get(name) or str(default)
    if not given.isdigit() or int(given) < 1:
        raise UserError(f"{name.upper().replace('-', '_')}={given} is not a whole number above 0.")
    return int(given)


def _engine(options: Options, gpus: int) -> EngineConfig:
    given = options.own.get("accelerate") or str(getattr(options, "accelerate", None) or "")
    return load_engine(given) if given else EngineConfig(kind="ddp" if gpus > 1 else "plain")


# ---- words ------------------------------------------------------------------------------------------------


def as_data(first: Plan, changes: list[Change], last: Plan) -> dict[str, Any]:
    """The plan for machines; bytes and FLOPs as plain numbers."""
    facts = {**asdict(first), "total": first.total, "room": first.room, "fits": first.fits}
    after = {"memory": last.memory, "total": last.total, "seconds": last.seconds, "gpus": last.gpus, "fits": last.fits}
    return {**facts, "changes": [asdict(change) for change in changes], "after": after}


def text(first: Plan, changes: list[Change], last: Plan) -> str:
    """The plan for people."""
    p = first
    lines = [f"{p.recipe} on {p.gpus} GPU{'s' * (p.gpus > 1)} of {p.gpu_memory / GB:g} GB, engine {p.engine}", ""]
    for role, row in p.parameters.items():
        what = f"{row['learns'] / 1e6:,.0f}M learn" if row["learns"] else f"{row['frozen'] / 1e6:,.0f}M frozen"
        lines.append(f"  {role:18} {what}")
    lines += [
        "",
        f"  EFFECTIVE BATCH {p.batch} clips per update = {p.micro_batch} per GPU x {p.gpus} GPUs x "
        f"{p.accumulation} micro-steps",
    ]
    lines += [f"  WARNING: {warning}" for warning in p.warnings]
    lines += ["", "  memory per GPU at the worst moment, GB"]
    lines += [f"    {kind:12} {p.memory[kind] / GB:8.1f}" for kind in KINDS]
    lines += [
        f"    {'sum':12} {p.total / GB:8.1f} of {p.room / GB:.1f} usable: {'fits' if p.fits else 'DOES NOT FIT'}",
        "",
    ]
    lines.append(_speed(p))
    lines.append(f"  disk per checkpoint {p.checkpoint / GB:,.1f} GB")
    if changes or not p.fits:
        lines += ["", "  the cheapest changes, in order:"]
        lines += [f"    {c.what}\n      {c.why}: {c.after / GB:.1f} GB" for c in changes]
        verdict = f"it fits with {last.total / GB:.1f} GB" if last.fits else "IT STILL DOES NOT FIT"
        lines += [f"  then {verdict} on {last.gpus} GPUs", _speed(last)]
    return "\n".join(lines)


def _speed(p: Plan) -> str:
    return (
        f"  {p.flops / 1e15:,.3g} PFLOP per step and GPU ({p.model_flops / 1e15:,.3g} without recomputation), "
        f"{p.traffic / GB:,.0f} GB over the interconnect, about {p.seconds:,.1f} s a step, {p.hours:,.1f} h "
        f"(estimated at {UTILIZATION:.0%} of the card's peak)"
    )
