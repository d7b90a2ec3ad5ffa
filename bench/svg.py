"""Owns the drawing of SVG: elements, the two colour schemes, scales and their ticks.

Free of: what is drawn. Invariant: a picture carries its own style and nothing else, so it stands alone, inside a page
or as an image, and follows the reader's scheme; colours are set by classes, which all pictures have in common."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape

FONT = 12.0
_WIDTH_OF_A_LETTER = 0.62
"""Of the font's size, for the sans-serif fonts of common systems; rather more than less."""

# (light, dark): hues that stay apart for the colour-blind too, each readable on its scheme's ground
_HUES = (
    ("#afb8c1", "#6e7681"),
    ("#7b848e", "#8b949e"),
    ("#424a53", "#b7c0ca"),
    ("#0969da", "#58a6ff"),
    ("#0a7f6b", "#2fbf9b"),
    ("#bc4c00", "#f0883e"),
    ("#9a6700", "#d9a520"),
    ("#cf222e", "#ff7b72"),
    ("#bf3989", "#f778ba"),
    ("#8250df", "#a985ff"),
    ("#7c4a1e", "#c69c6d"),
    ("#4d7c0f", "#9ccc3c"),
)
HUES = len(_HUES)


def _style() -> str:
    rules = [
        ".lb{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif}",
        ".lb .bg{fill:#ffffff}.lb .ink{fill:#1f2328}.lb .dim{fill:#59636e}.lb .grid{stroke:#d8dee4}",
        ".lb .axis{stroke:#8c959f}.lb .whisker{stroke:#1f2328}.lb .mark{stroke:#cf222e}.lb .hole{fill:#ffffff}",
        *(f".lb .k{number}{{color:{light}}}" for number, (light, _) in enumerate(_HUES)),
    ]
    dark = [
        ".lb .bg{fill:#0d1117}.lb .ink{fill:#e6edf3}.lb .dim{fill:#9198a1}.lb .grid{stroke:#2b323b}",
        ".lb .axis{stroke:#656c76}.lb .whisker{stroke:#e6edf3}.lb .mark{stroke:#ff7b72}.lb .hole{fill:#0d1117}",
        *(f".lb .k{number}{{color:{night}}}" for number, (_, night) in enumerate(_HUES)),
    ]
    return "".join(rules) + "@media (prefers-color-scheme:dark){" + "".join(dark) + "}"


def text_width(text: str, size: float = FONT) -> float:
    """A bound that the text stays within, as no font can be asked here."""
    return len(text) * size * _WIDTH_OF_A_LETTER


