"""Owns the three kinds of chart: bars with their spread, ranges on a logarithmic scale, and lines.

Free of: runs. A chart is a grid of panels on one scale, so that a reader may compare across them. Invariant: no two
labels overlap: rows have a height of their own, values a column of their own, and labels at lines are moved apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dataplane.bench.svg import FONT, Drawing, Scale, linear, logarithmic, text_width

WIDTH = 920.0
_MARGIN = 24.0
_GUTTER = 36.0
_HEAD = 62.0
_PANEL_HEAD = 30.0
_ROW = 24.0
_BAR = 13.0
_AXIS = 24.0
_SMALL = 11.0
_LABEL_GAP = 15.0


@dataclass(frozen=True, slots=True)
class Bar:
    """A row. `whisker`: least and greatest sample; `words`: the value as it is written, `note`: what is said beside
    it."""

    label: str
    hue: int
    value: float
    whisker: tuple[float, float]
    words: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Range:
    """A row of several values of one thing: the first is a dot, the last a ring, those between are strokes."""

    label: str
    hue: int
    values: tuple[float, ...]
    words: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """A candidate's growth: places on the x axis and values."""

    label: str
    hue: int
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot of a grid. `empty`: rows that have no value, and why."""

    title: str
    rows: Sequence[Bar] | Sequence[Range] | Sequence[Line]
    empty: Sequence[tuple[str, str]] = field(default_factory=tuple)


def bars(title: str, subtitle: str, panels: Sequence[Panel]) -> str:
    """Horizontal bars, one row for each candidate, all panels on one scale that begins at 0."""
    rows = [row for panel in panels for row in panel.rows if isinstance(row, Bar)]
    greatest = max((max(row.value, row.whisker[1]) for row in rows), default=1.0)
    words = max((text_width(row.words, FONT + 1) + text_width(row.note, _SMALL) + 18 for row in rows), default=0.0)

    def draw(drawing: Drawing, row: Bar, scale: Scale, y: float) -> None:
        top, zero = y - _BAR / 2, scale(0)
        hue = f"k{row.hue}"
        drawing.bar(zero, top, scale(row.value) - zero, _BAR, hue)
        least, most = (scale(value) for value in row.whisker)
        if most - least > 2:
            drawing.line(least, y, most, y, "whisker", width=1.2)
            for end in (least, most):
                drawing.line(end, y - 3.5, end, y + 3.5, "whisker", width=1.2)
        x = max(scale(row.value), most) + 7
        drawing.value(x, y + 4.2, row.words, row.note)

    return _rows(title, subtitle, panels, draw, lambda begin, end: linear(greatest, begin, end), words)


def ranges(title: str, subtitle: str, panels: Sequence[Panel], *, wide: bool = False) -> str:
    """Values of one thing joined by a line for each candidate, on one logarithmic scale. `wide`: one panel to a
    line."""
    rows = [row for panel in panels for row in panel.rows if isinstance(row, Range)]
    least = min((min(row.values) for row in rows), default=1.0)
    greatest = max((max(row.values) for row in rows), default=10.0)
    words = max((text_width(row.words, FONT + 1) + text_width(row.note, _SMALL) + 26 for row in rows), default=0.0)

    def draw(drawing: Drawing, row: Range, scale: Scale, y: float) -> None:
        hue, places = f"k{row.hue}", [scale(value) for value in row.values]
        drawing.line(places[0], y, places[-1], y, hue, width=2.5)
        for place in places[1:-1]:
            drawing.line(place, y - 5, place, y + 5, hue, width=2)
        if len(places) > 1:
            drawing.dot(places[-1], y, 4, hue, hollow=True)
        drawing.dot(places[0], y, 5, hue)
        drawing.value(scale.end + words, y + 4, row.words, row.note, anchor="end")

    def scale_of(begin: float, end: float) -> Scale:
        return logarithmic(least, greatest, begin, end)

    return _rows(title, subtitle, panels, draw, scale_of, words, columns=1 if wide else 2)


def _rows(
    title: str,
    subtitle: str,
    panels: Sequence[Panel],
    draw: Callable[[Drawing, Bar, Scale, float], None] | Callable[[Drawing, Range, Scale, float], None],
    scale_of: Callable[[float, float], Scale],
    words: float,
    columns: int = 2,
) -> str:
    """A grid of panels whose rows are candidates; at most two panels side by side."""
    labels = [row.label for panel in panels for row in panel.rows] + [label for p in panels for label, _ in p.empty]
    label_width = max((text_width(label) for label in labels), default=0.0) + 10
    columns = min(columns, len(panels))
    width = (WIDTH - 2 * _MARGIN - (columns - 1) * _GUTTER) / columns
    heights = [_PANEL_HEAD + _ROW * (len(panel.rows) + len(panel.empty)) + _AXIS for panel in panels]
    drawing = Drawing(WIDTH, _HEAD + _stacked(heights, columns) + 12, title)
    _head(drawing, title, subtitle)
    for panel, (x, y) in zip(panels, _places(heights, columns, width), strict=True):
        scale = scale_of(x + label_width, x + width - words)
        _grid(drawing, panel.title, x, y, scale, y + _PANEL_HEAD, len(panel.rows) + len(panel.empty))
        centre = y + _PANEL_HEAD + _ROW / 2
        for row in panel.rows:
            drawing.text(x + label_width - 10, centre + 4, row.label, anchor="end")
            draw(drawing, row, scale, centre)  # type: ignore[arg-type]  # a chart's rows are of one kind
            centre += _ROW
        for label, why in panel.empty:
            drawing.text(x + label_width - 10, centre + 4, label, css="dim", anchor="end")
            drawing.text(scale(scale.low) + 7, centre + 4, why, size=_SMALL, css="dim")
            centre += _ROW
    return drawing.svg()


def _grid(drawing: Drawing, title: str, x: float, y: float, scale: Scale, top: float, count: int) -> None:
    bottom = top + _ROW * count
    drawing.text(x, y + 15, title, size=13, bold=True)
    for value, words in scale.ticks:
        place = scale(value)
        drawing.line(place, top, place, bottom, "axis" if value == scale.low else "grid")
        drawing.text(place, bottom + 15, words, size=_SMALL, css="dim", anchor="middle")


def _head(drawing: Drawing, title: str, subtitle: str) -> None:
    drawing.text(_MARGIN, 30, title, size=18, bold=True)
    drawing.text(_MARGIN, 49, subtitle, css="dim")


def _stacked(heights: Sequence[float], columns: int) -> float:
    """Height of a grid in which the panels of one line are as high as the highest of them."""
    return sum(max(heights[begin : begin + columns]) + 10 for begin in range(0, len(heights), columns))


def _places(heights: Sequence[float], columns: int, width: float) -> list[tuple[float, float]]:
    return [
        (
            _MARGIN + number % columns * (width + _GUTTER),
            _HEAD + _stacked(heights[: number - number % columns], columns),
        )
        for number in range(len(heights))
    ]


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis of a line chart: what it is called, and how its scale is made from a begin and an end."""

    name: str
    scale: Callable[[float, float], Scale]
    mark: float | None = None
    """A value at which a dashed line is drawn."""


