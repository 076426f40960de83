"""The commands of `unmask` for a run that goes on: audit, status, scale. Options and help only."""

from pathlib import Path
from typing import Annotated

import typer

from common.exits import exit_codes

app = typer.Typer()

Run = Annotated[str, typer.Option(help="run folder; or, with an address, the run's name")]
Address = Annotated[
    str | None, typer.Option(help="of the run's Ray cluster, host:port (or set RAY_ADDRESS)")
]


def example(*lines: str) -> str:
    """The epilogue of a help page. Backslashes keep the lines apart."""
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(f"[cyan]{line}[/cyan]" for line in lines)


@app.command(epilog=example("unmask audit --run runs/demo", "unmask audit --run runs/mine --json"))
def audit(
    run: Annotated[Path, typer.Option(help="run folder, finished or not")] = Path("runs/demo"),
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead")] = False,
) -> None:
    """Prove that every sample was generated, scored and trained once, or dropped for a reason.

    Exits 1 if something does not add up.
    """
    from rl.operate import audit_run

    with exit_codes():
        raise typer.Exit(audit_run(run, as_json))


@app.command(
    epilog=example(
        "unmask status --run runs/mine", "unmask status --run mine --address 10.0.0.1:6379 --json"
    )
)
def status(
    run: Run = "runs/demo",
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead")] = False,
) -> None:
    """How far a run is and how each of its workers does, while it goes on."""
    from rl.operate import show_status

    with exit_codes():
        show_status(run, address, as_json)


@app.command(
    epilog=example(
        "unmask scale --run runs/mine rollout=6",
        "unmask scale --run mine --address 10.0.0.1:6379 rollout=6 reward=2",
    )
)
def scale(
    sizes: Annotated[list[str], typer.Argument(metavar="role=n", help="rollout=6 reward=2")],
    run: Run = "runs/demo",
    address: Address = None,
) -> None:
    """Add or remove workers while a run goes on. Removed ones finish their work first."""
    from rl.operate import scale_run

    with exit_codes():
        scale_run(sizes, run, address)
