"""The frame of a page that stands alone: style for light and dark, wide and narrow, and parts made of plain values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

# By this a later run knows that a file is a report and may be replaced.
GENERATOR = '<meta name="generator" content="lora_null report">'

_STYLE = (
    """
:root{color-scheme:light dark;--ground:#fff;--panel:#f5f6f7;--ink:#1d2226;--soft:#5b666f;--rule:#d9dee2;--ours:#b83a22;
--s0:#2b5c8a;--s1:#b83a22;--s2:#2f7a4d;--s3:#7d4f9c;--s4:#9a6700;--s5:#0f7c86;--s6:#a13a6e;--s7:#4c5660}
@media (prefers-color-scheme:dark){:root{--ground:#15191c;--panel:#1e2428;--ink:#e6eaed;--soft:#9fabb4;--rule:#38424a;
--ours:#f08a70;--s0:#7db4e6;--s1:#f08a70;--s2:#7fce9c;--s3:#c4a0e2;--s4:#e3b341;--s5:#6bcdd6;--s6:#ee92bd;--s7:#b4bfc8}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:66rem;padding:1.2rem 1rem 3rem;background:var(--ground);color:var(--ink);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.2;margin:.2rem 0}h2{font-size:1.2rem;margin:2.4rem 0 .5rem}
h3{font-size:1rem;margin:1.2rem 0 .3rem}p{margin:.4rem 0;max-width:46rem}a{color:var(--s0)}
.soft,figcaption,.legend,th{color:var(--soft)}.soft,figcaption,.legend{font-size:.875rem}
nav ul,.legend,.tiles{list-style:none;padding:0;margin:.6rem 0;display:flex;flex-wrap:wrap;gap:.3rem 1rem}
.tiles{gap:.8rem}.tiles li{flex:1 1 9rem;background:var(--panel);border-radius:.5rem;padding:.6rem .8rem}
.tiles b{display:block;font-size:1.4rem;font-weight:600;line-height:1.3}
dl{display:grid;grid-template-columns:fit-content(40%) 1fr;gap:.25rem 1rem;margin:.6rem 0}
dt{color:var(--soft)}dd{margin:0}
table{border-collapse:collapse;width:100%;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:.3rem .35rem;border-bottom:1px solid var(--rule);vertical-align:top}
th{font-weight:500;overflow-wrap:normal}th:first-child{text-align:left;padding-left:0;overflow-wrap:anywhere;min-width:5rem}
td{white-space:nowrap}td span{display:block;color:var(--soft)}
.wide{overflow-x:auto}
@media (max-width:30rem){table{font-size:.8rem}th,td{padding:.25rem .2rem}}
figure{margin:0;min-width:0}figcaption{margin:.2rem 0 .6rem}svg{display:block;width:100%;height:auto}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:1rem 2rem}
.many{display:grid;grid-template-columns:repeat(auto-fill,minmax(9rem,1fr));gap:.4rem 1rem}
.square{max-width:22rem}.legend li{display:flex;align-items:center;gap:.35rem}.legend svg{width:.8rem;flex:none}
summary{cursor:pointer;color:var(--soft);margin:.4rem 0}
svg text{font:11px system-ui,sans-serif;fill:var(--soft);stroke:none}
.axis,.grid,.edge,.guide,.line,.curve{fill:none}.axis{stroke:var(--soft)}.grid{stroke:var(--rule);stroke-width:.7}
.edge{stroke:var(--ours);stroke-dasharray:4 3}.guide{stroke:var(--soft);stroke-dasharray:3 3}
.chosen{fill:var(--ours);opacity:.2}.curve{stroke:var(--s0);stroke-width:1.6}
.line{stroke-width:1.3;stroke:currentColor;opacity:.75}.dot{fill-opacity:.55}
"""
    + "".join(f"svg .s{i}{{color:var(--s{i});fill:var(--s{i})}}" for i in range(8))
    + "svg .line{fill:none}"
)


def document(title: str, lead: str, sections: Mapping[str, str], foot: str) -> str:
    """Return the page: ``sections`` by heading, each reached from the top; ``lead`` is markup, the rest is text.

    The policy in the head forbids what the page does not do: to fetch anything, or to run anything.
    """
    links = "".join(f'<li><a href="#{_anchor(name)}">{escape(name)}</a></li>' for name in sections)
    body = "".join(
        f'<section id="{_anchor(name)}"><h2>{escape(name)}</h2>{content}</section>'
        for name, content in sections.items()
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{GENERATOR}'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body><header><h1>{escape(title)}</h1>{lead}"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n<main>{body}</main>\n'
        f'<footer><p class="soft">{escape(foot)}</p></footer></body></html>\n'
    )


def text(*sentences: str, soft: bool = False) -> str:
    """Return a paragraph per sentence."""
    opening = '<p class="soft">' if soft else "<p>"
    return "".join(f"{opening}{escape(sentence)}</p>" for sentence in sentences)


def tiles(values: Mapping[str, str]) -> str:
    """Return the figures that matter most, large."""
    entries = "".join(
        f'<li><span class="soft">{escape(name)}</span><b>{escape(value.partition(" ")[0])}</b>'
        f'<span class="soft">{escape(value.partition(" ")[2])}</span></li>'
        for name, value in values.items()
    )
    return f'<ul class="tiles">{entries}</ul>' if values else ""


def facts(values: Mapping[str, object]) -> str:
    """Return names and values, those that are None or empty left out."""
    entries = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
        for name, value in values.items()
        if value not in (None, "")
    )
    return f"<dl>{entries}</dl>"


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose first column names its rows."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(map(_cell, row[1:])) + "</tr>" for row in rows
    )
    frame = f'<div class="wide" role="region" tabindex="0" aria-label="{escape(caption)}">'
    return f"{frame}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def figure(picture: str, caption: str, legend: str = "", kind: str = "") -> str:
    """Return a picture with what stands below it, as text."""
    shape = f' class="{kind}"' if kind else ""
    return f"<figure{shape}>{picture}{legend}<figcaption>{escape(caption)}</figcaption></figure>"


def details(summary: str, content: str, *, opened: bool = False) -> str:
    """Return a part that is opened by who wants it."""
    return f"<details{' open' if opened else ''}><summary>{escape(summary)}</summary>{content}</details>"


def _cell(value: str) -> str:
    """Return a cell; an interval stands below its value."""
    head, sign, interval = escape(value).partition(" [")
    return f"<td>{head} <span>[{interval}</span></td>" if sign else f"<td>{head}</td>"


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-").replace(",", "")
