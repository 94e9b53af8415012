"""Running: every sample is a job, in this process or in several; what is recorded already is not done again."""

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

from keepkv import methods
from keepkv.errors import InputError
from keepkv.eval import config as settings
from keepkv.eval import records
from keepkv.eval.config import Config
from keepkv.eval.measure import Host, Opened, Outcome
from keepkv.eval.plan import Job, _tasks, jobs
from keepkv.eval.provenance import commit, versions
from keepkv.eval.records import Record
from keepkv.eval.report.worst import file_of
from keepkv.eval.sample import Draw, Prose, Question, Sample
from keepkv.eval.tasks import datasets, haystack, registry
from keepkv.eval.tasks.task import Task
from keepkv.models import loading

Tell = Callable[[int, int, float], None]  # samples done, of how many, seconds left


def settled(config: Config) -> Config:
    """The settings with what its texts are, so that a run cannot be continued with others. Raises InputError."""
    config.check()
    registry.chosen(config.tasks, config.data)
    digests = tuple(hashlib.sha256(repr(datasets.rows(place)).encode()).hexdigest()[:16] for place in config.data)
    return replace(config, haystack_digest=haystack.digest(config.haystack), data_digests=digests)


def begin(folder: Path, config: Config) -> tuple[Config, list[Record]]:
    """Makes the run's folder, or takes up what is in it; returns the settled settings and the whole records.

    Raises InputError if the folder holds a run with other settings.
    """
    config = settled(config)
    done: list[Record] = []
    if (folder / settings.FILE).exists():
        settings.continues(settings.load(folder / settings.FILE), config, str(folder))
        done = records.load(folder) if (folder / records.FILE).exists() else []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / settings.FILE).write_text(settings.written(config), encoding="utf-8")
        records.rewrite(folder, done)
    except OSError as error:
        raise InputError(f"the run {str(folder)!r} cannot be written ({error.strerror})") from error
    return config, done


def run(folder: Path, config: Config, devices: Sequence[str], tell: Tell) -> None:
    """Does what is missing, with one process for each of the devices, and records it as it comes.

    Raises ModelError if the model cannot be loaded. What goes wrong with a sample is recorded as failed.
    """
    config, done = begin(folder, config)
    keep_texts(folder, config)
    left = jobs(config, done)
    start, done_jobs = time.perf_counter(), []

    def note(job: Job) -> None:
        done_jobs.append(job)
        weight, whole = (sum(each.length or 4096 for each in some) for some in (done_jobs, left))
        tell(len(done_jobs), len(left), (time.perf_counter() - start) * (whole - weight) / weight)

    if not left:
        return
    if len(devices) == 1:
        host = Host(*loading.load(config.model, devices[0], config.dtype), config)
        for job in left:
            for group in measured(host, job):
                records.append(folder, group)
            note(job)
        return
    spawn = multiprocessing.get_context("spawn")
    free = spawn.Queue()
    for device in devices:
        free.put(device)
    threads = max(1, torch.get_num_threads() // len(devices))
    with ProcessPoolExecutor(len(devices), spawn, _start, (free, config, threads)) as pool:
        waiting = {pool.submit(_work, job): job for job in left}
        try:
            for future in as_completed(waiting):
                for group in future.result():
                    records.append(folder, group)
                note(waiting[future])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def keep_texts(folder: Path, config: Config) -> None:
    """Writes the text of every sample into the run's folder, to look into and to check the records with."""
    host = Host(None, loading.tokenizer(config.model), config)  # type: ignore[arg-type]
    for job in jobs(config, []):
        blank = Record(config.model, job.task, job.length, job.number, 0, "", "")
        file = folder / file_of(blank)
        if not file.exists():
            with contextlib.suppress(Exception):  # what cannot be made is recorded as failed when it is its turn
                sample = sampled(host, _tasks(config.tasks, config.data)[job.task], job.length, job.number)
                told = [f"User: {user}\nAssistant: {answer}" for user, answer in sample.turns]
                file.parent.mkdir(exist_ok=True)
                file.write_text(sample.text or "\n".join(told), encoding="utf-8")


_host: list[Host] = []  # of a worker process


def _start(free: multiprocessing.Queue[str], config: Config, threads: int) -> None:
    torch.set_num_threads(threads)
    _host.append(Host(*loading.load(config.model, free.get(), config.dtype), config))


def _work(job: Job) -> list[list[Record]]:
    return list(measured(_host[0], job))


@torch.inference_mode()
def measured(host: Host, job: Job) -> Iterator[list[Record]]:
    """The records of every missing variant, one group after the other; a variant that fails is recorded so."""
    task = _tasks(host.config.tasks, host.config.data)[job.task]
    blank = Record(
        host.config.model,
        job.task,
        job.length,
        job.number,
        0,
        "",
        "",
        seed=host.config.seed,
        versions=versions(),
        commit=commit(),
    )
    try:
        sample = sampled(host, task, job.length, job.number)
        opened = task.open(host, sample)
    except Exception as error:  # recorded below, for every variant
        for method, budget in job.missing:
            yield [replace(blank, method=method, budget=budget, failed=_why(error))]
        return
    for method, budget in job.missing:
        yield _variant(replace(blank, method=method, budget=budget, of=len(sample.questions)), sample, opened)


def _variant(blank: Record, sample: Sample, opened: Opened) -> list[Record]:
    asked = [
        replace(
            blank, question=i, ask=question.ask, expected=question.expected, depth=_rounded(question.depth),
            prompt=prompt(sample, question),
        )
        for i, question in enumerate(sample.questions)
    ]  # fmt: skip
    try:
        return [
            _filled(record, outcome)
            for record, outcome in zip(asked, opened(methods.get(blank.method), blank.budget), strict=True)
        ]
    except Exception as error:  # one variant of a sample must not end the run: it stays on the record
        return [replace(record, failed=_why(error)) for record in asked]


def _filled(record: Record, outcome: Outcome) -> Record:
    report = outcome.cache.report()
    slots = report.slots_per_head if report.kept else float(outcome.tokens)
    return replace(
        record, answer=outcome.answer, score=round(outcome.score, 6), loglik=outcome.loglik, chances=outcome.chances,
        measures=outcome.measures, tokens=outcome.tokens, slots=round(slots, 2), kv_bytes=report.kv_bytes,
        kv_bytes_full=report.kv_bytes_full, predicted=round(report.error, 6), fallbacks=report.fallbacks,
        seconds={name: round(value, 3) for name, value in outcome.seconds.items()},
    )  # fmt: skip


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _rounded(depth: float | None) -> float | None:
    return None if depth is None else round(depth, 4)


def prompt(sample: Sample, question: Question) -> str:
    """What the model is given, and what is held to be right and wrong, in 16 hexadecimal digits."""
    whole = repr((sample.text, sample.turns, question.ask, question.expected, question.wrong))
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def sampled(host: Host, task: Task, length: int, number: int) -> Sample:
    """The number-th sample of a task, the same in every run with this seed, tokenizer and haystack."""
    rng = random.Random(f"{host.config.seed} {task.name} {length} {number}")
    return task.make(Draw(rng, _prose(host.config.haystack, host.tokenizer), length, number))


@lru_cache(8)
def _prose(place: str, tokenizer: PreTrainedTokenizerBase) -> Prose:
    @lru_cache(100_000)
    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    return Prose(haystack.sentences(place), count)