@dataclass(slots=True)
class Drawing:
    """Elements in the order in which they are painted; places in pixels from the upper left."""

    width: float
    height: float
    title: str
    _parts: list[str] = field(default_factory=list)

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: float = FONT,
        css: str = "ink",
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        where = f'x="{_n(x)}" y="{_n(y)}" font-size="{_n(size)}" text-anchor="{anchor}"'
        self._parts.append(f'<text {where} class="{css}"{weight}>{escape(words)}</text>')

    def value(self, x: float, y: float, words: str, note: str, *, anchor: str = "start") -> None:
        """A number, and smaller what is said of it; in one text, so that no guess at widths stands between them."""
        where = f'x="{_n(x)}" y="{_n(y)}" font-size="{_n(FONT)}" text-anchor="{anchor}"'
        beside = f'<tspan dx="7" font-size="11" font-weight="400" class="dim">{escape(note)}</tspan>' if note else ""
        self._parts.append(f'<text {where} class="ink" font-weight="600">{escape(words)}{beside}</text>')

    def line(
        self, x1: float, y1: float, x2: float, y2: float, css: str = "grid", *, width: float = 1.0, dash: str = ""
    ) -> None:
        """In its class's stroke; a hue (`k3`) strokes in its colour."""
        stroke = ' stroke="currentColor"' if css.startswith("k") else ""
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        where = f'x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"'
        self._parts.append(f'<line {where} class="{css}" stroke-width="{_n(width)}"{stroke}{dashes}/>')

    def bar(self, x: float, y: float, width: float, height: float, css: str) -> None:
        where = f'x="{_n(x)}" y="{_n(y)}" width="{_n(max(width, 0.75))}" height="{_n(height)}" rx="1.5"'
        self._parts.append(f'<rect {where} class="{css}" fill="currentColor"/>')

    def dot(self, x: float, y: float, radius: float, css: str, *, hollow: bool = False) -> None:
        where = f'cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}"'
        if hollow:
            ring = f'<circle {where} class="hole"/>'
            self._parts.append(
                f'{ring}<circle {where} class="{css}" fill="none" stroke="currentColor" stroke-width="1.6"/>'
            )
        else:
            self._parts.append(f'<circle {where} class="{css}" fill="currentColor"/>')

    def curve(self, points: Sequence[tuple[float, float]], css: str) -> None:
        """Straight from point to point."""
        path = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
        look = 'fill="none" stroke="currentColor" stroke-width="2" stroke-linejoin="round" stroke-linecap="round"'
        self._parts.append(f'<polyline points="{path}" class="{css}" {look}/>')

    def svg(self) -> str:
        """The document; without an XML declaration, so that it can also stand inside HTML."""
        size = f'viewBox="0 0 {_n(self.width)} {_n(self.height)}" width="{_n(self.width)}" height="{_n(self.height)}"'
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} class="lb" role="img" aria-label="{escape(self.title)}">'
        )
        ground = f'<rect width="{_n(self.width)}" height="{_n(self.height)}" class="bg"/>'
        return "\n".join([head, f"<style>{_style()}</style>", ground, *self._parts, "</svg>"]) + "\n"


@dataclass(frozen=True, slots=True)
class Scale:
    """From a value to a place. `ticks`: values and their words."""

    low: float
    high: float
    begin: float
    end: float
    ticks: tuple[tuple[float, str], ...]
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = math.log10(max(value, low)), math.log10(low), math.log10(high)
        share = (min(value, high) - low) / (high - low)
        return self.begin + share * (self.end - self.begin)


def linear(greatest: float, begin: float, end: float, wanted: int = 4) -> Scale:
    """From 0 to a round number at or above `greatest`, in steps of 1, 2 or 5 times a power of ten."""
    greatest = greatest if greatest > 0 else 1.0
    power = 10.0 ** math.floor(math.log10(greatest / wanted))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * wanted >= greatest * 0.999)
    count = math.ceil(greatest / step - 1e-9)
    ticks = tuple((step * number, number_text(step * number, step)) for number in range(count + 1))
    return Scale(0.0, step * count, begin, end, ticks)


def logarithmic(least: float, greatest: float, begin: float, end: float) -> Scale:
    """Between 1, 2 or 5 times powers of ten around the values; ticks at these, or at fewer where their words would
    touch."""
    marks = [factor * 10.0**power for power in range(-6, 10) for factor in (1, 2, 5)]
    low = max(mark for mark in marks if mark <= least * 1.0001)
    high = min(mark for mark in marks if mark >= max(greatest, low * 1.0001) * 0.9999 and mark > low)
    inside = [mark for mark in marks if low <= mark <= high]
    tens = [mark for mark in inside if abs(math.log10(mark) - round(math.log10(mark))) < 1e-9]
    scale = Scale(low, high, begin, end, (), logarithmic=True)
    for chosen in (inside, tens, tens[::2], tens[::3]):
        ticks = tuple((mark, number_text(mark, mark)) for mark in chosen)
        if not _touching([(scale(mark), words) for mark, words in ticks]):
            break
    return replace(scale, ticks=ticks)


def _touching(ticks: Sequence[tuple[float, str]]) -> bool:
    return any(
        abs(there - here) < (text_width(one, FONT - 1) + text_width(two, FONT - 1)) / 2 + 4
        for (here, one), (there, two) in itertools.pairwise(ticks)
    )


def number_text(value: float, step: float) -> str:
    """With as many decimals as the step needs, thousands apart."""
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{decimals}f}".replace(",", " ")


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
