"""The commands `keepkv eval` and `keepkv report`. Heavy imports happen inside them, so that --help answers at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keepkv.cli.options import Debug, Json
from keepkv.cli.progress import bar, err
from keepkv.errors import InputError

if TYPE_CHECKING:
    from keepkv.eval.summary import Summary


Run = Annotated[
    Path | None, typer.Argument(help="The run's folder; one that exists is continued.", metavar="[RUN]", show_default=False)
]
Runs = Annotated[list[Path], typer.Argument(help="Folders of runs; several are shown together.", metavar="RUN...")]


def _option(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, show_default=False)


def evaluate(
    run: Run = None,
    config: Annotated[Path | None, _option("Settings from a TOML file; options here change them.")] = None,
    model: Annotated[str | None, _option("smollm2 (default), a folder, or a Hugging Face id.")] = None,
    tasks: Annotated[str | None, _option("Separated by commas; all for all. See --list.")] = None,
    data: Annotated[
        list[str] | None,
        _option(
            "A file of SQuAD, RULER, LongBench, GSM8K, QMSum or key-value retrieval as a task; hf:OWNER/NAME[:CONFIG[:SPLIT]]."
        ),
    ] = None,
    methods: Annotated[str | None, _option("Separated by commas (default keepkv,snapkv,h2o); full is always there.")] = None,
    budgets: Annotated[str | None, _option("Separated by commas (default 10%,5%): shares, slots per head, or bytes.")] = None,
    lengths: Annotated[str | None, _option("Tokens of the texts, separated by commas (default 1024).")] = None,
    samples: Annotated[int | None, _option("Of every task and length (default 5).")] = None,
    by: Annotated[
        str | None, _option("choice (default): the likeliest of four answers; answer: what the model writes.")
    ] = None,
    question_aware: Annotated[
        bool | None,
        typer.Option(
            "--question-aware/--question-after", help="The question is in the text when it is compressed.", show_default=False
        ),
    ] = None,
    repeat: Annotated[str | None, _option("auto (default), always, never: whether the text is repeated.")] = None,
    slot_dtype: Annotated[str | None, _option("How slots are stored: float (default), int8, int4.")] = None,
    chunk: Annotated[int | None, _option("Tokens read at a time; default: all at once up to 8,192, else 2,048.")] = None,
    haystack: Annotated[
        str | None, _option("Prose to hide things in: a file or a folder (default: installed documentation).")
    ] = None,
    max_new_tokens: Annotated[int | None, _option("Maximum number of tokens in an answer (default 64).")] = None,
    written: Annotated[int | None, _option("Tokens that drift writes (default 2000).")] = None,
    dtype: Annotated[str | None, _option("auto (default), float32, bfloat16, float16.")] = None,
    seed: Annotated[int | None, _option("Same seed, same samples (default 0).")] = None,
    device: Annotated[str, typer.Option(help="Of each process: auto, cpu, or several: cuda:0,cuda:1.")] = "auto",
    workers: Annotated[int, typer.Option(min=1, help="Processes on each device.")] = 1,
    show: Annotated[bool, typer.Option("--list", help="List the tasks, and do nothing.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure model × tasks × methods × budgets into a folder of records, and sum them up.

    Every text is read once, compressed in every way, and asked only afterwards. A run that was stopped goes on when it is
    started again; tasks, methods, budgets, lengths and samples may be added later.

    [bold]keepkv eval runs/first --tasks needle,facts,json --methods keepkv,snapkv --budgets 10%,5%[/bold]

    [bold]keepkv eval runs/xquad --data xquad.en.json --by answer --lengths 2048[/bold]

    [bold]keepkv eval runs/big --model my/model --tasks all --lengths 4096,16384 --device cuda:0,cuda:1[/bold]

    [bold]keepkv eval runs/first[/bold]   goes on where it was stopped
    """
    if show:
        _list(as_json)
        return
    if run is None:
        raise InputError("where to? give the folder of a run: keepkv eval runs/first")
    with bar("preparing") as line:
        from keepkv.eval import config as settings
        from keepkv.eval import records, summary
        from keepkv.eval import run as running
        from keepkv.eval.tasks import registry

        started = run / settings.FILE
        base = settings.load(started) if started.exists() else settings.Config()
        base = settings.load(config, base) if config else base
        given: dict[str, Any] = {
            "model": model, "tasks": _parts(tasks), "data": data, "methods": _parts(methods), "budgets": _parts(budgets),
            "lengths": _numbers(lengths), "samples": samples, "by": by, "question_aware": question_aware,
            "repeat": repeat, "slot_dtype": slot_dtype, "chunk": chunk, "haystack": haystack, "max_new_tokens": max_new_tokens,
            "written": written, "dtype": dtype, "seed": seed,
        }  # fmt: skip
        if given["tasks"] == ["all"]:
            given["tasks"] = list(registry.TASKS)
        if data and tasks is None and not started.exists() and config is None:
            given["tasks"] = []
        wanted = settings.changed(base, {name: value for name, value in given.items() if value is not None}, "options")
        devices = [place for place in device.split(",") for _ in range(workers)]
        said, shown = time.monotonic(), line.phase("loading the model")

        def tell(done: int, of: int, left: float) -> None:
            nonlocal said
            title = f"{done:,} of {of:,} samples, about {_span(left)} left"
            line.title(title)
            shown(done, of)
            if not err.is_terminal and (time.monotonic() - said > 30 or done == of):
                said = time.monotonic()
                err.print(title)

        running.run(run, wanted, devices, tell)
        found = records.load(run)
        result = summary.summarise(found)
        summary.write(run, result)
    _print(result, as_json)
    failed = [record for record in found if record.failed]
    if failed:
        err.print(f"[yellow]{len(failed)} of {len(found)} records failed[/yellow], the first: {failed[0].failed}", markup=True)


