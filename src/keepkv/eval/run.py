"""Running: every sample is a job, in this process or in several; what is recorded already is not measured again."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from keepkv.errors import InputError
from keepkv.eval import config as settings
from keepkv.eval import records
from keepkv.eval.config import Config
from keepkv.eval.measure import Measure, Outcome, Setup
from keepkv.eval.plan import Job, jobs, tasks_by_name
from keepkv.eval.provenance import commit, versions
from keepkv.eval.records import Record
from keepkv.eval.report.worst import file_of
from keepkv.eval.sample import Draw, Prose, Question, Sample
from keepkv.eval.tasks import datasets, haystack, registry
from keepkv.eval.tasks.task import Task
from keepkv.methods import get
from keepkv.models import loading

ProgressCallback = Callable[[int, int, float], None]  # finished samples, all samples, seconds left


def settled(config: Config) -> Config:
    """The settings with digests of the texts, so that a run cannot be continued with other texts. Raises InputError."""
    config.validate()
    registry.chosen(config.tasks, config.data)
    digests = tuple(hashlib.sha256(repr(datasets.rows(place)).encode()).hexdigest()[:16] for place in config.data)
    return replace(config, haystack_digest=haystack.digest(config.haystack), data_digests=digests)


def begin(folder: Path, config: Config) -> tuple[Config, list[Record]]:
    """Makes the folder of a run, or opens one that exists.

    Returns:
        The settled settings, and the complete records that the folder holds.

    Raises:
        InputError: if the folder holds a run with other settings, or cannot be written.
    """
    config = settled(config)
    recorded: list[Record] = []
    if (folder / settings.FILE).exists():
        settings.continues(settings.load_config(folder / settings.FILE), config, str(folder))
        recorded = records.load_records(folder) if (folder / records.FILE).exists() else []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / settings.FILE).write_text(settings.to_toml(config), encoding="utf-8")
        records.rewrite(folder, recorded)
    except OSError as error:
        raise InputError(f"the run {str(folder)!r} cannot be written ({error.strerror}): give another folder") from error
    return config, recorded


def run(folder: Path, config: Config, devices: Sequence[str], progress: ProgressCallback) -> None:
    """Measures what is missing, with one process for each of the devices, and records it as it comes.

    What goes wrong with a sample is recorded as failed, and the run goes on.

    Args:
        folder: The run's folder; one that exists is continued.
        config: The settings.
        devices: One for every process, such as ("cuda:0", "cuda:1").
        progress: Called after every sample.

    Raises:
        InputError: if the settings cannot be run, or differ from those of the run in the folder.
        ModelError: if the model cannot be loaded.
    """
    config, recorded = begin(folder, config)
    save_texts(folder, config)
    missing = jobs(config, recorded)
    start = time.perf_counter()
    finished: list[Job] = []

    def note(job: Job) -> None:
        finished.append(job)
        work, all_work = (sum(each.length or 4096 for each in some) for some in (finished, missing))
        progress(len(finished), len(missing), (time.perf_counter() - start) * (all_work - work) / work)

    if not missing:
        return
    if len(devices) == 1:
        setup = Setup(*loading.load(config.model, devices[0], config.dtype), config)
        for job in missing:
            for group in measured(setup, job):
                records.append(folder, group)
            note(job)
        return
    spawn = multiprocessing.get_context("spawn")
    free = spawn.Queue()
    for device in devices:
        free.put(device)
    threads = max(1, torch.get_num_threads() // len(devices))
    with ProcessPoolExecutor(len(devices), spawn, _start_worker, (free, config, threads)) as pool:
        waiting = {pool.submit(_work, job): job for job in missing}
        try:
            for future in as_completed(waiting):
                for group in future.result():
                    records.append(folder, group)
                note(waiting[future])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def save_texts(folder: Path, config: Config) -> None:
    """Writes the text of every sample into the run's folder, to look into and to check the records with."""
    setup = Setup(None, loading.tokenizer(config.model), config)  # type: ignore[arg-type]
    for job in jobs(config, []):
        blank = Record(config.model, job.task, job.length, job.number, 0, "", "")
        file = folder / file_of(blank)
        if not file.exists():
            with contextlib.suppress(Exception):  # what cannot be made is recorded as failed when it is its turn
                sample = sampled(setup, tasks_by_name(config.tasks, config.data)[job.task], job.length, job.number)
                turns = [f"User: {user}\nAssistant: {answer}" for user, answer in sample.turns]
                file.parent.mkdir(exist_ok=True)
                file.write_text(sample.text or "\n".join(turns), encoding="utf-8")


