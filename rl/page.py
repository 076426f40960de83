"""What our HTML pages share: rendering, words for numbers, writing files whole. No page itself.

A page is one file without scripts or links to elsewhere; it extends `page.html.j2`.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from rl.plots import Plot


@dataclass(frozen=True)
class FigureBlock:
    """One figure of a page: `plot` is None if its numbers are not there (yet), as `empty` says."""

    section: str
    title: str
    words: str
    plot: Plot | None
    wide: bool = False
    empty: str = "nothing logged yet"


def sections(blocks: Sequence[FigureBlock]) -> list[tuple[str, list[FigureBlock]]]:
    """Figures under their headings; a heading that has no plot at all is left out."""
    names = dict.fromkeys(block.section for block in blocks if block.plot)
    return [(name, [block for block in blocks if block.section == name]) for name in names]


def render(template: str, **values: Any) -> str:
    """A page from the template beside this file; `percent` and `clock` are its filters."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": percent, "clock": clock}
    return environment.get_template(template).render(**values)


def percent(value: float | None) -> str:
    """0.123 -> "12.3 %"; a dash for None."""
    return "–" if value is None else f"{100 * value:.1f} %"


def clock(seconds: float | None) -> str:
    """Seconds as h:mm:ss or m:ss; a dash for None."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def plain(value: Any) -> Any:
    """For JSON, which has no NaN: null instead."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears only when it is complete."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
