"""A report as one HTML page: no requests, no script, light and dark, readable on a phone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from html import escape

from keepkv.eval.records import Record
from keepkv.eval.report import svg
from keepkv.eval.report.cells import (
    UNDECIDED_NOTE,
    by_model,
    informative_columns,
    is_undecided,
    left_out_lines,
    ratio_lines,
    versus_lines,
)
from keepkv.eval.report.figures import Figure, Heat
from keepkv.eval.report.markdown import EXPLAINED, HEAD, LEFT_OUT, table_rows
from keepkv.eval.report.worst import SHOWN, Texts, variant_of, worst
from keepkv.eval.summary import ALL, Summary, SummaryRow

LONGEST = 20_000  # letters of a text that are shown
_STYLE = """
:root{color-scheme:light dark;--ink:#1c1e21;--soft:#5a6068;--paper:#fff;--line:#d9dde2;--mark:#fbe3a1;
--c0:#5a6068;--c1:#1f5fae;--c2:#c4501b;--c3:#2a8a4a;--c4:#8a3fae;--c5:#a8791b;--c6:#1b8a8f;--c7:#b3266e}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#9aa2ac;--paper:#15181c;--line:#343a42;--mark:#6b5410;
--c0:#9aa2ac;--c1:#7db4f5;--c2:#ff9d6b;--c3:#6fd08c;--c4:#cf9df0;--c5:#e3b85a;--c6:#68cfd3;--c7:#ff8fc0}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:72rem;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.4rem;margin:0}h2{font-size:1.15rem;margin:2rem 0 .4rem}h3{font-size:1rem;margin:0 0 .3rem}
p{margin:.4rem 0;max-width:48rem}.soft,figcaption{color:var(--soft);font-size:.9rem}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr));gap:1.6rem}
figure{margin:0;max-width:26rem}svg{display:block;width:100%;height:auto}
svg text{font:11px system-ui,sans-serif;fill:var(--soft)}svg .axis{fill:var(--ink);font-size:12px}
svg .pale{fill:#fff}svg .dark{fill:#111}.grid{stroke:var(--line)}.none{fill:var(--line);opacity:.4}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}
.c6{--c:var(--c6)}.c7{--c:var(--c7)}
g circle,g rect{fill:var(--c)}g line{stroke:var(--c);stroke-width:1.5}g .whisker{stroke:var(--ink)}
.line{fill:none;stroke:var(--c);stroke-width:1.5;opacity:.7}
.key{font-size:.85rem}.key span{margin-right:.9rem;white-space:nowrap}
.key i{display:inline-block;width:.8rem;height:.8rem;border-radius:50%;background:var(--c);margin-right:.3rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .7rem .25rem 0;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap}th{color:var(--soft)}
details{border-top:1px solid var(--line);padding:.5rem 0}summary{cursor:pointer;padding:.3rem 0}
dl{margin:.4rem 0}dt{color:var(--soft);font-size:.85rem}dd{margin:0 0 .4rem;overflow-wrap:anywhere}
.text{white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid var(--line);border-radius:6px;padding:.8rem;font-size:.9rem;
max-height:24rem;overflow-y:auto}mark{background:var(--mark);color:inherit}pre{overflow-x:auto;font-size:.85rem}
"""


def html_report(
    records: Sequence[Record],
    summary: Summary,
    figures: Sequence[Figure],
    settings: Mapping[str, str],
    texts: Texts | None = None,
) -> str:
    """A whole report as one page.

    Args:
        records: Of one run or of several.
        summary: Of the same records.
        figures: What to draw (see `figures.all_of`).
        settings: The settings of every run, as TOML, by its name.
        texts: Gives a sample's text, to show it with the worst answers.
    """
    models = ", ".join(sorted({record.model for record in records}))
    samples = len({(record.model, record.task, record.length, record.sample) for record in records})
    failed = sum(bool(record.failed) for record in records)
    heat = [figure for figure in figures if isinstance(figure, Heat)]
    others = [figure for figure in figures if not isinstance(figure, Heat)]
    out = left_out_lines(summary)
    notes = [*([UNDECIDED_NOTE] if is_undecided(summary.rows) else []), *([LEFT_OUT, *out] if out else [])]
    notes += [*versus_lines(summary), *ratio_lines(summary)]
    per_task = _tables(summary, lambda row: row.task != ALL and not row.left_out)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>keepkv: {escape(models)}</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>Evaluation of {escape(models)}</h1>"
        f"<p class=soft>{samples:,} texts, {len(records):,} answers, {failed:,} failed. {escape(EXPLAINED)}</p>"
        f"<h2>Over all tasks</h2>{_tables(summary, lambda row: row.task == ALL)}"
        f"{''.join(f'<p class=soft>{escape(line)}</p>' for line in notes)}"
        f"<h2>Figures</h2><div class=figures>{''.join(map(_figure, others))}</div>"
        f"{_depths(heat)}<h2>Worst answers</h2><p class=soft>{escape(SHOWN)}</p>{_worst(records, texts)}"
        f"<h2>All numbers</h2><details><summary>One row per task, budget and method</summary>{per_task}</details>"
        f"<h2>Settings</h2>{''.join(map(_settings, settings, settings.values()))}"
        f"<p class=soft>{escape(_provenance(records))}</p></main></body></html>\n"
    )


def _depths(heat: Sequence[Heat]) -> str:
    if not heat:
        return ""
    panels = "".join(
        f'<figure id="{escape(figure.key)}"><h3>{escape(figure.title)}</h3>{svg.draw(figure)}</figure>' for figure in heat
    )
    return f"<h2>By depth</h2><p class=soft>{escape(heat[0].note)}</p><div class=figures>{panels}</div>"


def _settings(name: str, text: str) -> str:
    return f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>"


def _provenance(records: Sequence[Record]) -> str:
    record = next((record for record in records if record.versions), None)
    if record is None:
        return ""
    versions = ", ".join(f"{name} {number}" for name, number in record.versions.items())
    return f"{versions}, commit {record.commit or 'unknown'}"


def _figure(figure: Figure) -> str:
    caption = f"<figcaption>{escape(figure.note)}</figcaption>"
    return f'<figure id="{escape(figure.key)}"><h3>{escape(figure.title)}</h3>{svg.draw(figure)}{caption}</figure>'


def _tables(summary: Summary, wanted: Callable[[SummaryRow], bool]) -> str:
    """A table for every model, with its name if there are several."""
    tables = [(name, [row for row in rows if wanted(row)]) for name, rows in by_model(summary)]
    tables = [(name, rows) for name, rows in tables if rows]
    if len(tables) == 1:
        return _table(tables[0][1])
    return "".join(f"<h3>{escape(name)}</h3>{_table(rows)}" for name, rows in tables) or "<p>None.</p>"


def _table(rows: Sequence[SummaryRow]) -> str:
    head, lines = informative_columns(HEAD, table_rows(rows))
    cells = ["".join(f"<th>{escape(name)}</th>" for name in head)]
    cells += ["".join(f"<td>{escape(cell)}</td>" for cell in line) for line in lines]
    return f"<div class=scroll tabindex=0><table>{''.join(f'<tr>{line}</tr>' for line in cells)}</table></div>"


def _worst(records: Sequence[Record], texts: Texts | None) -> str:
    answers = []
    for record, full in worst(records):
        text = texts(record) if texts else None
        excerpt = ""
        if text is not None:
            excerpt = f"<dt>the text</dt><dd><div class=text tabindex=0>{_marked(text, record.expected)}</div></dd>"
        scores = f"{record.score:.2f} instead of {full.score:.2f}"
        name = f"{record.task} {record.sample}, {variant_of(record)}: {scores}"
        answers.append(
            f"<details><summary>{escape(name)}</summary><dl><dt>question</dt><dd>{escape(record.ask)}</dd><dt>expected</dt>"
            f"<dd>{escape(record.expected)}</dd><dt>{escape(record.method)}</dt>"
            f"<dd>{escape(record.failed or record.answer)}</dd>"
            f"<dt>full cache</dt><dd>{escape(full.answer)}</dd>{excerpt}</dl></details>"
        )
    return "".join(answers) or "<p>None: no answer is worse than the full cache’s.</p>"


def _marked(text: str, expected: str) -> str:
    """The text, with the end of the expected answer marked where it stands in it."""
    ending = expected.split(" is ")[-1].strip(' ."')
    excerpt = escape(text[:LONGEST]) + (" … (cut here)" if len(text) > LONGEST else "")
    return re.sub(f"({re.escape(escape(ending))})", r"<mark>\1</mark>", excerpt) if ending else excerpt
