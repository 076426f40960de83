"""`analysis.html`, `analysis.json` and the console's tables. Not the measuring (`rl.analyze`)."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from rl import page
from rl.analysis import Analysis, AtTemperature, Effect, SinkPoint, ties_rule
from rl.batch import AR_NESS_K
from rl.estimates import Estimate, bootstrap
from rl.page import FigureBlock
from rl.plots import COLOURS, HEAT, Line, curves

JSON_FILE, HTML_FILE = "analysis.json", "analysis.html"
# A mean over fewer problems than this share of the best-known distance is not drawn.
THIN = 0.1
QUALITY, ORDER = "Passing, diversity, speed", "Order of unmasking"
WHICH_PASS = ("first", "second", "third", "fourth")


def write_analysis(folder: Path, analysis: Analysis) -> None:
    """Write both files; each appears only when it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    values = page.plain(asdict(analysis))
    page.write_whole(folder / JSON_FILE, json.dumps(values, indent=1) + "\n")
    page.write_whole(folder / HTML_FILE, render(analysis))


def render(analysis: Analysis) -> str:
    """The page."""
    facts = [
        ("problems", str(analysis.problems)),
        ("samples per problem and temperature", str(analysis.samples)),
        ("completions", f"{analysis.completions:,}"),
        ("wall time", page.clock(sum(analysis.seconds.values()))),
        ("seed", str(analysis.seed)),
    ]
    return page.render(
        "analysis.html.j2",
        name=analysis.checkpoint,
        analysis=analysis,
        facts=facts,
        effects=[(effect, found_words(analysis, effect)) for effect in analysis.effects],
        sections=page.sections(figures(analysis)),
        top=_top(analysis),
        decoding=json.dumps(analysis.decoding, indent=2),
    )


