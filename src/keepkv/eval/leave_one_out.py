"""Leave one model out: what is chosen on all models but one is judged on that one, in turn for every model."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from keepkv.errors import InputError, nearest
from keepkv.eval.bootstrap import Interval, combined, ratio_of_means
from keepkv.eval.records import Record
from keepkv.eval.summary import DIVERGENCE, by_size, divergences, full_records, paired, tasks_left_out, text_of

FILE = "leave-one-model-out.json"
MEASURES = ("score", DIVERGENCE)
Cells = dict[tuple[str, int], list[Record]]  # the records of each task and length
Choice = tuple[str, str]  # a method and a slot dtype


@dataclass(frozen=True)
class HeldOut:
    """What was chosen without a model, on that model.

    Args:
        model: The model that is held out.
        dtype: Its dtype.
        budget: The budget at which is chosen.
        measure: "score", where more is better, or "kl", where less is.
        chosen_on: The other models.
        picked: The method, with its slot dtype, that is best on them.
        result: Its result on the held-out model.
        best: The method that is best on the held-out model.
        best_result: Its result there.
        regret: What the choice costs: best − picked of the score, paired; mean KL of picked / mean KL of best, paired. 0 and 1
            mean nothing. The best one is found on the same texts, so a regret is rather too large than too small.
        choices: How many there were to choose from.
    """

    model: str
    dtype: str
    budget: str
    measure: str
    chosen_on: tuple[str, ...]
    picked: str
    result: Interval
    best: str
    best_result: Interval
    regret: Interval
    choices: int


def leave_one_model_out(
    records: Iterable[Record], measure: str = "score", among: Sequence[str] | None = None
) -> tuple[HeldOut, ...]:
    """Picks, for every budget, the best variant on all models but one, and judges it on that one; all ways.

    A variant is a method with a slot dtype, and must have been asked every question on every model; the full cache is none. On
    several models the mean score decides, or the geometric mean of the mean KL, so that no model counts more because its
    distributions are sharper. Tasks that say nothing of a model are left out for it.

    Args:
        records: Of at least two models.
        measure: "score" or "kl".
        among: The methods to choose among; None: all.

    Returns:
        One for every dtype, budget and model, sorted.

    Raises:
        InputError: for another measure, an unknown method, fewer than two models, or nothing to choose from.
    """
    if measure not in MEASURES:
        raise InputError(f"--by-measure {measure!r}: expected one of {', '.join(MEASURES)}")
    in_order = sorted(records, key=lambda record: record.key)
    left_out = tasks_left_out(full_records(in_order))
    methods = sorted({record.method for record in in_order})
    for name in among or ():
        if name not in methods:
            raise InputError(f"--among: there are no records of {name!r}: {nearest(name, methods)}")
    cells: dict[tuple[str, str], dict[Choice, dict[str, Cells]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for record in in_order:
        fits = measure == "score" or measure in record.measures
        is_full = (record.method, record.slot_dtype) == ("full", "float")
        says_something = (record.model, record.dtype, record.task, record.length) not in left_out
        if fits and says_something and not is_full and (among is None or record.method in among):
            of_choice = cells[record.dtype, record.budget][record.method, record.slot_dtype]
            of_choice[record.model].setdefault((record.task, record.length), []).append(record)
    found = [
        held_out
        for (dtype, budget), table in sorted(cells.items(), key=lambda item: (item[0][0], by_size(item[0][1])))
        for held_out in _all_ways(dtype, budget, measure, table)
    ]
    if not found:
        raise InputError("nothing to choose from: give runs in which the same methods were measured on at least two models")
    return tuple(found)


def _all_ways(dtype: str, budget: str, measure: str, table: dict[Choice, dict[str, Cells]]) -> list[HeldOut]:
    """Each model held out once, at one budget."""
    models = sorted({model for by_model in table.values() for model in by_model})
    asked = {choice: _questions(by_model) for choice, by_model in table.items()}
    everything = set.union(*asked.values())
    values = {
        choice: {model: [cell for _, cell in sorted(by_model[model].items())] for model in models}
        for choice, by_model in sorted(table.items())
        if asked[choice] == everything
    }
    if len(models) < 2 or not values:
        return []
    found = []
    for model in models:
        others = [other for other in models if other != model]
        picked = max(values, key=lambda choice: fmean(_goodness(values[choice][other], measure) for other in others))
        best = max(values, key=lambda choice: _goodness(values[choice][model], measure))
        result, best_result = (_result(values[choice][model], measure) for choice in (picked, best))
        regret = _regret(values[picked][model], values[best][model], measure)
        if result is not None and best_result is not None and regret is not None:
            name, best_name = (f"{method} {slot_dtype}".removesuffix(" float") for method, slot_dtype in (picked, best))
            ways = (model, dtype, budget, measure, tuple(others))
            found.append(HeldOut(*ways, name, result, best_name, best_result, regret, len(values)))
    return found


def _questions(by_model: dict[str, Cells]) -> set[tuple[str, str, int, int, int]]:
    """What a variant was asked."""
    return {
        (model, record.task, record.length, record.sample, record.question)
        for model, cells in by_model.items()
        for cell in cells.values()
        for record in cell
    }


def _goodness(cells: Sequence[Sequence[Record]], measure: str) -> float:
    """More is better: the mean score, or −log of the mean KL; each a mean over tasks."""
    if measure == "score":
        return fmean(fmean(record.score for record in cell) for cell in cells)
    means = [fmean(record.measures[measure] for record in cell) for cell in cells]
    return -math.log(max(fmean(means), 1e-12))


def _result(cells: Sequence[Sequence[Record]], measure: str) -> Interval | None:
    groups = []
    for cell in cells:
        texts = defaultdict(list)
        for record in cell:
            texts[text_of(record)].append((record.score if measure == "score" else record.measures[measure], 1.0))
        groups.append(texts)
    return combined(groups, (0.0, 1.0) if measure == "score" else None)


def _regret(picked: Sequence[Sequence[Record]], best: Sequence[Sequence[Record]], measure: str) -> Interval | None:
    if picked is best:
        return Interval(*([0.0] * 3 if measure == "score" else [1.0] * 3))
    if measure == "score":
        return paired(best, picked)
    return ratio_of_means([divergences(*pair) for pair in zip(picked, best, strict=True)])


def to_json(held_out: Sequence[HeldOut]) -> str:
    """As JSON."""
    return json.dumps([asdict(each) for each in held_out], ensure_ascii=False, indent=1) + "\n"
