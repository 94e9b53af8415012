"""Results as a person reads them, on standard output."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table

from keepkv.cache.report import Report
from keepkv.cli.progress import err, out
from keepkv.eval.fidelity import Fidelity
from keepkv.inspection.anatomy import Anatomy
from keepkv.inspection.checkup import Checkup
from keepkv.methods import METHODS
from keepkv.render import size
from keepkv.text.ask import AskResult

if TYPE_CHECKING:
    from keepkv.documents.store import Entry


def show_checkup(found: Checkup) -> None:
    """What a model is, what its cache takes at some lengths, and what was tried."""
    facts = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    others = {"have a sliding window": found.windows, "have a state": found.states, "use other layers' keys": found.sharing}
    facts.add_row("type", found.family)
    kinds = ", ".join(f"{count} {what}" for what, count in {"are compressed": found.compressed, **others}.items() if count)
    facts.add_row("layers", f"{found.layers}: {kinds}")
    facts.add_row("keys", f"{found.heads} KV heads of {found.size} dimensions, {found.unrotated} layers without rotation")
    facts.add_row("a token takes", size(found.token_bytes))
    out.print(facts)
    out.print()
    costs = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("tokens", "full cache", "budget 25%", "budget 10%", "budget 5%"):
        costs.add_column(title, justify="right")
    for tokens in (2048, 8192, 32768, 131072):
        kept = (size(found.kept_bytes(tokens, share)) for share in (0.25, 0.1, 0.05))
        costs.add_row(f"{tokens:,}", size(found.full_bytes(tokens)), *kept)
    out.print(costs)
    out.print()
    trials = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for trial in found.trials:
        trials.add_row("[green]yes[/]" if trial.passed else "[red]NO[/]", escape(trial.name), escape(trial.detail))
    out.print(trials)


def show_asked(results: Sequence[AskResult]) -> None:
    """Answers side by side, then what each cache took."""
    several = len(results) > 1
    answers = Table(show_header=several, box=None, pad_edge=False, padding=(0, 2, 1, 0), expand=several)
    answers.add_column("", style="bold", ratio=1)
    for result in results:
        answers.add_column(result.method, ratio=2)
    for same_question in zip(*(result.answers for result in results), strict=True):
        texts = [" ".join(answer.answer.split()) for answer in same_question]
        answers.add_row(escape(same_question[0].question), *map(escape, texts))
    out.print(answers)

    numbers = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    numbers.add_column("")
    for result in results:
        numbers.add_column(result.method, justify="right")
    values = [result.to_dict() for result in results]
    reports = [result.report for result in results]
    dtypes = ["" if report.slot_dtype == "float" else f" ({report.slot_dtype})" for report in reports]
    numbers.add_row("tokens read", *(f"{value['tokens']:,}" for value in values))
    numbers.add_row(
        "slots per KV head", *(f"{value['slots_per_head']:,.0f}{dtype}" for value, dtype in zip(values, dtypes, strict=True))
    )
    numbers.add_row("full cache", *(size(report.kv_bytes_full) for report in reports))
    numbers.add_row("compressed cache", *(size(report.kv_bytes) for report in reports))
    if results[0].loaded:
        numbers.add_row("loading", *(f"{result.prefill_seconds:.2f} s" for result in results))
    else:
        numbers.add_row("reading", *(f"{result.prefill_seconds:.1f} s" for result in results))
        numbers.add_row("compressing", *(f"{result.compress_seconds:.1f} s" for result in results))
    if any(answer.sources for result in results for answer in result.answers):
        numbers.add_row("looking back", *map(_looked_back, results))
    numbers.add_row("answering", *(f"{result.decode_tokens_per_second:.1f} tokens/s" for result in results))
    out.print(numbers)
    for result in results:
        if result.report.note and result.method != "full":
            err.print(f"{result.method}: {result.report.note}")


def _looked_back(result: AskResult) -> str:
    """What a question brings back on average, and what that takes."""
    sources = [answer.sources for answer in result.answers if answer.sources]
    if not any(one.tokens for one in sources):
        return "nothing"
    mean_tokens, mean_bytes = fmean(one.tokens for one in sources), fmean(one.bytes for one in sources)
    index, seconds = sources[0].index_bytes, fmean(one.seconds for one in sources)
    return f"{mean_tokens:,.0f} tokens, {size(round(mean_bytes))}, index {size(index)}, {seconds:.1f} s"


def show_sources(result: AskResult) -> None:
    """For every answer the passages that came back, with their places."""
    for answer in result.answers:
        out.print(f"\n[bold]{escape(answer.question)}[/bold]")
        sources = answer.sources
        if sources is None or not sources.spans:
            out.print("Nothing was looked back at.")
            continue
        for (first, last), text in zip(sources.spans, sources.texts, strict=True):
            out.print(f"tokens {first:,} to {last - 1:,}: {' '.join(text.split())}", markup=False, highlight=False)


def show_verdict(ours: AskResult, full: AskResult) -> None:
    """Two lines: how many times smaller the cache is, and how similar the answers are."""
    same = sum(a.answer == b.answer for a, b in zip(ours.answers, full.answers, strict=True))
    _say_smaller(ours.report)
    out.print(
        f"Alike: {same} of {len(full.answers)} answers are word for word those of the full cache. "
        f"Both would choose {100 * (ours.alike or 0):.0f}% of its words."
    )


def _say_smaller(report: Report) -> None:
    out.print(
        f"Smaller: {report.ratio:.1f} times. The cache of {report.tokens[0]:,} tokens takes {size(report.kv_bytes)} "
        f"instead of {size(report.kv_bytes_full)}."
    )


def show_anatomy(anatomy: Anatomy) -> None:
    """One line per layer: slots per head, errors, largest vote; then the totals."""
    report = anatomy.report
    layers = anatomy.layers
    judged = anatomy.judged
    most_slots = max(sum(head.result.slots for head in layer) for layer in layers)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("layer", justify="right")
    table.add_column("slots per head", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name in ("error", "if evicted", "largest vote", "fallbacks"):
        table.add_column(name, justify="right")
    for layer in layers:
        heads = [head.result for head in layer]
        slots = [head.slots for head in heads]
        counts = " ".join(f"{count:>5,}" for count in slots) if len(slots) <= 4 else f"{min(slots):,} to {max(slots):,}"
        bar = "█" * round(8 * sum(slots) / most_slots)
        error = f"{fmean(head.error for head in heads):.2%}" if judged else ""
        evict_error = f"{fmean(head.evict_error for head in heads):.2%}" if judged else ""
        largest_vote = f"{max(head.max_vote for head in heads):,.1f}"
        fallbacks = sum(head.fallbacks > 0 for head in heads)
        table.add_row(f"{layer[0].layer}", counts, bar, error, evict_error, largest_vote, f"{fallbacks or ''}")
    out.print(table)
    if judged:
        out.print(
            f"Predicted error: a head loses {report.error:.2%} of its output on held-out queries (mean over heads), and would "
            f"lose {anatomy.evict_error:.2%} if tokens were evicted instead of merged."
        )
    else:
        out.print(f"{report.method} does not predict errors: there are none to show.")
    out.print(f"Fallbacks to eviction: {anatomy.fallen} of {len(anatomy.heads)} heads.")
    _say_smaller(report)


def show_fidelity(records: Sequence[Fidelity]) -> None:
    """One line per method and budget; lower KL is better."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("method", no_wrap=True)
    for name in ("budget", "delta NLL", "KL", "top-1", "bytes", "full bytes", "reading", "compressing"):
        table.add_column(name, justify="right")
    for record in records:
        table.add_row(
            record.method,
            f"{record.budget} {record.slot_dtype}".removesuffix(" float"),
            f"{record.delta_nll:+.4f}",
            f"{record.kl:.4f}",
            f"{100 * record.top1:.1f}%",
            size(record.kv_bytes),
            size(record.kv_bytes_full),
            f"{record.prefill_seconds:.1f} s",
            f"{record.compress_seconds:.1f} s",
        )
    out.print(table)
    first = records[0]
    out.print(
        f"Mean of {first.segments} x {first.context_tokens:,} tokens compressed, {first.continuation_tokens - 1} true next "
        "tokens each, compared with the full cache. Lower delta NLL and KL (in nats) and higher top-1 agreement are better."
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
    ratio = facts["kv_bytes_full"] / max(1, facts["kv_bytes"])
    seconds = facts["compress_seconds"] + facts["repeat_seconds"]
    work = f"read in {facts['reading_seconds']:.1f} s, compressed in {seconds:.1f} s" if facts["made"] else "was there already"
    return (
        f"{facts['file']}: {facts['tokens']:,} tokens, cache {size(facts['kv_bytes'])} instead of "
        f"{size(facts['kv_bytes_full'])} ({ratio:.1f} times smaller), file {size(facts['bytes'])}, {work}"
    )


def show_entries(entries: Sequence[Entry]) -> None:
    """A table of entries: key, source, tokens, bytes, recipe, and how long ago each was used."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("key", "source", "tokens", "size", "recipe", "used"):
        table.add_column(name, justify="right" if name in ("tokens", "size", "used") else "left")
    for entry in entries:
        recipe = f"{entry.method} {entry.budget}{' exact' if entry.exact else ''}"
        source = escape(Path(entry.source).name)
        table.add_row(entry.key[:12], source, f"{entry.tokens:,}", size(entry.bytes), recipe, _ago(entry.used))
    out.print(table)


def _ago(then: float) -> str:
    seconds = max(0.0, time.time() - then)
    for name, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {name} ago"
    return "now"
