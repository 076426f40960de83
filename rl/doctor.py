"""`unmask doctor`: what this machine has, line by line, and what to do about each failing line.

Looks and never mends. Needs nothing but the core dependencies, and imports no Ray: versions are
read from the installed metadata.
"""

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from sandbox.probe import Capabilities

GIB = 1024**3
MIN_PYTHON = (3, 11)
MIN_MEMORY_GIB, MIN_DISK_GIB, MIN_SHM_GIB = 4.0, 4.0, 0.25
CORE = ("torch", "transformers", "ray", "deepspeed", "datasets", "pydantic")
EXTRAS = {
    "wandb": "metrics.wandb",
    "tensorboard": "metrics.tensorboard",
    "vllm": "the vLLM engine",
    "peft": "engine.lora",
    "flash-attn": "fused attention on a GPU",
    "docker": "the Docker sandbox",
}

State = Literal["ok", "note", "fail"]


@dataclass(frozen=True)
class Line:
    """One finding. `fail` makes `unmask doctor` exit 1; `note` is worth knowing but no fault."""

    what: str
    found: str
    state: State = "ok"
    remedy: str = ""


def examine(folder: Path = Path()) -> list[Line]:
    """Every check; `folder` is where runs will be written."""
    checks: list[Callable[[], list[Line]]] = [
        check_python,
        check_cores,
        check_memory,
        lambda: check_disk(folder),
        check_shm,
        check_sandbox,
        check_languages,
        check_docker,
        check_packages,
        check_gpu,
        check_extras,
    ]
    return [line for check in checks for line in check()]


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> list[Line]:
    """Python is new enough."""
    text = ".".join(str(part) for part in version)
    if version[:2] < MIN_PYTHON:
        return [
            Line("Python", text, "fail", "install Python 3.11 or newer; make PYTHON=python3.12")
        ]
    return [Line("Python", text)]


def check_cores() -> list[Line]:
    """Cores that this process may use."""
    count = len(os.sched_getaffinity(0))
    if count < 2:
        remedy = "rollout, reward and learner take turns on one core: expect twice the time"
        return [Line("CPU cores", str(count), "note", remedy)]
    return [Line("CPU cores", str(count))]


def check_memory(free: float | None = None) -> list[Line]:
    """`free` GiB of memory; None measures."""
    gib = psutil.virtual_memory().available / GIB if free is None else free
    if gib < MIN_MEMORY_GIB:
        remedy = f"`make demo` needs up to {MIN_MEMORY_GIB:.0f} GiB; close other programs"
        return [Line("memory available", f"{gib:.1f} GiB", "fail", remedy)]
    return [Line("memory available", f"{gib:.1f} GiB")]


def check_disk(folder: Path) -> list[Line]:
    """Room for runs and checkpoints, and the permission to write them."""
    gib = shutil.disk_usage(folder).free / GIB
    if gib < MIN_DISK_GIB:
        remedy = f"free {MIN_DISK_GIB:.0f} GiB, or write runs elsewhere: run.folder=/path"
        return [Line("disk", f"{gib:.1f} GiB free", "fail", remedy)]
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        remedy = "run from a folder that you may write to, or set run.folder=/path"
        return [Line("disk", f"{folder.resolve()} is not writable ({error})", "fail", remedy)]
    return [Line("disk", f"{gib:.1f} GiB free")]


def check_shm(folder: Path = Path("/dev/shm")) -> list[Line]:
    """Shared memory for Ray's object store."""
    remedy = "in a container, start it with --shm-size=1g; without Ray: cluster.kind=local"
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return [Line("shared memory", f"{folder} is missing or not writable", "fail", remedy)]
    gib = shutil.disk_usage(folder).free / GIB
    state: State = "ok" if gib >= MIN_SHM_GIB else "fail"
    return [Line("shared memory", f"{gib:.2f} GiB", state, "" if state == "ok" else remedy)]


def check_sandbox() -> list[Line]:
    """How well untrusted programs can be locked in here: found out by running one."""
    from sandbox.probe import probe

    found = probe()
    why = "; ".join(f"no {level}: {reason}" for level, reason in found.refused)
    text = found.level + (f" ({why})" if why else "")
    remedy = (
        "permit unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1), use a "
        "kernel with Landlock, or accept plain limits with allow_unsafe"
    )
    state: State = "ok" if found.level == "namespace" else "note"
    if found.level in ("none", "unsafe"):
        state = "fail"
    return [
        Line("sandbox", text, state, remedy if state == "fail" else ""),
        *check_sandbox_parts(found),
    ]


