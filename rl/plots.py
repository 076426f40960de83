"""Curves for our pages: matplotlib figures as inline SVG, coloured by the page's CSS variables.

So one figure is right on a light and on a dark page. Not the page (`rl.page`, `rl.report`). Figures
are made without pyplot: no global state, no display, safe in a thread.
"""

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# By step, or by another number: temperature, distance.
Series = Mapping[Any, float]
Band = Mapping[Any, tuple[float, float]]

# Stand-ins that survive matplotlib; each becomes a CSS variable of the page.
INK, MUTED, GRID = "#010101", "#020202", "#030303"
COLOURS = ("#0a0101", "#0a0202", "#0a0303", "#0a0404", "#0a0505", "#0a0606", "#0a0707", "#0a0808")
# For curves that are themselves in an order: from cold to hot.
HEAT = ("#0b0101", "#0b0202", "#0b0303", "#0b0404", "#0b0505", "#0b0606", "#0b0707", "#0b0808")
_VARIABLES = (
    {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)"}
    | {colour: f"var(--s{number})" for number, colour in enumerate(COLOURS, start=1)}
    | {colour: f"var(--h{number})" for number, colour in enumerate(HEAT, start=1)}
)
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": MUTED,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}


@dataclass(frozen=True)
class Line:
    """One curve. `smooth`: raw values thin, their running mean bold. `band`: an interval.

    `dashed`: thin, something to compare with. `colour`: one of the stand-ins, instead of the next
    one. A curve without a name is not in the legend.
    """

    name: str
    values: Series
    smooth: bool = False
    dots: bool = False
    band: Band | None = None
    dashed: bool = False
    colour: str | None = None


@dataclass(frozen=True)
class Plot:
    """A figure, and the page's legend for it: (name, CSS colour) per curve; () if it needs none."""

    svg: str
    keys: tuple[tuple[str, str], ...]


def curves(
    lines: Sequence[Line],
    label: str,
    *,
    percent: bool = False,
    floor: float | None = None,
    wide: bool = False,
    x_label: str = "step",
) -> Plot | None:
    """Curves over steps, or whatever `x_label` says, as inline SVG; None if there is nothing.

    Args:
        label: what the picture shows, for readers who hear the page.
        percent: values are shares of 1, shown in %.
        floor: the lowest value of the axis, if it should be fixed.
    """
    drawn = [line for line in lines if line.values]
    if not drawn:
        return None
    with matplotlib.rc_context(_STYLE):
        figure, axes = _canvas(wide)
        chosen = [line.colour or COLOURS[n % len(COLOURS)] for n, line in enumerate(drawn)]
        for line, colour in zip(drawn, chosen, strict=True):
            _draw(axes, line, colour)
        if floor is not None:
            axes.set_ylim(bottom=floor)
        if percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
            axes.set_ylim(top=min(axes.get_ylim()[1], 1.02))
        _finish(axes, x_label, [x for line in drawn for x in line.values])
        names = [line.name for line in drawn] if len(drawn) > 1 else []
        return Plot(_svg(figure, label), _keys(names, chosen))


def stacked(
    parts: Mapping[str, Series],
    label: str,
    *,
    percent: bool = False,
    wide: bool = False,
    colours: Sequence[str] = COLOURS,
) -> Plot | None:
    """Parts of a whole over steps, stacked in the order given; None if there is nothing to draw."""
    parts = {name: values for name, values in parts.items() if any(values.values())}
    steps = sorted({step for values in parts.values() for step in values})
    if not steps:
        return None
    if len(steps) == 1:  # an area needs a width
        steps = [steps[0], steps[0] + 1]
        parts = {n: {s: next(iter(v.values())) for s in steps} for n, v in parts.items()}
    with matplotlib.rc_context(_STYLE):
        figure, axes = _canvas(wide)
        heights = [[values.get(step, 0.0) for step in steps] for values in parts.values()]
        axes.stackplot(steps, heights, colors=list(colours[: len(parts)]), linewidth=0, alpha=0.9)
        axes.set_ylim(bottom=0)
        axes.margins(x=0)
        if percent:
            axes.set_ylim(top=1)
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        _finish(axes, "step", steps)
        return Plot(_svg(figure, label), _keys(list(parts), colours))


def running_mean(values: Series, window: int) -> dict[Any, float]:
    """Mean of each value and up to `window - 1` before it."""
    steps, numbers = list(values), list(values.values())
    means = {}
    for end, step in enumerate(steps, start=1):
        part = numbers[max(0, end - window) : end]
        means[step] = sum(part) / len(part)
    return means


def _canvas(wide: bool) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(10.0 if wide else 5.0, 2.6), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _draw(axes: Axes, line: Line, colour: str) -> None:
    steps, values = list(line.values), list(line.values.values())
    if line.band:
        low = [line.band[step][0] for step in steps]
        high = [line.band[step][1] for step in steps]
        axes.fill_between(steps, low, high, color=colour, alpha=0.16, linewidth=0)
    if line.smooth and len(steps) > 4:
        axes.plot(steps, values, color=colour, linewidth=1, alpha=0.35)
        values = list(running_mean(line.values, max(3, len(steps) // 12)).values())
    marker = "o" if line.dots or len(steps) == 1 else None
    style = {"linestyle": (0, (4, 3)), "linewidth": 1.2} if line.dashed else {}
    axes.plot(steps, values, color=colour, marker=marker, markersize=5, **style)  # type: ignore[arg-type]


def _finish(axes: Axes, x_label: str, places: Sequence[float]) -> None:
    axes.set_axisbelow(True)
    if all(float(place).is_integer() for place in places):
        axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    axes.set_xlabel(x_label)


def _keys(names: Sequence[str], colours: Sequence[str]) -> tuple[tuple[str, str], ...]:
    pairs = zip(names, colours, strict=False)
    return tuple((name, _VARIABLES[colour]) for name, colour in pairs if name)


def _svg(figure: Figure, label: str) -> str:
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": label}):  # the same figure, the same file
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Group names repeat from figure to figure; only those that are referred to must stay.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # would hold for the whole page
    text = re.sub(r" font-family: [^;\"]*;?", "", text)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, variable)
    size = re.search(r'<svg[^>]* width="([\d.]+)pt"', text)
    width = f' style="max-width: {size.group(1)}pt"' if size else ""
    text = re.sub(r'( width| height)="[\d.]+pt"', "", text, count=2)
    name = html.escape(label, quote=True)
    return text.replace("<svg", f'<svg role="img" aria-label="{name}"{width}', 1)
