"""`keepkv eval` and `keepkv report`. Heavy imports happen inside the commands, so that --help answers at once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from keepkv.cli.options import COMPRESSION, MODEL, OUTPUT, Debug, Json, argument, flag, option, shown_default
from keepkv.cli.progress import bar, err
from keepkv.errors import InputError
from keepkv.paths import write_file

if TYPE_CHECKING:
    from keepkv.eval.bootstrap import Interval
    from keepkv.eval.records import Record
    from keepkv.eval.summary import Summary

TASKS = "Tasks"


def _setting(help: str, metavar: str, panel: str, default: str = "", *names: str) -> Any:
    """An option that is taken from the run's settings if it is not given."""
    return option(f"{help} {shown_default(default)}" if default else help, metavar, panel, *names, show_default=False)


def evaluate(
    run: Annotated[Path | None, argument("The folder of the run. A run that exists is continued.", "RUN")] = None,
    tasks: Annotated[
        str | None,
        _setting(
            'Tasks, separated by commas, or "all". See --list.', "NAMES", TASKS, "needle,needles-4,facts,pairs,variables,json"
        ),
    ] = None,
    list_tasks: Annotated[bool, flag("List the tasks, and do nothing else.", "--list", TASKS)] = False,
    lengths: Annotated[str | None, _setting("Tokens of the texts, separated by commas.", "TOKENS", TASKS, "1024")] = None,
    samples: Annotated[int | None, _setting("Texts of every task and length.", "N", TASKS, "5")] = None,
    data: Annotated[
        list[str] | None,
        _setting(
            "A task from a file of SQuAD, RULER, LongBench, GSM8K, QMSum or key-value retrieval, or from the Hugging Face Hub "
            "as hf:OWNER/NAME. May be given several times.",
            "FILE",
            TASKS,
        ),
    ] = None,
    haystack: Annotated[
        str | None,
        _setting(
            "A text file or a folder of prose to hide facts in, or a folder's name of make texts.",
            "PATH",
            TASKS,
            "documentation of installed packages",
        ),
    ] = None,
    by: Annotated[
        str | None,
        _setting(
            '"choice" scores the likeliest of four given answers, "answer" what the model writes.',
            "[choice|answer]",
            TASKS,
            "choice",
        ),
    ] = None,
    question_aware: Annotated[
        bool | None,
        typer.Option(
            "--question-aware/--question-after",
            help="Whether the question is in the text when the text is compressed. By default it comes after.",
            metavar="",
            rich_help_panel=TASKS,
            show_default=False,
        ),
    ] = None,
    written: Annotated[int | None, _setting("Tokens that the task drift writes.", "TOKENS", TASKS, "2000")] = None,
    max_new_tokens: Annotated[int | None, _setting("Maximum number of tokens in an answer.", "N", TASKS, "64")] = None,
    seed: Annotated[int | None, _setting("Random seed: the same seed gives the same samples.", "N", TASKS, "0")] = None,
    methods: Annotated[
        str | None,
        _setting(
            'Compression methods, separated by commas. "all" is every one of keepkv methods, FILE.py:NAME is your own, and '
            '"bm25" a rival: retrieval of as many tokens as plain text. The full cache is always measured too.',
            "NAMES",
            COMPRESSION,
            "keepkv,snapkv,h2o",
        ),
    ] = None,
    budgets: Annotated[
        str | None,
        _setting(
            "Budgets, separated by commas: shares of the full cache, slots per KV head, or bytes.",
            "BUDGETS",
            COMPRESSION,
            "10%,5%",
        ),
    ] = None,
    repeat: Annotated[
        str | None,
        _setting("Whether to feed the text a second time before it is compressed.", "[auto|always|never]", COMPRESSION, "auto"),
    ] = None,
    slot_dtypes: Annotated[
        str | None,
        _setting(
            "How the kept keys and values are stored: names, separated by commas. Each but auto and float stores the full "
            "cache too, as the method kivi.",
            "[auto|float|bfloat16|int8|int4|int2]",
            COMPRESSION,
            "auto",
            "--slot-dtype",
        ),
    ] = None,
    full_dtype: Annotated[
        str | None,
        _setting(
            "The dtype in which the full cache is counted, for shares and budgets. auto: that of the model.",
            "DTYPE",
            COMPRESSION,
            "auto",
        ),
    ] = None,
    chunk: Annotated[
        int | None,
        _setting(
            "Read this many tokens at a time. 0 reads everything at once.",
            "TOKENS",
            COMPRESSION,
            "2048 for texts of more than 8,192 tokens, otherwise 0",
        ),
    ] = None,
    lookback: Annotated[
        str | None,
        _setting(
            "For each question, bring so many tokens of the text back, word for word. The bytes of the index and of what comes "
            "back are measures of their own.",
            "[auto|off|TOKENS]",
            COMPRESSION,
            "off",
        ),
    ] = None,
    models: Annotated[
        str | None,
        _setting(
            'Models, separated by commas, one loaded after the other: "smollm2" (embedded, no network), a model folder, or a '
            "Hugging Face id.",
            "MODELS",
            MODEL,
            "smollm2",
            "--model",
        ),
    ] = None,
    dtype: Annotated[str | None, _setting('"float32", "bfloat16", "float16" or "auto".', "DTYPE", MODEL, "auto")] = None,
    device: Annotated[
        str, option('"auto", "cpu", or several devices, each with a process of its own: "cuda:0,cuda:1".', "DEVICES", MODEL)
    ] = "auto",
    workers: Annotated[int, option("Processes on each device.", "N", MODEL, min=1)] = 1,
    minutes: Annotated[
        float | None,
        option(
            "Stop after so many minutes, between two measurements. The same command goes on from there.",
            "N",
            OUTPUT,
            min=0,
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        _setting("Take the settings from a TOML file. Options at the command line come before it.", "FILE", OUTPUT),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure models, methods, budgets and slot dtypes on tasks, and write the records into a folder.

    Every text is read once, compressed in every way, and asked only afterwards. A run that was stopped continues when it is
    started again, and models, tasks, methods, budgets, slot dtypes, lengths and samples may be added later.

    $ keepkv eval runs/first --tasks needle,facts,json --methods keepkv,snapkv --budgets 10%,5%
    $ keepkv eval runs/first    (continues a run that was stopped)
    $ keepkv eval runs/kit --model smollm2,my/model --methods all,bm25 --slot-dtype float,int8 --by answer --minutes 60
    $ keepkv eval runs/xquad --data xquad.en.json --by answer --lengths 2048
    $ keepkv eval runs/big --model my/model --tasks all --lengths 4096,16384 --device cuda:0,cuda:1
    """
    if list_tasks:
        _list(as_json)
        return
    if run is None:
        raise InputError("the folder of the run is missing: give one, as in keepkv eval runs/first")
    with bar("preparing") as line:
        from keepkv.eval import config as settings
        from keepkv.eval import records, summary
        from keepkv.eval import run as running

        started = run / settings.FILE
        base = settings.load_run(run) if started.exists() else settings.Config()
        base = settings.load_config(config, base) if config else base
        options: dict[str, Any] = {
            "models": _names(models),
            "tasks": _names(tasks),
            "data": data,
            "methods": _names(methods),
            "budgets": _names(budgets),
            "lengths": _numbers(lengths),
            "samples": samples,
            "by": by,
            "question_aware": question_aware,
            "repeat": repeat,
            "slot_dtypes": _names(slot_dtypes),
            "full_dtype": full_dtype,
            "chunk": chunk,
            "lookback": lookback,
            "haystack": haystack,
            "max_new_tokens": max_new_tokens,
            "written": written,
            "dtype": dtype,
            "seed": seed,
        }
        if data and tasks is None and not started.exists() and config is None:
            options["tasks"] = []
        typed = {name: value for name, value in options.items() if value is not None}
        run_config = settings.changed(base, typed, "the command line")
        devices = [place for place in device.split(",") for _ in range(workers)]
        shown = line.phase("loading a model")
        last_printed = time.monotonic()

        def progress(finished: int, total: int, seconds_left: float) -> None:
            nonlocal last_printed
            title = f"{finished:,} of {total:,} measurements, about {_duration(seconds_left)} left"
            line.title(title)
            shown(finished, total)
            if not err.is_terminal and (time.monotonic() - last_printed > 30 or finished == total):
                last_printed = time.monotonic()
                err.print(title)

        made, left = running.run(run, run_config, devices, progress, minutes)
        run_records = records.load_records(run)
        if left and not summary.full_records(run_records):
            result = summary.Summary((), ())
        else:
            result = summary.summarize(run_records)
            summary.write_summary(run, result)
    _print(result, as_json)
    if left:
        err.print(
            f"Stopped after {minutes:g} minutes: {made:,} measurements made, {left:,} are left. The same command continues.",
            markup=False,
        )
    failed = [record for record in run_records if record.failed]
    if failed:
        err.print(f"[yellow]{len(failed)} of {len(run_records)} answers failed.[/yellow] The first: {escape(failed[0].failed)}")


def report(
    runs: Annotated[list[Path], argument("The folders of one run or several, which are shown together.", "RUN...")],
    out: Annotated[Path | None, _setting("The folder to write to.", "FOLDER", OUTPUT, "the folder of the first run")] = None,
    png: Annotated[bool, flag("Also write the figures as PNG. Needs pip install 'keepkv\\[plot]'.", "--png", OUTPUT)] = False,
    against: Annotated[
        Path | None,
        option(
            "An older run of the same samples: the command ends with status 1 if a method got worse.",
            "RUN",
            OUTPUT,
            show_default=False,
        ),
    ] = None,
    leave_one_model_out: Annotated[
        bool,
        flag(
            "Instead: pick the best variant on all models but one, and judge it on that one, for every model and budget.",
            "--leave-one-model-out",
            "Choosing",
        ),
    ] = False,
    by_measure: Annotated[str, option("What is best: the highest score or the lowest KL.", "[score|kl]", "Choosing")] = "score",
    among: Annotated[
        str | None,
        option(
            "Choose among these methods only, separated by commas: for example your own with different constants.",
            "NAMES",
            "Choosing",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Turn records into tables and figures: report.md and report.html.

    The HTML page makes no requests, and can be mailed as it is. With --leave-one-model-out nothing is written but
    leave-one-model-out.json.

    $ keepkv report runs/first --png
    $ keepkv report runs/small runs/big --out comparison
    $ keepkv report runs/new --against benchmarks/results/eval-quick
    $ keepkv report runs/kit --leave-one-model-out --by-measure kl --among keepkv-a,keepkv-b
    """
    if leave_one_model_out:
        _leave_one_model_out(runs, out or runs[0], by_measure, _names(among), as_json)
        return
    with bar("reading the records"):
        from keepkv.eval import config as settings
        from keepkv.eval import records, summary
        from keepkv.eval.report import figures, html, markdown, worst
        from keepkv.eval.report.png import save_figures
        from keepkv.render import require_matplotlib

        run_records = [record for run in runs for record in records.load_records(run)]
        result = summary.summarize(run_records)
        target = out or runs[0]
        if png:
            require_matplotlib()
        drawings = figures.all_of(run_records, result)
        run_settings = {str(run): settings.to_toml(settings.load_run(run)) for run in runs}
        text = markdown.markdown_report(run_records, result, run_settings)
        page = html.html_report(run_records, result, drawings, run_settings, worst.texts_of(runs))
        with _writing(target):
            write_file(target / "report.md", text)
            write_file(target / "report.html", page)
            if out is None and len(runs) == 1:
                summary.write_summary(target, result)
            if png:
                save_figures(drawings, target)
    if against is not None:
        regressions = _regressions(run_records, records.load_records(against))
        if as_json:
            _print(result, True)
        for variant, difference in regressions:
            err.print(f"worse than {against}: {variant}, by {difference} of the score", markup=False)
        if regressions:
            raise typer.Exit(1)
        err.print(f"no method is significantly worse than in {against}", markup=False)
        return
    _print(result, as_json)
    err.print(f"{target / 'report.html'}, {target / 'report.md'}", markup=False)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Makes the folder that a report is written to. Raises InputError if it cannot be written."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise InputError(f"{error.filename!r} cannot be written ({error.strerror}): give another folder with --out") from error


def _leave_one_model_out(runs: Sequence[Path], target: Path, measure: str, among: Sequence[str] | None, as_json: bool) -> None:
    with bar("reading the records"):
        from keepkv.cli import eval_tables
        from keepkv.eval import leave_one_out, records

        held_out = leave_one_out.leave_one_model_out(
            (record for run in runs for record in records.load_records(run)), measure, among
        )
        text = leave_one_out.to_json(held_out)
        with _writing(target):
            write_file(target / leave_one_out.FILE, text)
    if as_json:
        typer.echo(text, nl=False)
    else:
        eval_tables.show_held_out(held_out)


def _regressions(records: list[Record], old_records: list[Record]) -> list[tuple[str, Interval]]:
    """Methods whose paired difference to the older run lies below 0 with its whole interval."""
    from keepkv.eval.summary import by_method, paired

    new, old = by_method(records), by_method(old_records)
    common = sorted(new.keys() & old.keys())
    if not common:
        raise InputError("the two runs have no method and budget in common: compare runs of the same methods and budgets")
    pairs = {key: paired(new[key], old[key]) for key in common}
    if not any(pairs.values()):
        raise InputError("the two runs have no sample in common: compare runs of the same tasks and lengths")
    several = len({key[0] for key in common}) > 1
    worse = {key: difference for key, difference in pairs.items() if difference and difference.high < 0}
    return [
        (f"{f'{model}, ' if several else ''}{method} at {budget} {slot_dtype}".removesuffix(" float"), difference)
        for (model, _, method, budget, slot_dtype), difference in worse.items()
    ]


def _names(text: str | None) -> list[str] | None:
    return None if text is None else list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _numbers(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(number) for number in _names(text) or []]
    except ValueError:
        raise InputError(f"--lengths {text!r}: expected whole numbers of tokens, separated by commas: 1024,4096") from None


def _duration(seconds: float) -> str:
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
    from keepkv.eval.rivals.registry import RIVALS
    from keepkv.eval.tasks import registry

    rows = [{"name": task.name, "summary": task.summary, "source": task.source} for task in registry.TASKS.values()]
    if as_json:
        typer.echo(json.dumps(rows, ensure_ascii=False))
        return
    eval_tables.show_tasks(rows)
    rivals = [{"name": each.name, "summary": each.summary, "source": each.source} for each in RIVALS.values()]
    eval_tables.show_tasks(rivals, "rival (--methods)")