def check_sandbox_parts(found: "Capabilities") -> list[Line]:
    """What the level is made of, and what bounds all processes of a program together."""
    from sandbox.cgroup import availability
    from sandbox.probe import LEVELS

    refused = dict(found.refused)
    ladder = [f"{level}: {'no' if level in refused else 'yes'}" for level in LEVELS]
    ladder = ladder[: len(refused) + 1]  # below the level found nothing was tried
    parts = [
        f"Landlock {found.landlock_abi or 'none'}",
        f"seccomp {'yes' if found.seccomp else 'no'}",
        "as root" if found.as_root else "as an ordinary user",
    ]
    groups = Line("sandbox control groups", availability())
    if groups.found.startswith("none"):
        remedy = "memory of all processes is then looked at ten times a second"
        groups = replace(groups, state="note", remedy=remedy)
    return [Line("sandbox ladder", ", ".join(ladder + parts)), groups]


def check_languages() -> list[Line]:
    """In which languages programs can be judged here, and what to install for the others."""
    from sandbox.languages import LANGUAGES, RUNNERS, versions

    found = {"python": platform.python_version()} | versions(os.environ.get("PATH"))
    lines = [Line("languages", ", ".join(f"{name} {version}" for name, version in found.items()))]
    missing = [name for name in LANGUAGES if name not in found]
    if missing:
        install = {runner.language: runner.install for runner in reversed(RUNNERS)}
        remedy = "; ".join(f"{name}: install {install[name]}" for name in missing)
        text = f"only for problems in these languages; {remedy}"
        lines.append(Line("languages missing", ", ".join(missing), "note", text))
    return lines


def check_docker(summary: Callable[[], str] | None = None) -> list[Line]:
    """The Docker engine, for those who want `backend: docker`; a note where there is none."""
    from sandbox.docker import engine_summary
    from sandbox.records import SandboxError

    try:
        return [Line("Docker", (summary or engine_summary)())]
    except SandboxError as error:
        return [Line("Docker", "none", "note", f"not needed for `make demo`; {error}")]


def check_packages(version: Callable[[str], str] = importlib.metadata.version) -> list[Line]:
    """The core dependencies that are installed, by version."""
    lines = []
    for name in CORE:
        try:
            lines.append(Line(name, version(name)))
        except importlib.metadata.PackageNotFoundError:
            lines.append(Line(name, "not installed", "fail", "run `make setup`"))
    return lines


def check_gpu() -> list[Line]:
    """CUDA devices that torch can use."""
    import torch

    if not torch.cuda.is_available():
        text = "none" if torch.version.cuda else "none (this torch is a CPU build)"
        return [Line("GPU", text, "note", "not needed for `make demo`")]
    lines = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        lines.append(Line(f"GPU {index}", f"{device.name}, {device.total_memory / GIB:.0f} GiB"))
    return lines


def check_extras(version: Callable[[str], str] = importlib.metadata.version) -> list[Line]:
    """Optional packages: absent is fine, so long as nothing asks for them."""
    lines = []
    for name, purpose in EXTRAS.items():
        try:
            lines.append(Line(f"{name} (optional)", version(name)))
        except importlib.metadata.PackageNotFoundError:
            text = f"for {purpose}: pip install {name}"
            lines.append(Line(f"{name} (optional)", "not installed", "note", text))
    return lines


def show(lines: list[Line], console: Console) -> int:
    """Print the table; returns the exit code: 0, or 1 if a line fails."""
    table = Table(header_style="bold")
    table.add_column("")
    table.add_column("what", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("what to do", overflow="fold")
    marks = {"ok": "[green]✓[/green]", "note": "[yellow]·[/yellow]", "fail": "[red]✗[/red]"}
    for line in lines:
        style = "dim" if line.state == "note" else None
        table.add_row(marks[line.state], line.what, line.found, line.remedy, style=style)
    console.print(table)
    failing = sum(line.state == "fail" for line in lines)
    if failing:
        noun = "line fails" if failing == 1 else "lines fail"
        console.print(f"{failing} {noun}; the last column says what to do")
        return 1
    console.print("all good: try `make demo`")
    return 0