def lines(
    title: str, subtitle: str, panels: Sequence[Panel], x_axis: Axis, y_axis: Axis, *, legend: bool = False
) -> str:
    """One line for each candidate, named at its end; with `legend` named in the order of the rows, for lines that end
    side by side."""
    labels = [row.label for panel in panels for row in panel.rows]
    label_width = max((text_width(label) for label in labels), default=0.0) + (40 if legend else 22)
    columns = 2 if len(panels) > 1 else 1
    width = (WIDTH - 2 * _MARGIN - (columns - 1) * _GUTTER) / columns
    height = max([230.0, *(_LABEL_GAP * (len(panel.rows) + 1) for panel in panels)])
    heights = [_PANEL_HEAD + 14 + height + 42 for _ in panels]
    drawing = Drawing(WIDTH, _HEAD + _stacked(heights, columns) + 8, title)
    _head(drawing, title, subtitle)
    for panel, (x, y) in zip(panels, _places(heights, columns, width), strict=True):
        top = y + _PANEL_HEAD + 14
        across = x_axis.scale(x + 52, x + width - label_width)
        up = y_axis.scale(top + height, top)
        drawing.text(x, y + 15, panel.title, size=13, bold=True)
        _frame(drawing, x, across, up, x_axis, y_axis)
        rows = [row for row in panel.rows if isinstance(row, Line)]
        _curves(drawing, rows, across, up)
        (_legend if legend else _names)(drawing, rows, across, up)
    return drawing.svg()


