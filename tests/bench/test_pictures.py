"""The pictures: well-formed, self-contained, nothing outside the frame, and no two labels over each other."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.bench import profile, record
from dataplane.bench.charts import Axis, Bar, Line, Panel, apart, bars, lines
from dataplane.bench.document import Block, Heading, Picture, Table, Text, html, markdown
from dataplane.bench.pictures import pictures
from dataplane.bench.record import Run, Sample, Settings
from dataplane.bench.svg import linear, logarithmic, text_width
from dataplane.bench.words import percent, plain

SVG = "{http://www.w3.org/2000/svg}"
CANDIDATES = [
    "raw",
    "kernel-vxlan",
    "vxlan",
    "udp",
    "baseline",
    "asyncio",
    "uvloop",
    "prototype",
    "a-longer-name-vxlan",
]
WORKLOADS = ["tcp-1", "tcp-4", "udp-64", "sweep-64", "rtt-busy", "rtt-idle", "connect", "peers-1", "peers-100"]


def a_run() -> Run:
    settings = Settings(CANDIDATES, ["vxlan", "udp"], WORKLOADS, 2, 1.0, 0.2)
    profiles = [profile.load(name) for name in ("p1", "p2x", "p3")]
    run = Run(machine=record.machine(), settings=settings, profiles=profiles, complete=True)
    for one, number, (place, name) in itertools.product(profiles, range(2), enumerate(CANDIDATES)):
        speed = 20.0 / (place + 1) ** 1.5 + number
        figures = {
            "tcp-1": {"gbit_s": speed, "cpu_s_per_gb": 10 / speed, "tunnel_cpu_s_per_gb": place / speed},
            "tcp-4": {"gbit_s": speed * 1.1, "cpu_s_per_gb": 9 / speed},
            "udp-64": {"kpps": 10 * speed, "loss": place / 20},
            "sweep-64": {
                "kpps": 9 * speed,
                "loss": 0.0,
                "points": [
                    {"offered_kpps": 8 * speed, "kpps": 8 * speed, "loss": 0.0},
                    {"offered_kpps": 20 * speed, "kpps": 9 * speed, "loss": 0.55},
                ],
            },
            "rtt-busy": {"p50_us": 100 / speed, "p90_us": 130 / speed, "p99_us": 300 / speed, "p999_us": 9e4 / speed},
            "connect": {"connections_s": 1000 * speed},
            "peers-1": {"kpps_one": 9 * speed, "kpps_all": 8 * speed},
            "peers-100": {"kpps_one": 9 * speed, "kpps_all": 7 * speed},
        }
        if name == "uvloop":
            figures["tcp-1"] = {}
        run.samples += [Sample(one.name, number, name, kind, values, 0.2, 0.0) for kind, values in figures.items()]
    return run


PICTURES = {picture.file: picture for picture in pictures(a_run())}


def test_every_kind_of_picture_is_there() -> None:
    assert set(PICTURES) == {
        *("tcp-1.svg", "tcp-4.svg", "udp-64.svg", "connect.svg", "cpu-tcp-1.svg", "sweep-64.svg"),
        *("latency-p1.svg", "latency-p2x.svg", "latency-p3.svg", "growth-flows.svg", "growth-peers.svg"),
    }


def texts(root: ET.Element) -> list[tuple[str, float, float, float, float]]:
    """Words and the box that they are bound to stay in."""
    found = []
    for element in root.iter(f"{SVG}text"):
        size, anchor = float(element.get("font-size", "0")), element.get("text-anchor")
        words = "".join(element.itertext())
        width = text_width(words, size) + (7 if len(element) else 0)
        x, y = float(element.get("x", "0")), float(element.get("y", "0"))
        left = {"start": x, "middle": x - width / 2, "end": x - width}[anchor or "start"]
        found.append((words, left, y - size * 0.75, left + width, y + size * 0.2))
    return found


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_labels_keep_apart_and_inside(name: str) -> None:
    root = ET.fromstring(PICTURES[name].svg)
    width, height = float(root.get("width", "0")), float(root.get("height", "0"))
    boxes = texts(root)
    assert len(boxes) > 10
    for words, left, top, right, bottom in boxes:
        assert left >= 0 and top >= 0 and right <= width + 8 and bottom <= height, words  # noqa: PT018 - one box
    for (one, *a), (two, *b) in itertools.combinations(boxes, 2):
        apart_x, apart_y = a[2] <= b[0] or b[2] <= a[0], a[3] <= b[1] or b[3] <= a[1]
        assert apart_x or apart_y, f"{one!r} lies over {two!r}"


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_a_picture_stands_alone(name: str) -> None:
    text = PICTURES[name].svg
    assert "prefers-color-scheme:dark" in text
    assert text.count("http") == 1, "but for its namespace a picture names no address"
    classes = {word for element in ET.fromstring(text).iter() for word in element.get("class", "").split()}
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert all(f".{one}" in style for one in classes)


def test_a_candidate_without_a_value_has_its_row() -> None:
    words = [words for words, *_ in texts(ET.fromstring(PICTURES["tcp-1.svg"].svg))]
    assert words.count("uvloop") == 3
    assert words.count("not measured") == 3


def test_bars_are_as_long_as_their_values() -> None:
    rows = [Bar("one", 1, 10.0, (10.0, 10.0), "10"), Bar("two", 2, 5.0, (4.0, 6.0), "5")]
    root = ET.fromstring(bars("t", "s", [Panel("p", rows)]))
    widths = [float(one.get("width", "0")) for one in root.iter(f"{SVG}rect") if one.get("rx")]
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.1)


def test_lines_pass_through_their_points() -> None:
    rows = [Line("one", 1, ((0.0, 0.0), (1.0, 10.0)))]
    axis = Axis("x", lambda begin, end: linear(10.0, begin, end))
    root = ET.fromstring(lines("t", "s", [Panel("p", rows)], axis, axis))
    (curve,) = root.iter(f"{SVG}polyline")
    first, last = ([float(place) for place in point.split(",")] for point in curve.get("points", "").split())
    assert last[0] > first[0]
    assert last[1] < first[1] - 200  # upwards


@given(st.lists(st.floats(min_value=0, max_value=200), min_size=1, max_size=12))
def test_labels_are_moved_apart_but_keep_their_order(wanted: list[float]) -> None:
    found = apart(wanted, 15, 0, 200)
    order = sorted(range(len(wanted)), key=lambda number: wanted[number])
    placed = [found[number] for number in order]
    assert all(after - before >= 15 - 1e-6 for before, after in itertools.pairwise(placed))
    assert min(placed) >= -1e-6
    assert max(placed) <= 200 + 1e-6


@given(st.floats(min_value=1e-3, max_value=1e7))
def test_a_linear_scale_ends_at_or_above_its_greatest_value(greatest: float) -> None:
    scale = linear(greatest, 0, 100)
    assert scale.high >= greatest * 0.998
    assert scale.high <= greatest * 2.5
    assert 2 <= len(scale.ticks) <= 7
    assert scale(scale.high) == 100


@given(st.floats(min_value=1e-4, max_value=1e6), st.floats(min_value=1, max_value=1e3))
def test_a_logarithmic_scale_holds_its_values(least: float, factor: float) -> None:
    scale = logarithmic(least, least * factor, 0, 100)
    assert scale.low <= least * 1.001
    assert scale.high >= least * factor * 0.999
    places = [scale(value) for value, _ in scale.ticks]
    assert places == sorted(places)
    assert len(set(places)) == len(places) >= 1


@pytest.mark.parametrize(
    ("value", "words"),
    [(29_992.2, "29992"), (123.4, "123"), (99.99, "100"), (12.34, "12.3"), (9.999, "10.0"), (0.5, "0.50")],
)
def test_numbers_have_three_digits(value: float, words: str) -> None:
    assert plain(value) == words


@pytest.mark.parametrize(
    ("share", "words"),
    [(0, "0 %"), (0.000001, "<0.01 %"), (0.0003, "0.03 %"), (0.0123, "1.23 %"), (0.636, "64 %"), (1, "100 %")],
)
def test_some_loss_is_never_written_as_none(share: float, words: str) -> None:
    assert percent(share) == words


def test_the_page_escapes_what_it_shows(tmp_path: Path) -> None:
    blocks: list[Block] = [
        Heading(1, "a < b"),
        Text("**bold** and `**code** & <b>`"),
        Table("", ["", "<i>"], [["x", "1 & 2"]]),
        Picture("p.svg", "words", "<svg/>"),
    ]
    page = html("<t>", blocks)
    assert "<h1>a &lt; b</h1>" in page
    assert "<b>bold</b> and <code>**code** &amp; &lt;b&gt;</code>" in page
    assert "<th>&lt;i&gt;</th>" in page
    assert "<title>&lt;t&gt;</title>" in page
    assert "![words](p.svg)" in markdown(blocks)
