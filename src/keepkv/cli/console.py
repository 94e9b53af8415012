"""Results as a person reads them, on standard output."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.markdown import Markdown
from rich.table import Table

from keepkv.cache.report import Report
from keepkv.cli.progress import err, out
from keepkv.eval.fidelity import Fidelity
from keepkv.inspection.anatomy import Anatomy
from keepkv.methods import METHODS
from keepkv.render import size
from keepkv.text.ask import AskResult

if TYPE_CHECKING:
    from keepkv.documents.store import Entry


def show_asked(results: Sequence[AskResult]) -> None:
    """Answers side by side, then what each cache took."""
    several = len(results) > 1
    answers = Table(show_header=several, box=None, pad_edge=False, padding=(0, 2, 1, 0), expand=several)
    answers.add_column("", style="bold", ratio=1)
    for result in results:
        answers.add_column(result.method, ratio=2)
    for row in zip(*(result.answers for result in results), strict=True):
        answers.add_row(row[0].question, *(" ".join(answer.answer.split()) for answer in row))
    out.print(answers)

    facts = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    facts.add_column("")
    for result in results:
        facts.add_column(result.method, justify="right")
    lines = [(result.to_dict(), result.report) for result in results]
    facts.add_row("tokens read", *(f"{facts_of['tokens']:,}" for facts_of, _ in lines))
    facts.add_row(
        "slots per KV head",
        *(
            f"{f['slots_per_head']:,.0f}{'' if report.slot_dtype == 'float' else f' ({report.slot_dtype})'}"
            for f, report in lines
        ),
    )
    facts.add_row("cache, full", *(size(report.kv_bytes_full) for _, report in lines))
    facts.add_row("cache, kept", *(size(report.kv_bytes) for _, report in lines))
    if results[0].loaded:
        facts.add_row("loading", *(f"{result.prefill_seconds:.2f} s" for result in results))
    else:
        facts.add_row("reading", *(f"{result.prefill_seconds:.1f} s" for result in results))
        facts.add_row("compressing", *(f"{result.compress_seconds:.1f} s" for result in results))
    facts.add_row("answering", *(f"{result.decode_tokens_per_second:.1f} tokens/s" for result in results))
    out.print(facts)
    for result in results:
        if result.report.note and result.method != "full":
            err.print(f"{result.method}: {result.report.note}")


def show_verdict(ours: AskResult, full: AskResult) -> None:
    """Two lines: how many times smaller, how alike."""
    same = sum(a.answer == b.answer for a, b in zip(ours.answers, full.answers, strict=True))
    _say_smaller(ours.report)
    out.print(
        f"Alike: {same} of {len(full.answers)} answers are word for word those of the full cache; "
        f"{100 * (ours.alike or 0):.0f}% of its words would be chosen by both."
    )


def _say_smaller(report: Report) -> None:
    out.print(
        f"Smaller: {report.ratio:.1f} times. The cache of {report.tokens[0]:,} tokens takes {size(report.kv_bytes)} "
        f"instead of {size(report.kv_bytes_full)}."
    )


def show_anatomy(anatomy: Anatomy) -> None:
    """One line per layer: slots per head, errors, largest vote; then the totals."""
    report, layers, judged = anatomy.report, anatomy.layers, anatomy.judged
    most = max(sum(head.result.slots for head in layer) for layer in layers)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("layer", justify="right")
    table.add_column("slots per head", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name in ("error", "evicted", "largest vote", "fell back"):
        table.add_column(name, justify="right")
    for layer in layers:
        made = [head.result for head in layer]
        slots = [head.slots for head in made]
        shown = " ".join(f"{count:>5,}" for count in slots) if len(slots) <= 4 else f"{min(slots):,} to {max(slots):,}"
        lost = [f"{fmean(errors):.2%}" for errors in ([head.error for head in made], [head.evict_error for head in made])]
        fell = sum(head.fallbacks > 0 for head in made)
        table.add_row(
            f"{layer[0].layer}", shown, "█" * round(8 * sum(slots) / most), *(lost if judged else ("", "")),
            f"{max(head.max_vote for head in made):,.1f}", f"{fell or ''}",
        )  # fmt: skip
    out.print(table)
    if judged:
        out.print(
            f"Lost of a head's output on held-out queries: {report.error:.2%} (mean over heads), "
            f"{anatomy.evict_error:.2%} had it been evicted."
        )
    else:
        out.print(f"{report.method} holds no queries out: it has no errors to show.")
    out.print(f"Fallen back to eviction: {anatomy.fallen} of {len(anatomy.heads)} heads.")
    _say_smaller(report)


def show_fidelity(records: Sequence[Fidelity]) -> None:
    """One line per method and budget; lower KL is better."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("method", no_wrap=True)
    for name in ("budget", "delta NLL", "KL", "top-1", "kept", "full", "reading", "compressing"):
        table.add_column(name, justify="right")
    for record in records:
        table.add_row(
            record.method, f"{record.budget} {record.slot_dtype}".removesuffix(" float"), f"{record.delta_nll:+.4f}",
            f"{record.kl:.4f}", f"{100 * record.top1:.1f}%", size(record.kv_bytes), size(record.kv_bytes_full),
            f"{record.prefill_seconds:.1f} s", f"{record.compress_seconds:.1f} s",
        )  # fmt: skip
    out.print(table)
    first = records[0]
    out.print(
        f"Mean of {first.segments} x {first.context_tokens:,} tokens compressed, {first.continuation_tokens - 1} true next "
        "tokens each, against the full cache: lower delta NLL and KL (nats), higher top-1 agreement are better."
    )


def show_pages(pages: Sequence[str]) -> None:
    """Markdown, laid out in a terminal, as it is elsewhere."""
    for page in pages:
        out.print(Markdown(page) if out.is_terminal else page, markup=False, highlight=False, soft_wrap=not out.is_terminal)


def show_methods() -> None:
    """The method table."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("method", "what is kept", "paper"):
        table.add_column(name, no_wrap=name == "method")
    for method in METHODS.values():
        table.add_row(method.name, method.summary, method.paper)
    out.print(table)


def line_of(facts: Mapping[str, Any]) -> str:
    """One line about a compiled file."""
    from keepkv.render import size

    smaller = facts["kv_bytes_full"] / max(1, facts["kv_bytes"])
    seconds = facts["compress_seconds"] + facts["repeat_seconds"]
    how = f"read in {facts['reading_seconds']:.1f} s, compressed in {seconds:.1f} s" if facts["made"] else "was there already"
    return (
        f"{facts['file']}: {facts['tokens']:,} tokens, cache {size(facts['kv_bytes'])} instead of "
        f"{size(facts['kv_bytes_full'])} ({smaller:.1f}x), file {size(facts['bytes'])}, {how}"
    )


def show_entries(entries: Sequence[Entry]) -> None:
    """A table of entries: key, source, tokens, bytes, recipe, and how long ago each was used."""
    from keepkv.render import size

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, justify in (("key", "left"), ("source", "left"), ("tokens", "right"), ("size", "right"), ("recipe", "left")):
        table.add_column(name, justify="right" if justify == "right" else "left")
    table.add_column("used", justify="right")
    for entry in entries:
        recipe = f"{entry.method} {entry.budget}{' exact' if entry.exact else ''}"
        table.add_row(entry.key[:12], Path(entry.source).name, f"{entry.tokens:,}", size(entry.bytes), recipe, _ago(entry.used))
    out.print(table)


def _ago(then: float) -> str:
    seconds = max(0.0, time.time() - then)
    for name, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {name} ago"
    return "now"