def _frame(drawing: Drawing, x: float, across: Scale, up: Scale, x_axis: Axis, y_axis: Axis) -> None:
    for value, words in up.ticks:
        place = up(value)
        drawing.line(across.begin, place, across.end, place, "axis" if value == up.low else "grid")
        drawing.text(across.begin - 8, place + 4, words, size=_SMALL, css="dim", anchor="end")
    for value, words in across.ticks:
        place = across(value)
        drawing.line(place, up.begin, place, up.begin + 4, "axis")
        drawing.text(place, up.begin + 17, words, size=_SMALL, css="dim", anchor="middle")
    drawing.text(x, up.end - 9, y_axis.name, size=_SMALL, css="dim")
    drawing.text((across.begin + across.end) / 2, up.begin + 34, x_axis.name, size=_SMALL, css="dim", anchor="middle")
    if y_axis.mark is not None:
        drawing.line(across.begin, up(y_axis.mark), across.end, up(y_axis.mark), "mark", dash="5 4")


def _curves(drawing: Drawing, rows: Sequence[Line], across: Scale, up: Scale) -> None:
    for row in rows:
        places = [(across(x), up(y)) for x, y in row.points]
        drawing.curve(places, f"k{row.hue}")
        for x, y in places:
            drawing.dot(x, y, 3.2, f"k{row.hue}")


def _legend(drawing: Drawing, rows: Sequence[Line], across: Scale, up: Scale) -> None:
    for number, row in enumerate(rows):
        y = up.end + _LABEL_GAP * (number + 0.5)
        drawing.line(across.end + 14, y, across.end + 30, y, f"k{row.hue}", width=2)
        drawing.dot(across.end + 22, y, 3.2, f"k{row.hue}")
        drawing.text(across.end + 36, y + 4, row.label)


def _names(drawing: Drawing, rows: Sequence[Line], across: Scale, up: Scale) -> None:
    """At the ends of the lines, moved apart where these are near each other."""
    ends = [up(row.points[-1][1]) for row in rows]
    for row, end, at in zip(rows, ends, apart(ends, _LABEL_GAP, up.end, up.begin), strict=True):
        x = across(row.points[-1][0])
        drawing.line(x + 5, end, across.end + 14, at, f"k{row.hue}", width=0.8)
        drawing.text(across.end + 18, at + 4, row.label)


def apart(wanted: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """Places as near to those wanted as goes with `gap` between any two, from `top` down to `bottom`."""
    order = sorted(range(len(wanted)), key=lambda number: wanted[number])
    placed: list[float] = []
    for number in order:
        placed.append(max(wanted[number], placed[-1] + gap if placed else top))
    below = bottom
    for index in range(len(placed) - 1, -1, -1):
        placed[index] = min(placed[index], below)
        below = placed[index] - gap
    result = [0.0] * len(wanted)
    for number, place in zip(order, placed, strict=True):
        result[number] = place
    return result