def report(
    runs: Runs,
    out: Annotated[Path | None, _option("The folder to write to (default: the first run's).")] = None,
    png: Annotated[bool, typer.Option("--png", help="Also write the figures as PNG (needs keepkv\\[plot]).")] = False,
    against: Annotated[
        Path | None, _option("An older run of the same samples: ends with status 1 if a method got worse.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Turn records into tables and figures: report.md, and report.html, one page without outside requests.

    [bold]keepkv report runs/first --png[/bold]

    [bold]keepkv report runs/small runs/big --out comparison[/bold]

    [bold]keepkv report runs/new --against benchmarks/results/eval-quick[/bold]
    """
    with bar("reading the records"):
        from keepkv.eval import config as settings
        from keepkv.eval import records, summary
        from keepkv.eval.report import figures, html, markdown, worst
        from keepkv.eval.report.png import save
        from keepkv.render import require_matplotlib

        found = [record for run in runs for record in records.load(run)]
        result = summary.summarise(found)
        target = out or runs[0]
        if png:
            require_matplotlib()
        drawn = figures.all_of(found, result)
        told = {str(run): settings.written(settings.load(run / settings.FILE)) for run in runs}
        try:
            target.mkdir(parents=True, exist_ok=True)
            (target / "report.md").write_text(markdown.report(found, result, told), encoding="utf-8")
            (target / "report.html").write_text(html.page(found, result, drawn, told, worst.texts_of(runs)), encoding="utf-8")
            if out is None and len(runs) == 1:
                summary.write(target, result)
            if png:
                save(drawn, target)
        except OSError as error:
            raise InputError(f"{error.filename!r} cannot be written ({error.strerror})") from error
    if against is not None:
        worse = _regressions(found, records.load(against))
        if as_json:
            _print(result, True)
        for name, budget, difference in worse:
            err.print(f"worse than {against}: {name} at {budget}, by {difference} of the score", markup=False)
        if worse:
            raise typer.Exit(1)
        err.print(f"no method is worse than in {against} beyond its interval", markup=False)
        return
    _print(result, as_json)
    err.print(f"{target / 'report.html'}, {target / 'report.md'}", markup=False)


def _regressions(found: list[Any], before: list[Any]) -> list[tuple[str, str, Any]]:
    """Methods whose paired difference to the older run lies below 0 with its whole interval."""
    from keepkv.eval.summary import by_method, paired

    now, then = by_method(found), by_method(before)
    if not now.keys() & then.keys():
        raise InputError("the two runs have no method and budget in common: nothing to compare")
    pairs = {key: paired(now[key], then[key]) for key in sorted(now.keys() & then.keys())}
    if not any(pairs.values()):
        raise InputError("the two runs have no sample in common: nothing to compare")
    return [(key[1], key[2], difference) for key, difference in pairs.items() if difference and difference.high < 0]


def _parts(text: str | None) -> list[str] | None:
    return None if text is None else list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _numbers(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in _parts(text) or []]
    except ValueError:
        raise InputError(f"--lengths {text!r}: expected whole numbers of tokens, separated by commas: 1024,4096") from None


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _print(result: Summary, as_json: bool) -> None:
    if as_json:
        typer.echo(result.text(), nl=False)
        return
    from keepkv.cli import eval_tables

    eval_tables.show(result)


def _list(as_json: bool) -> None:
    import json

    from keepkv.cli import eval_tables
    from keepkv.eval.tasks import registry

    rows = [{"name": task.name, "summary": task.summary, "source": task.source} for task in registry.TASKS.values()]
    if as_json:
        typer.echo(json.dumps(rows, ensure_ascii=False))
    else:
        eval_tables.show_tasks(rows)
