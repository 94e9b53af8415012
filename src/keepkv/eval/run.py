"""Running: every sample is a job, in this process or in several; what is recorded already is not measured again."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import replace
from functools import lru_cache
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from keepkv.errors import InputError
from keepkv.eval import config as settings
from keepkv.eval import records
from keepkv.eval.config import Config
from keepkv.eval.measure import Measure, Outcome, Setup
from keepkv.eval.plan import Job, contenders, jobs, named, tasks_by_name
from keepkv.eval.provenance import commit, versions
from keepkv.eval.records import Record
from keepkv.eval.report.worst import file_of
from keepkv.eval.rivals.rival import Rival
from keepkv.eval.sample import Draw, Prose, Question, Sample
from keepkv.eval.tasks import datasets, haystack, registry
from keepkv.eval.tasks.task import Task
from keepkv.methods import METHODS, Method
from keepkv.models import loading
from keepkv.paths import write_file

ProgressCallback = Callable[[int, int, float], None]  # finished measurements, all measurements, seconds left


def settled(config: Config) -> Config:
    """The settings with the names that "all" stands for, and with digests of the texts, which may not change later.

    Raises:
        KeepKVError: for settings that cannot be run.
    """
    tasks, methods = named(config.tasks, registry.TASKS), named(config.methods, METHODS)
    config = replace(config, tasks=tasks, methods=methods)
    config.validate()
    registry.chosen(config.tasks, config.data)
    for one in contenders(config.methods).values():
        if isinstance(one, Rival):
            one.check()
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
        settings.continues(settings.load_run(folder), config, str(folder))
        recorded = records.load_records(folder) if (folder / records.FILE).exists() else []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / settings.FILE, settings.to_toml(config))
        records.rewrite(folder, recorded)
    except OSError as error:
        raise InputError(f"the run {str(folder)!r} cannot be written ({error.strerror}): give another folder") from error
    return config, recorded


def run(
    folder: Path, config: Config, devices: Sequence[str], progress: ProgressCallback, minutes: float | None = None
) -> tuple[int, int]:
    """Measures what is missing, with one process for each of the devices, and records it as it comes.

    A process holds one model at a time. What goes wrong with a sample is recorded as failed, and the run goes on.

    Args:
        folder: The run's folder; one that exists is continued.
        config: The settings.
        devices: One for every process, such as ("cuda:0", "cuda:1").
        progress: Called after every measurement.
        minutes: After so many, no further measurement begins. Each process makes at least one.

    Returns:
        How many measurements were made, and how many are left.

    Raises:
        InputError: if the settings cannot be run, or differ from those of the run in the folder.
        ModelError: if a model cannot be loaded.
    """
    start = time.time()
    until = float("inf") if minutes is None else start + 60 * minutes
    config, recorded = begin(folder, config)
    save_texts(folder, config)
    missing = jobs(config, recorded)
    total = sum(len(job.missing) for job in missing)
    all_work = sum(_work(job) * len(job.missing) for job in missing)
    made = 0
    work = 0

    def note(job: Job, group: list[Record]) -> None:
        nonlocal made, work
        records.append(folder, group)
        made += 1
        work += _work(job)
        progress(made, total, (time.time() - start) * (all_work - work) / work)

    if missing and len(devices) == 1:
        worker = _Worker(config, devices[0], until)
        for job in missing:
            for group in worker.groups(job):
                note(job, group)
    elif missing:
        _in_processes(config, devices, until, missing, note)
    return made, total - made


def _work(job: Job) -> int:
    """What a measurement of a job costs, in units that only jobs of the same run share."""
    return job.length or 4096


class _Worker:
    """A process's part of a run: it holds one model at a time, and stops when the time is over."""

    def __init__(self, config: Config, device: str, until: float) -> None:
        self._config, self._device, self._until = config, device, until
        self._model = ""
        self._setup: Setup | None = None
        self._made = 0

    def groups(self, job: Job) -> Iterator[list[Record]]:
        """The records of what a job misses, variant by variant, until the time is over."""
        if self._is_over():
            return
        if self._setup is None or self._model != job.model:
            self._setup = None
            gc.collect()  # two models need not fit into memory together
            self._setup = Setup(*loading.load(job.model, self._device, self._config.dtype), self._config)
            self._model = job.model
        for group in measured(self._setup, job):
            self._made += 1
            yield group
            if self._is_over():
                return

    def _is_over(self) -> bool:
        return self._made > 0 and time.time() >= self._until


_workers: list[tuple[_Worker, SimpleQueue[Any]]] = []  # of a worker process, once it has started