_worker_setup: list[Setup] = []  # of a worker process, once it has started


def _start_worker(free: multiprocessing.Queue[str], config: Config, threads: int) -> None:
    torch.set_num_threads(threads)
    _worker_setup.append(Setup(*loading.load(config.model, free.get(), config.dtype), config))


def _work(job: Job) -> list[list[Record]]:
    return list(measured(_worker_setup[0], job))


@torch.inference_mode()
def measured(setup: Setup, job: Job) -> Iterator[list[Record]]:
    """The records of every missing variant, one group after the other; a variant that fails is recorded so."""
    config = setup.config
    task = tasks_by_name(config.tasks, config.data)[job.task]
    blank = Record(config.model, job.task, job.length, job.number, 0, "", "", seed=config.seed)
    blank = replace(blank, versions=versions(), commit=commit())
    try:
        sample = sampled(setup, task, job.length, job.number)
        measure = task.prepare(setup, sample)
    except Exception as error:  # recorded below, for every variant
        for method, budget in job.missing:
            yield [replace(blank, method=method, budget=budget, failed=_why(error))]
        return
    for method, budget in job.missing:
        yield _variant(replace(blank, method=method, budget=budget, of=len(sample.questions)), sample, measure)


def _variant(blank: Record, sample: Sample, measure: Measure) -> list[Record]:
    """The records of one method at one budget."""
    unanswered = []
    for i, question in enumerate(sample.questions):
        depth = None if question.depth is None else round(question.depth, 4)
        record = replace(blank, question=i, ask=question.ask, expected=question.expected)
        unanswered.append(replace(record, depth=depth, prompt=prompt(sample, question)))
    try:
        outcomes = measure(get(blank.method), blank.budget)
        return [_filled(record, outcome) for record, outcome in zip(unanswered, outcomes, strict=True)]
    except Exception as error:  # one variant of a sample must not end the run: it stays on the record
        return [replace(record, failed=_why(error)) for record in unanswered]


def _filled(record: Record, outcome: Outcome) -> Record:
    report = outcome.cache.report()
    slots = report.slots_per_head if report.kept else float(outcome.tokens)
    return replace(
        record,
        answer=outcome.answer,
        score=round(outcome.score, 6),
        loglik=outcome.loglik,
        chances=outcome.chances,
        measures=outcome.measures,
        tokens=outcome.tokens,
        slots=round(slots, 2),
        kv_bytes=report.kv_bytes,
        kv_bytes_full=report.kv_bytes_full,
        predicted=round(report.error, 6),
        fallbacks=report.fallbacks,
        seconds={name: round(value, 3) for name, value in outcome.seconds.items()},
    )


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def prompt(sample: Sample, question: Question) -> str:
    """What the model is given, and what is held to be right and wrong, in 16 hexadecimal digits."""
    content = repr((sample.text, sample.turns, question.ask, question.expected, question.wrong))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def sampled(setup: Setup, task: Task, length: int, number: int) -> Sample:
    """The number-th sample of a task, the same in every run with this seed, tokenizer and haystack."""
    rng = random.Random(f"{setup.config.seed} {task.name} {length} {number}")
    return task.make(Draw(rng, _prose(setup.config.haystack, setup.tokenizer), length, number))


@lru_cache(8)
def _prose(place: str, tokenizer: PreTrainedTokenizerBase) -> Prose:
    @lru_cache(100_000)
    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    return Prose(haystack.sentences(place), count)
