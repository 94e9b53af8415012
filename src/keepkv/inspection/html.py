"""An anatomy as one HTML page: no requests, no script, light and dark."""

from __future__ import annotations

from bisect import bisect_left
from html import escape

from keepkv.inspection import svg
from keepkv.inspection.anatomy import Anatomy
from keepkv.render import size

SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)  # upper ends of the shades: 0 is kept by no head
_STYLE = """
:root{color-scheme:light dark;--ink:#1c1e21;--soft:#5a6068;--paper:#fff;--line:#d9dde2;--ours:#1f5fae;--fell:#b3261e;
--k1:#eaf2fb;--k2:#d5e6f7;--k3:#b9d5f1;--k4:#95c0ea;--k5:#fbe3a1;--k6:#f9c26b;--k7:#f4a04a}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#9aa2ac;--paper:#15181c;--line:#343a42;--ours:#7db4f5;
--fell:#ff8a80;--k1:#17222e;--k2:#182c42;--k3:#193a5b;--k4:#1b4a77;--k5:#5a4a12;--k6:#744e10;--k7:#8e4c0c}}
body{margin:0 auto;padding:1.5rem;max-width:62rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;margin:0}h2{font-size:1.15rem;margin:2.2rem 0 .4rem}p,figcaption{margin:.4rem 0;max-width:48rem}
.soft,figcaption{color:var(--soft)}figure{margin:0}.scroll{overflow-x:auto}
dl{display:flex;flex-wrap:wrap;gap:.6rem 2.2rem;margin:1.2rem 0}dt{color:var(--soft);font-size:.85rem}
dd{margin:0;font-size:1.25rem;font-variant-numeric:tabular-nums}
svg{display:block}
svg text{font:11px system-ui,sans-serif;fill:var(--soft)}svg .pale,svg .dark{font-size:10px;pointer-events:none}
svg .pale{fill:#fff}svg .dark{fill:#111}
.grid{stroke:var(--line)}.band{fill:var(--line);opacity:.35}.ours{fill:var(--ours)}.gain{stroke:var(--soft);opacity:.6}
.evicted{fill:var(--paper);stroke:var(--soft)}.fell{stroke:var(--fell);stroke-width:2;fill:none}
.most{fill:var(--ours);opacity:.35}.mean{fill:var(--ours)}.full{stroke:var(--ink);stroke-dasharray:5 4}
svg text.over{fill:var(--ink);paint-order:stroke;stroke:var(--paper);stroke-width:4px}
.key svg{display:inline-block;vertical-align:-2px}
.text{white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid var(--line);border-radius:6px;padding:1rem;line-height:1.7}
.k0{color:var(--soft)}.k1{background:var(--k1)}.k2{background:var(--k2)}.k3{background:var(--k3)}.k4{background:var(--k4)}
.k5{background:var(--k5)}.k6{background:var(--k6)}.k7{background:var(--k7)}
.key span{padding:.1rem .4rem;white-space:nowrap}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{padding:.15rem .7rem;text-align:right;border-bottom:1px solid var(--line)}th{color:var(--soft);font-weight:600}
"""


def page(anatomy: Anatomy) -> str:
    """The whole page."""
    report = anatomy.report
    title = f"{report.tokens[0]:,} tokens in {report.slots_per_head:,.0f} slots per KV head"
    sections = [
        ("Where the slots went", _BUDGETS.format(mean=f"{report.slots_per_head:,.0f}"), svg.budgets(anatomy)),
        ("What is lost", _ERRORS, svg.errors(anatomy)) if anatomy.judged else ("What is lost", _UNJUDGED, ""),
        ("Who votes for whom", _VOTES.format(heads=len(anatomy.heads)), svg.votes(anatomy)),
    ]
    figures = "".join(
        f"<h2>{name}</h2><figure><div class=scroll tabindex=0>{drawing}</div><figcaption>{caption}</figcaption></figure>"
        for name, caption, drawing in sections
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>keepkv: {title}</title><style>{_STYLE}</style></head><body><main><h1>{title}</h1>"
        f"<p class=soft>{escape(anatomy.model)} · method {escape(report.method)} · budget {escape(report.budget)} · "
        f"text {'repeated' if anatomy.repeated else 'not repeated'}</p>{_facts(anatomy)}{figures}"
        f"<h2>What was kept of the text</h2><p class=soft>{_KEPT.format(heads=len(anatomy.heads))}</p>"
        f'<p class=key>{_shades()}</p><div class=text lang="" dir="auto">{_text(anatomy)}</div>'
        f"<h2>All numbers</h2><details><summary>One row per layer and KV head</summary>{_table(anatomy)}</details>"
        "</main></body></html>\n"
    )