def _in_processes(
    config: Config, devices: Sequence[str], until: float, missing: Sequence[Job], note: Callable[[Job, list[Record]], None]
) -> None:
    """Measures jobs in a process for each device. Records come through a queue, each as soon as it is there."""
    spawn = multiprocessing.get_context("spawn")
    free, results = spawn.Queue(), spawn.SimpleQueue()
    for device in devices:
        free.put(device)
    threads = max(1, torch.get_num_threads() // len(devices))
    with ProcessPoolExecutor(len(devices), spawn, _start_worker, (free, results, config, until, threads)) as pool:
        running = {pool.submit(_measure, number, job) for number, job in enumerate(missing)}
        try:
            while running:
                done, running = wait(running, timeout=0.05, return_when=FIRST_COMPLETED)
                while not results.empty():
                    number, group = results.get()
                    note(missing[number], group)
                for future in done:
                    future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    while not results.empty():
        number, group = results.get()
        note(missing[number], group)


def _start_worker(
    free: multiprocessing.Queue[str], results: SimpleQueue[Any], config: Config, until: float, threads: int
) -> None:
    torch.set_num_threads(threads)
    _workers.append((_Worker(config, free.get(), until), results))


def _measure(number: int, job: Job) -> None:
    worker, results = _workers[0]
    for group in worker.groups(job):
        results.put((number, group))


def save_texts(folder: Path, config: Config) -> None:
    """Writes the text of every sample into the run's folder, to look into and to check the records with."""
    setups: dict[str, Setup] = {}
    for job in jobs(config, []):
        if job.model not in setups:
            setups[job.model] = Setup(None, loading.tokenizer(job.model), config)  # type: ignore[arg-type]
        file = folder / file_of(Record(job.model, job.task, job.length, job.number, 0, "", ""))
        if not file.exists():
            with contextlib.suppress(Exception):  # what cannot be made is recorded as failed when it is its turn
                task = tasks_by_name(config.tasks, config.data)[job.task]
                sample = sampled(setups[job.model], task, job.length, job.number)
                turns = [f"User: {user}\nAssistant: {answer}" for user, answer in sample.turns]
                file.parent.mkdir(parents=True, exist_ok=True)
                write_file(file, sample.text or "\n".join(turns))


@torch.inference_mode()
def measured(setup: Setup, job: Job) -> Iterator[list[Record]]:
    """The records of every missing variant, one group after the other; a variant that fails is recorded so."""
    config = setup.config
    task = tasks_by_name(config.tasks, config.data)[job.task]
    table = contenders(config.methods)
    setup = setup._replace(methods=tuple(one for one in table.values() if isinstance(one, Method)))
    blank = Record(job.model, job.task, job.length, job.number, 0, "", "", seed=config.seed)
    blank = replace(blank, dtype=str(setup.model.dtype).removeprefix("torch."), versions=versions(), commit=commit())
    try:
        sample = sampled(setup, task, job.length, job.number)
    except Exception as error:  # recorded for every variant
        for variant in job.missing:
            yield [replace(blank, **variant._asdict(), failed=_why(error))]
        return

    @lru_cache(None)
    def prepared(rival: Rival | None) -> Measure | Exception:
        """What measures a rival or all methods. A reading that failed would fail again."""
        try:
            return (rival or task).prepare(setup, sample)
        except Exception as error:  # recorded for every variant
            return error

    for variant in job.missing:
        one = table[variant.method]
        record = replace(blank, **variant._asdict(), of=len(sample.questions))
        yield _variant(record, sample, one, prepared(one if isinstance(one, Rival) else None), config)


def _variant(blank: Record, sample: Sample, one: Method | Rival, measure: Measure | Exception, config: Config) -> list[Record]:
    """The records of one variant."""
    unanswered = []
    for i, question in enumerate(sample.questions):
        depth = None if question.depth is None else round(question.depth, 4)
        record = replace(blank, question=i, ask=question.ask, expected=question.expected, depth=depth)
        unanswered.append(replace(record, text=digest(sample.text, sample.turns), prompt=prompt(sample, question)))
    try:
        if isinstance(measure, Exception):
            raise measure
        method = one if isinstance(one, Method) else "full"
        recipe = replace(config.recipe, budget=blank.budget, method=method, slot_dtype=blank.slot_dtype)
        return [_filled(record, outcome) for record, outcome in zip(unanswered, measure(recipe), strict=True)]
    except Exception as error:  # one variant of a sample must not end the run: it stays on the record
        return [replace(record, failed=_why(error)) for record in unanswered]


def _filled(record: Record, outcome: Outcome) -> Record:
    report = outcome.cache.report()
    slots = report.slots_per_head if report.kept else float(outcome.tokens)
    kv_bytes, kv_bytes_full = outcome.kv_bytes or (report.kv_bytes, report.kv_bytes_full)
    return replace(
        record,
        answer=outcome.answer,
        score=round(outcome.score, 6),
        loglik=outcome.loglik,
        chances=outcome.chances,
        measures=outcome.measures,
        tokens=outcome.tokens,
        slots=round(slots if outcome.slots is None else outcome.slots, 2),
        kv_bytes=kv_bytes,
        kv_bytes_full=kv_bytes_full,
        predicted=round(report.error, 6),
        fallbacks=report.fallbacks,
        seconds={name: round(value, 3) for name, value in outcome.seconds.items()},
    )


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def prompt(sample: Sample, question: Question) -> str:
    """What the model is given, and what is held to be right and wrong, in 16 hexadecimal digits."""
    return digest(sample.text, sample.turns, question.ask, question.expected, question.wrong)


def digest(*content: object) -> str:
    """SHA-256 of some values, 16 hexadecimal digits."""
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


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
