"""Owns the two forms of a report: blocks of words, tables and pictures, as Markdown and as one HTML page.

Free of: what a report says. In words and cells `**x**` is bold and `` `x` `` is code, in both forms. Invariant: the
page needs no other file and no network; the Markdown needs only the pictures beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True, slots=True)
class Heading:
    level: int
    words: str


@dataclass(frozen=True, slots=True)
class Text:
    words: str


@dataclass(frozen=True, slots=True)
class Table:
    """The first column is words, the others are numbers. `caption` may be empty."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Picture:
    """`file`: the name under which `svg` lies beside the Markdown."""

    file: str
    words: str
    svg: str


Block = Heading | Text | Table | Picture


def markdown(blocks: Sequence[Block]) -> str:
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.words}"
    if isinstance(block, Text):
        return block.words
    if isinstance(block, Picture):
        return f"![{block.words}]({block.file})"
    lines = [block.header, ["---", *("---:" for _ in block.header[1:])], *block.rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{block.caption}\n\n{table}" if block.caption else table


def html(title: str, blocks: Sequence[Block]) -> str:
    """One page; its pictures are inside it."""
    body = "\n".join(_html(block) for block in blocks)
    head = [
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}</style>",
    ]
    lines = ["<!doctype html>", '<html lang="en"><head>', *head, "</head><body><main>", body, "</main></body></html>"]
    return "\n".join(lines) + "\n"


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{_inline(block.words)}</h{block.level}>"
    if isinstance(block, Text):
        return f"<p>{_inline(block.words)}</p>"
    if isinstance(block, Picture):
        return f"<figure>{block.svg}</figure>"
    head = "".join(f"<th>{_inline(cell)}</th>" for cell in block.header)
    rows = "\n".join("<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in block.rows)
    caption = f"<p>{_inline(block.caption)}</p>" if block.caption else ""
    return f'{caption}<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'


def _inline(words: str) -> str:
    """Escaped, then the two marks. Code goes first: what stands in it is no mark."""
    parts = re.split(r"`([^`]+)`", words)
    for number, part in enumerate(parts):
        if number % 2:
            parts[number] = f"<code>{escape(part)}</code>"
        else:
            parts[number] = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escape(part))
    return "".join(parts)


_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1f2328;--dim:#59636e;--line:#d8dee4;--band:#f6f8fa}
@media (prefers-color-scheme:dark){:root{--bg:#0d1117;--ink:#e6edf3;--dim:#9198a1;--line:#2b323b;--band:#151b23}}
body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif}
main{max-width:968px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:28px;line-height:1.2;margin:0 0 12px}
h2{font-size:21px;margin:44px 0 8px;padding-top:20px;border-top:1px solid var(--line)}
h3{font-size:17px;margin:28px 0 8px}
p{margin:10px 0;max-width:76ch}
code{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;
background:var(--band);padding:1px 5px;border-radius:4px}
figure{margin:18px 0;overflow-x:auto;border:1px solid var(--line);border-radius:8px}
figure svg{display:block;max-width:100%;height:auto;min-width:640px}
.wide{overflow-x:auto;margin:12px 0 20px}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums;white-space:nowrap}
th,td{padding:5px 12px;text-align:right;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--bg)}
thead th{border-bottom:2px solid var(--line);font-weight:600}
tbody tr:nth-child(even) td{background:var(--band)}
"""
