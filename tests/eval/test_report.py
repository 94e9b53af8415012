"""Reports: numbers, figures and page say what the records say, and a regression ends with status 1."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from helpers import Page, run
from keepkv.eval import records, summary
from keepkv.eval.config import Config, to_toml
from keepkv.eval.records import Record
from keepkv.eval.report import cells, figures, html, markdown, svg, worst
from keepkv.eval.report.figures import Bars, Curves, Heat
from keepkv.eval.tasks import registry

NASTY = "<script>alert('&')</script> \"q\" "


def made(good: float = 0.8) -> list[Record]:
    """Two lengths, two tasks, six texts; keepkv is right in `good` of them, snapkv in none, full always."""
    out = []
    for task in ("needle", "json"):
        for length in (512, 2048):
            for sample in range(6):
                for method, budget in (("full", "100%"), ("keepkv", "10%"), ("snapkv", "10%")):
                    right = method == "full" or (method == "keepkv" and sample < 6 * good)
                    out.append(Record(
                        "tiny|model", task, length, sample, 0, method, budget, prompt=f"{task}{length}{sample}", ask=NASTY,
                        expected=f"The number is {NASTY}", answer="right" if right else NASTY, score=float(right),
                        loglik=-1.0 - (not right),
                        depth=sample / 5, tokens=length, kv_bytes=100 if method == "full" else 10, kv_bytes_full=100,
                        seconds={"read": 1.0, "compress": length / 512, "answer": 0.1},
                    ))  # fmt: skip
    return out


def stored(folder: Path, found: list[Record]) -> Path:
    folder.mkdir()
    (folder / "config.toml").write_text(to_toml(Config(haystack=NASTY)))
    records.rewrite(folder, found)
    return folder


def test_figures_show_the_numbers_of_the_records() -> None:
    found = made()
    drawn = figures.all_of(found, summary.summarize(found))
    pareto = next(figure for figure in drawn if figure.key == "pareto")
    assert isinstance(pareto, Curves)
    (point,) = pareto.series["keepkv"]
    assert (point.x, point.y) == (0.1, pytest.approx(5 / 6, abs=1e-4))
    assert pareto.series["full"][0][:2] == (1.0, 1.0)
    bars = next(figure for figure in drawn if isinstance(figure, Bars))
    assert bars.groups["json, 2,048 tokens"]["snapkv"].value == 0
    heat = next(figure for figure in drawn if isinstance(figure, Heat) and "keepkv" in figure.title)
    assert heat.columns == ["512", "2,048"]
    assert [row[0] for row in heat.cells] == [1, 1, 1, 1, 0.5], "the last sample, at depth 1, is wrong"
    spent = next(figure for figure in drawn if figure.key == "time")
    assert [(p.x, p.y) for p in spent.series["keepkv, 10%"]] == [(512, 2.0), (2048, 5.0)]
    for figure in drawn:
        assert all(float(x) < 10_000 for x in re.findall(r'(?:x|y|x1|width|height)="(-?[\d.]+)"', svg.draw(figure)))
    assert svg.color_numbers(["snapkv", "keepkv"])["keepkv"] == svg.color_numbers(["full", "keepkv", "h2o"])["keepkv"]


def test_the_page_is_whole_and_asks_for_nothing(tmp_path: Path) -> None:
    found = made()
    result = summary.summarize(found)
    shown = html.html_report(found, result, figures.all_of(found, result), {NASTY: NASTY}, lambda record: f"Text. {NASTY} end")
    read = Page(shown)
    assert "script" not in read.tags
    assert not [value for name, value in read.attributes if name in ("src", "href", "action") or "http" in (value or "")]
    assert "url(" not in shown
    assert 'name="viewport"' in shown
    assert "72 answers" in read.words
    assert read.words.count(NASTY.strip()) > 12, "shown as it is, not run"
    assert read.tags.count("mark") >= 6


def test_reports_are_written_and_say_the_same(monkeypatch, capsys, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = stored(tmp_path / "run", made())
    status, out, _ = run(monkeypatch, capsys, "report", str(folder), "--png")
    assert status == 0
    assert "keepkv − snapkv at 10%: 0.833" in out
    names = {file.name for file in folder.iterdir()}
    assert {"report.md", "report.html", "summary.json", "pareto.png", "tasks-10.png", "depth.png", "time.png"} <= names
    assert all((folder / name).read_bytes()[:4] == b"\x89PNG" for name in names if name.endswith("png"))
    told = (folder / "report.md").read_text()
    assert "| needle | 512 | 1.00 | 0.83 [" in told
    widths = {
        line.replace("\\|", "").count("|") for line in told.split("## All numbers")[1].split("##")[0].splitlines() if line
    }
    assert len(widths) == 1, "every row has as many cells"
    rows = json.loads(run(monkeypatch, capsys, "report", str(folder), "--json")[1])["rows"]
    assert next(r for r in rows if r["task"] == "all tasks" and r["method"] == "keepkv")["rank"] == 1


def test_a_regression_ends_with_status_1_only_beyond_its_interval(monkeypatch, capsys, tmp_path: Path) -> None:
    old = stored(tmp_path / "old", made(1.0))
    first = next(record for record in made(1.0) if record.method == "keepkv")
    close = [replace(record, score=0.0) if record.key == first.key else record for record in made(1.0)]
    for name, found, ends in (("same", made(1.0), 0), ("close", close, 0), ("worse", made(0.2), 1)):
        status, _, said = run(monkeypatch, capsys, "report", str(stored(tmp_path / name, found)), "--against", str(old))
        assert status == ends, name
        assert ("by -" in " ".join(said.split())) == bool(ends)
    other = stored(tmp_path / "other", [replace(record, prompt="another") for record in made()])
    status, _, said = run(monkeypatch, capsys, "report", str(other), "--against", str(old))
    assert status == 2
    assert "not pairs" in said


def test_the_tasks_are_listed(monkeypatch, capsys) -> None:
    assert "RULER" in run(monkeypatch, capsys, "eval", "--list")[1]
    assert len(json.loads(run(monkeypatch, capsys, "eval", "--list", "--json")[1])) == len(registry.TASKS)
    assert markdown.retained(summary.summarize(made())).count("\n") == 6


def test_texts_are_found_in_the_folder_of_their_model_and_where_older_runs_have_them(tmp_path: Path) -> None:
    first = made()[0]
    find = worst.texts_of([tmp_path])
    assert find(first) is None
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "needle-512-0.txt").write_text("older")
    assert find(first) == "older"
    file = tmp_path / worst.file_of(first)
    assert file.parent.parent == tmp_path / "texts"
    file.parent.mkdir()
    file.write_text("its own")
    assert find(first) == "its own"
    assert worst.file_of(replace(first, model="../..")) == "texts/model/needle-512-0.txt"


def test_a_report_reads_no_file_outside_its_run(tmp_path: Path) -> None:
    """Whatever the records say, and wherever a link in the run leads."""
    (tmp_path / "secret-512-0.txt").write_text("secret")
    run = tmp_path / "run"
    (run / "texts" / "m").mkdir(parents=True)
    (run / "texts" / "m" / "link-512-0.txt").symlink_to(tmp_path / "secret-512-0.txt")
    (run / "texts" / "m" / "loop-512-0.txt").symlink_to("loop-512-0.txt")
    find, first = worst.texts_of([run]), replace(made()[0], model="m")
    assert (run / "texts" / "m" / "../../../secret-512-0.txt").exists()
    for task in ("../../../secret", str(tmp_path / "secret"), "link", "loop", "a\0b"):
        assert find(replace(first, task=task)) is None


def test_a_report_groups_by_model_and_marks_what_cannot_decide() -> None:
    weak = [replace(r, model="weak", task="hard", score=0.0) for r in made() if r.task == "json"]
    found = [*made(), *(replace(r, model="other") for r in made()), *weak]
    result = summary.summarize(found)
    told = markdown.markdown_report(found, result, {})
    overall = told.split("## Over all tasks")[1].split("## Retained")[0]
    assert [line for line in overall.splitlines() if line.startswith("#")] == ["### other", "### tiny|model"]
    assert "| 10% | keepkv | 10.0% | 1 | 0.833 [" in overall
    assert "]† | 24 in 24 texts |" in overall
    assert "cannot decide between 90 and 98%" in overall
    assert "* weak: hard, 512 tokens: the full cache scores 0.00, guessing 0.00 (6 questions)" in overall
    shown = html.html_report(found, result, figures.all_of(found, result), {})
    assert Page(shown).words.count("weak: hard, 512 tokens") == 1
    assert "hard" not in told.split("## All numbers")[1]
    many = [replace(r, method=f"{r.method}-{i}") for i in range(4) for r in made() if r.method != "full"]
    lines = cells.versus_lines(summary.summarize([*made(), *many]))
    assert len(lines) == 9, "of ten methods, each is compared with the best one"
    assert all(line.startswith("keepkv") for line in lines)