_BUDGETS = """Slots of every KV head, on a logarithmic scale from dark (few) to bright (many): {mean} on average. Where a method
has one budget for the whole model, a head that looks at only a few tokens leaves slots to heads that spread their attention."""
_ERRORS = """
<span class=key><svg width=14 height=14 role=img aria-label="dot"><circle class=ours cx=7 cy=7 r=4 /></svg></span> the share of
a head's output that is lost, on queries that the fit has not seen;
<span class=key><svg width=14 height=14 role=img aria-label="ring"><circle class=evicted cx=7 cy=7 r=4 /></svg></span> the same
slots without votes and fitted values (eviction): the line between them is what merging gains;
<span class=key><svg width=14 height=14 role=img aria-label="cross"><path class=fell d="M3 3l8 8m0 -8l-8 8"/></svg></span> a
head where the fit was worse than eviction and was not used. Each layer's heads stand side by side; the scale is logarithmic."""
_UNJUDGED = "This method holds no queries out, so it has no errors to show."
_VOTES = """A vote is how many tokens' worth of attention a slot stands for. Here they are summed over all layers and heads:
every token of the full cache has {heads} (dashed). Dropped tokens have none; where a method merges, kept ones speak for them,
and the first tokens, where heads rest that have nothing to look at, often for most. Solid: mean of each column's tokens; faint:
the largest. The scale is logarithmic."""
_KEPT = """Every token is shaded by the share of the {heads} pairs of layer and KV head that kept its slot; gray letters were
kept by none. Point at a token for its number. What was dropped is gone; where a method merges, votes and values of the kept
slots answer for it."""


def _facts(anatomy: Anatomy) -> str:
    report = anatomy.report
    facts = {"bytes": f"{size(report.kv_bytes)} of {size(report.kv_bytes_full)}", "times smaller": f"{report.ratio:.1f}"}
    if anatomy.judged:
        facts["mean error"] = f"{report.error:.2%}"
        facts["had it been evicted"] = f"{anatomy.evict_error:.2%}"
    facts["heads fallen back"] = f"{anatomy.fallen} of {len(anatomy.heads)}"
    facts["largest vote"] = f"{report.max_vote:,.1f}"
    return "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items()) + "</dl>"


def _shades() -> str:
    names = ["none", *(f"up to {share:.0%}" for share in SHARES[1:])]
    return " ".join(f"<span class=k{shade}>{name}</span>" for shade, name in enumerate(names))


def _text(anatomy: Anatomy) -> str:
    """The tokens, shaded; tokens that are a part of one character count together, by the one kept most."""
    heads = len(anatomy.heads)
    parts = []
    most = 0  # of the tokens of one character
    for token, kept in zip(anatomy.tokens, anatomy.keepers, strict=True):
        most = max(most, kept)
        if token:
            shade = bisect_left(SHARES, most / heads)
            parts.append(f'<span class=k{shade} title="{most} of {heads}">{escape(token)}</span>')
            most = 0
    return "".join(parts)


def _table(anatomy: Anatomy) -> str:
    names = ["layer", "head", "slots", *(["error", "evicted", "mass error"] if anatomy.judged else [])]
    names += ["mean vote", "largest vote", "fallbacks"]
    rows = ["<tr>" + "".join(f"<th scope=col>{name}</th>" for name in names) + "</tr>"]
    for head in anatomy.heads:
        result = head.result
        mean_vote = sum(head.votes) / max(1, len(head.votes))
        row = [f"{head.layer}", f"{head.head}", f"{result.slots:,}"]
        if anatomy.judged:
            row += [f"{result.error:.2%}", f"{result.evict_error:.2%}", f"{result.mass_error:.2%}"]
        row += [f"{mean_vote:,.2f}", f"{result.max_vote:,.1f}", f"{result.fallbacks}"]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>")
    return f"<div class=scroll tabindex=0><table>{''.join(rows)}</table></div>"
