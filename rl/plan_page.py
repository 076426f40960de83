"""What `unmask plan` does: read, work out, say if it fits and what to change (see `rl.plan`)."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common.errors import UserError
from rl.config import TrainConfig, load_train_config
from rl.plan import GIB, USABLE, Role, longest_sample, misfits, roles_of, store_bytes
from rl.plan_time import GPUS, LEARNER_SHARE, READING_SHARE, ROLLOUT_SHARE, Speed, estimate_speed
from rl.shape import Shape, find_shape


@dataclass(frozen=True)
class Machine:
    """What is there: GPUs, GiB of each, their kind (a key of `GPUS`)."""

    gpus: int
    gpu_mem_gib: float
    kind: str


def plan_run(
    config: Path, overrides: Sequence[str], model: Path | None, machine: Machine, as_json: bool
) -> int:
    """Print the plan of a training configuration; 0 if it fits, else 1.

    Raises:
        UserError: a configuration that cannot work anywhere, an unknown model or GPU.
    """
    if machine.kind not in GPUS:
        raise UserError(f"--gpu {machine.kind}: choose one of {', '.join(GPUS)}")
    settings = load_train_config(config, overrides)
    shape, source = find_shape(model or Path(settings.model.path))
    settings.rollout.decoding.resolve(shape.spec)
    problems = misfits(settings, shape, machine.gpus, machine.gpu_mem_gib)
    speed = None
    if machine.gpus and not problems:
        speed = estimate_speed(settings, shape, GPUS[machine.kind])
    change = remedy(settings, shape, machine) if problems else []
    if as_json:
        values = _values(settings, shape, machine, speed)
        values |= {"fits": not problems, "problems": problems, "change": change}
        print(json.dumps({"config": str(config), "shape_from": str(source)} | values, indent=2))
        return int(bool(problems))
    console = Console()
    console.print(
        f"{source}: {shape.parameters / 1e9:.2f} B parameters; longest sample "
        f"{longest_sample(settings, shape).tokens} forward tokens",
        highlight=False,
        soft_wrap=True,
    )
    roles = roles_of(settings, shape, machine.gpus)
    console.print(plan_table(roles, store_bytes(settings, shape), machine))
    if speed is not None:
        console.print(_speed_line(speed, machine), highlight=False, soft_wrap=True)
    for line in problems:
        console.print(f"does not fit: {line}", highlight=False, soft_wrap=True, markup=False)
    if change:
        console.print(f"it fits with: {' '.join(change)}", highlight=False, soft_wrap=True)
    elif problems:
        console.print("no setting that plan knows makes it fit: use more or larger GPUs")
    elif machine.gpus:
        console.print(f"fits: {USABLE:.0%} of {machine.gpu_mem_gib:g} GiB counted as usable")
    return int(bool(problems))


def _speed_line(speed: Speed, machine: Machine) -> str:
    return (
        f"about {speed.samples_per_s:.2f} samples/s: an estimate, rollout {speed.rollout_s:.0f} s "
        f"and update {speed.update_s:.0f} s a step if an {machine.kind} reaches "
        f"{ROLLOUT_SHARE:.0%} of its FLOPs ({READING_SHARE:.0%} of its bandwidth) in decoding and "
        f"{LEARNER_SHARE:.0%} in updates"
    )


def plan_table(roles: Sequence[Role], store: int, machine: Machine) -> Table:
    """Rows of GiB: what every process of a role holds, its peak, what is usable."""
    table = Table(title="GiB per process", title_justify="left")
    table.add_column("role")
    table.add_column("what")
    table.add_column("GPU" if machine.gpus else "memory", justify="right")
    table.add_column("host" if machine.gpus else "while loading", justify="right")
    for role in roles:
        name = f"{role.name} x {role.count}"
        for part in [*role.together, *role.phases]:
            what = part.name if part in role.together else f"{part.name} (in turn)"
            amount = f"{part.bytes / GIB:.2f}"
            cells = (amount, "") if part.where == "device" else ("", amount)
            table.add_row(name, what, *cells)
            name = ""
        peaks = (f"{amount / GIB:.2f}" for amount in (role.device_bytes, role.host_bytes))
        table.add_row("", "[bold]peak[/bold]", *peaks, end_section=True)
    table.add_row("object store", "weights, all versions kept", "", f"{store / GIB:.2f}")
    return table


def _values(
    config: TrainConfig, shape: Shape, machine: Machine, speed: Speed | None
) -> dict[str, Any]:
    roles = [
        asdict(role) | {"device_bytes": role.device_bytes, "host_bytes": role.host_bytes}
        for role in roles_of(config, shape, machine.gpus)
    ]
    shares = {"learner": LEARNER_SHARE, "rollout": ROLLOUT_SHARE, "reading": READING_SHARE}
    return {
        "parameters": shape.parameters,
        "machine": asdict(machine),
        "roles": roles,
        "object_store_bytes": store_bytes(config, shape),
        "speed": None if speed is None else asdict(speed) | {"assumed_shares": shares},
    }


def remedy(config: TrainConfig, shape: Shape, machine: Machine) -> list[str]:
    """Overrides that make it fit, fewest first; empty if none is known."""
    best: list[str] = []
    for changed, words in _changes(config, shape):
        if not misfits(changed, shape, machine.gpus, machine.gpu_mem_gib):
            best = words if not best or len(words) < len(best) else best
    return best


def _changes(config: TrainConfig, shape: Shape) -> Iterator[tuple[TrainConfig, list[str]]]:
    """Single changes, cheapest first; then all of them piled up in the same order."""
    single = [*_learner_changes(config, shape), *_rollout_changes(config)]
    piled: dict[str, Any] = {}
    piles = [piled := piled | change for change in single]
    for values in [*single, *piles]:
        words = [f"{key}={_text(value)}" for key, value in values.items()]
        yield _changed(config, values), words


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _learner_changes(config: TrainConfig, shape: Shape) -> Iterator[dict[str, Any]]:
    engine, ranks = config.engine, config.cluster.learner.ranks
    if not engine.gradient_checkpointing:
        yield {"engine.gradient_checkpointing": True}
    if config.algorithm.tokens_per_micro_batch > longest_sample(config, shape).tokens:
        yield {"algorithm.tokens_per_micro_batch": longest_sample(config, shape).tokens}
    if engine.precision == "fp32":
        yield {"engine.precision": "bf16"}
    if config.algorithm.beta > 0 and not engine.offload_reference and engine.lora is None:
        yield {"engine.offload_reference": True}
    if engine.kind == "deepspeed" and ranks > 1:
        for stage in range(max(engine.zero_stage + 1, 2), 4):
            yield {"engine.zero_stage": stage}
        for moved in range(1, config.cluster.rollout.max):
            left = config.cluster.rollout.max - moved
            yield {
                "cluster.learner.ranks": ranks + moved,
                "cluster.rollout.min": min(left, config.cluster.rollout.min),
                "cluster.rollout.max": left,
            }
    if engine.kind == "deepspeed" and not engine.offload_optimizer:
        yield {"engine.zero_stage": 3, "engine.offload_optimizer": True}


def _rollout_changes(config: TrainConfig) -> Iterator[dict[str, Any]]:
    rows = config.rollout.decoding.max_rows
    for divisor in (2, 4, 8):
        if rows >= divisor:
            yield {"rollout.decoding.max_rows": rows // divisor}


def _changed(config: TrainConfig, values: dict[str, Any]) -> TrainConfig:
    """The configuration with dotted keys set, two or three deep."""
    for key, value in values.items():
        names = key.split(".")
        holder: Any = config
        for name in names[:-1]:
            holder = getattr(holder, name)
        for depth in range(len(names) - 1, -1, -1):
            parent: Any = config
            for name in names[:depth]:
                parent = getattr(parent, name)
            value = _with(parent, names[depth], value)
        config = value
    return config


def _with(holder: Any, name: str, value: Any) -> Any:
    if hasattr(holder, "model_copy"):
        return holder.model_copy(update={name: value})
    return replace(holder, **{name: value})