def temperature_table(analysis: Analysis) -> Table:
    """One line per temperature for the console."""
    top = _top(analysis)
    table = Table(header_style="bold")
    heads = ("T", "pass@1 %", f"pass@{top} %", "distinct\n%", "global\nAR@1", "local\nAR@1")
    for head in (*heads, "certain\n%"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in analysis.temperatures:
        rates = [row.pass_at_k.get(k, bootstrap([])) for k in ("1", top)]
        shares = [f"{row.ar_global['1'].value:.3f}", f"{row.ar_local['1'].value:.3f}"]
        table.add_row(
            f"{row.temperature:g}",
            *map(_with_range, rates),
            f"{100 * row.distinct.value:.1f}",
            *shares,
            f"{100 * row.certain.value:.1f}",
        )
    return table


def speed_table(analysis: Analysis) -> Table:
    """Greedy quality by tokens a pass for the console."""
    table = Table(header_style="bold")
    for head in ("tokens a pass", "measured", "greedy pass@1 %", "against 1, in pairs"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in analysis.speeds:
        table.add_row(
            f"{row.nominal}x",
            f"{row.tokens_per_step:.2f}",
            _with_range(row.pass_at_1),
            "" if row.nominal == 1 else points(row.minus_1x),
        )
    for speed in analysis.speeds_left_out:
        table.add_row(
            f"{speed}x", "", f"blocks of {analysis.block_size} are too small", style="dim"
        )
    return table


def effect_lines(analysis: Analysis) -> list[str]:
    """The published effects and the cautions, a sentence each."""
    lines = [
        f"{effect.claim}: {found_words(analysis, effect)} ({effect.quantity} "
        f"{points(effect.difference)} from {effect.from_temperature:g} to "
        f"{effect.to_temperature:g})"
        for effect in analysis.effects
    ]
    return lines + analysis.cautions


def found_words(analysis: Analysis, effect: Effect) -> str:
    """What became of a published effect, in a few words."""
    if effect.found == "yes" and effect.quantity.startswith("ar_") and ties_rule(analysis):
        return "found, maybe by ties"
    return {"yes": "found", "no": "the reverse", "unclear": "not told from nothing"}[effect.found]


def points(estimate: Estimate) -> str:
    """A difference of shares in percentage points, with its interval."""
    value, low, high = (100 * part for part in (estimate.value, estimate.low, estimate.high))
    return f"{value:+.1f} points [{low:+.1f}, {high:+.1f}]"


def figures(analysis: Analysis) -> list[FigureBlock]:
    """Every figure in the order of the page."""
    return [
        *_passing(analysis),
        _speed(analysis),
        *_order(analysis),
        _certain(analysis),
        _greedy_order(analysis),
        *_sink(analysis),
    ]


def _passing(analysis: Analysis) -> list[FigureBlock]:
    rows = analysis.temperatures
    by_k = [
        Line(
            f"T = {row.temperature:g}",
            {int(k): rate.value for k, rate in row.pass_at_k.items()},
            dots=True,
            colour=HEAT[round((len(HEAT) - 1) * number / max(len(rows) - 1, 1))],
        )
        for number, row in enumerate(rows)
    ]
    ks = list(rows[0].pass_at_k)
    by_heat = [
        _line(f"k = {k}", rows, _field("pass_at_k", k))
        for k in dict.fromkeys((ks[0], ks[len(ks) // 2], ks[-1]))
    ]
    distinct = [_line("distinct", rows, _field("distinct"))]
    return [
        FigureBlock(
            QUALITY,
            "pass@k by temperature of the samples",
            "Share of problems that at least one of k samples solves (unbiased estimate). A colder "
            "model starts higher; a hotter one has more to gain from another try.",
            curves(by_k, "pass@k over k", percent=True, x_label="k"),
        ),
        FigureBlock(
            QUALITY,
            "pass@k over temperature",
            "The same by temperature, with 95 % intervals over problems.",
            curves(by_heat, "pass@k over temperature", percent=True, x_label="temperature"),
        ),
        FigureBlock(
            QUALITY,
            "Distinct completions",
            "Different texts among the samples of a problem. Groups that all say the same cannot "
            "teach reinforcement learning anything.",
            curves(
                distinct, "distinct completions over temperature",
                percent=True, floor=0, x_label="temperature",
            ),
        ),
    ]  # fmt: skip


def _order(analysis: Analysis) -> list[FigureBlock]:
    rows, chance = analysis.temperatures, analysis.random_order
    words = {
        "global": "Share of tokens fixed among the k leftmost that were still masked; 1 at k = 1 "
        "is strictly left to right.",
        "local": "Share of tokens fixed right after their k left neighbours, in that order.",
    }
    blocks = []
    for kind, text in words.items():
        lines = []
        for k, colour in zip(map(str, AR_NESS_K), COLOURS, strict=False):
            level = chance[kind][k]
            known = _line(f"k = {k}", rows, _field(f"ar_{kind}", k), colour)
            flat = {row.temperature: level for row in rows}
            lines += [known, Line("", flat, dashed=True, colour=colour)]
        blocks.append(
            FigureBlock(
                ORDER,
                f"{kind.capitalize()} AR-ness",
                f"{text} Dashed: the same lengths in random order within blocks.",
                curves(
                    lines, f"{kind} AR-ness over temperature",
                    percent=True, floor=0, x_label="temperature",
                ),
            )
        )  # fmt: skip
    return blocks


def _certain(analysis: Analysis) -> FigureBlock:
    lines = [_line("certain", analysis.temperatures, _field("certain"))]
    return FigureBlock(
        ORDER,
        "Tokens that ties may have ordered",
        "Share of tokens fixed as sure as an order can tell. Of several such places the leftmost "
        "goes first, so where this is high, AR-ness is that rule's and not the model's.",
        curves(lines, "certain tokens over temperature", percent=True, floor=0,
               x_label="temperature"),
    )  # fmt: skip


def _greedy_order(analysis: Analysis) -> FigureBlock:
    rows = analysis.speeds
    lines = [
        _estimates("global", {row.nominal: row.ar_global["1"] for row in rows}),
        _estimates("local", {row.nominal: row.ar_local["1"] for row in rows}),
        _estimates("certain", {row.nominal: row.certain for row in rows}),
    ]
    return FigureBlock(
        ORDER,
        "AR-ness@1 of greedy decoding, by tokens a pass",
        "Greedy decoding ranks places by the certainty of the plain model, without temperature and "
        "top-p. Certain: as on the left. Tokens of one pass count as left to right.",
        curves(lines, "AR-ness over tokens a pass", percent=True, floor=0,
               x_label="tokens a pass"),
    )  # fmt: skip


def _speed(analysis: Analysis) -> FigureBlock:
    line = _estimates("pass@1", {row.nominal: row.pass_at_1 for row in analysis.speeds})
    return FigureBlock(
        QUALITY,
        "Quality by tokens a pass",
        "Greedy pass@1 when every pass fixes 1, 2 or 4 tokens, with its 95 % interval.",
        curves(
            [line], "pass@1 over tokens a pass", percent=True, floor=0, x_label="tokens a pass",
        ),
    )  # fmt: skip


def _sink(analysis: Analysis) -> list[FigureBlock]:
    passes, rows = analysis.sink.passes, analysis.sink.from_prompt
    named = list(zip(WHICH_PASS, passes, strict=False))
    from_mask = "distance from the block's leftmost mask"
    sure = [_sink_line(f"{w} pass", p, "confidence") for w, p in named]
    unsure = [_sink_line(f"{w} pass", p, "entropy") for w, p in named]
    prompt = [_sink_line("confidence", rows, "confidence")]
    name, title = "Entropy sink", "Certainty by distance"
    return [
        FigureBlock(
            name, f"{title}: likeliest token",
            "Probability of the likeliest token at every masked place, in the first passes of "
            "greedy decoding. A sink falls from left to right.",
            curves(sure, "confidence over distance", percent=True, x_label=from_mask),
        ),
        FigureBlock(
            name, f"{title}: entropy",
            "The same as entropy in nats: a sink rises from left to right.",
            curves(unsure, "entropy over distance", floor=0, x_label=from_mask),
        ),
        FigureBlock(
            name, "Certainty over the completion",
            "The first pass that shows a place, its whole block masked, by distance from the "
            "prompt. Teeth as wide as a block are sinks of its own.",
            curves(prompt, "confidence over the completion", percent=True, wide=True,
                   x_label="distance from the prompt"),
            wide=True,
        ),
    ]  # fmt: skip


def _field(name: str, k: str | None = None) -> Callable[[AtTemperature], Estimate]:
    def read(row: AtTemperature) -> Estimate:
        value = getattr(row, name)
        return value if k is None else value[k]

    return read


def _line(
    name: str,
    rows: Sequence[AtTemperature],
    value: Callable[[AtTemperature], Estimate],
    colour: str | None = None,
) -> Line:
    found = {row.temperature: value(row) for row in sorted(rows, key=lambda row: row.temperature)}
    known = {at: estimate for at, estimate in found.items() if estimate.n}
    return _estimates(name, known, colour)


def _sink_line(name: str, points: Sequence[SinkPoint], field: str) -> Line:
    found = {point.distance: getattr(point, field) for point in points}
    most = max((estimate.n for estimate in found.values()), default=0)
    return _estimates(name, {at: e for at, e in found.items() if e.n >= THIN * most})


def _estimates(name: str, found: Mapping[float, Estimate], colour: str | None = None) -> Line:
    return Line(
        name,
        {at: estimate.value for at, estimate in found.items()},
        dots=len(found) <= len(HEAT),
        band={at: (estimate.low, estimate.high) for at, estimate in found.items()},
        colour=colour,
    )


def _top(analysis: Analysis) -> str:
    return str(max(map(int, analysis.temperatures[0].pass_at_k)))


def _with_range(rate: Estimate) -> str:
    if not rate.n:
        return "–"
    mean = f"{100 * rate.value:.1f}".replace("100.0", "100")
    return f"{mean} [{100 * rate.low:.0f}, {100 * rate.high:.0f}]"
