"""keepkv compile and store, and ask with compiled documents."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from helpers import FOX, run

TEXT = FOX * 4


def test_compile_and_ask(monkeypatch, capsys, folder: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(TEXT + name)
    texts = [str(tmp_path / f"{name}.txt") for name in ("a", "b")]
    args = ["--model", folder, "--budget", "20%", "--method", "snapkv", "--exact"]
    status, out, err = run(monkeypatch, capsys, "compile", *texts, "-o", str(tmp_path / "made"), *args, "--json")
    assert (status, err) == (0, "")
    files = [json.loads(line)["file"] for line in out.splitlines()]
    assert [Path(file).name for file in files] == ["a.keep", "b.keep"]
    ask = ["ask", *files[:1], "Who?", "What?", "--max-new-tokens", "4", "--json"]
    status, out, err = run(monkeypatch, capsys, *ask)
    assert (status, err) == (0, "")
    alone = json.loads(out)
    assert alone["model"] == folder  # the file says which
    assert len(alone["answers"]) == 2
    direct = ["ask", texts[0], "Who?", "What?", "--max-new-tokens", "4", "--json", "--model", folder, "--budget", "20%"]
    direct += ["--method", "snapkv"]
    _, out, _ = run(monkeypatch, capsys, *direct)
    assert json.loads(out)["answers"] == alone["answers"]
    for repair in ([], ["--repair", "25%"]):
        status, out, err = run(monkeypatch, capsys, "ask", *files, "Who?", "--max-new-tokens", "4", "--json", *repair)
        assert (status, err) == (0, "")
        assert json.loads(out)["tokens"] == 2 * alone["tokens"] - len("<|user|>")


def test_mistakes_get_one_line(monkeypatch, capsys, folder: str, tmp_path: Path, compiled) -> None:
    file, text = str(compiled[1]), tmp_path / "a.txt"
    text.write_text(TEXT)
    for args, expected in (
        (["ask", file, "Who?", "--budget", "5%"], "--budget is for texts"),
        (["ask", file, file], "there is no question"),
        (["ask", str(text), "Who?", "--repair", "10%", "--model", folder], "--repair is for several"),
        (["ask", file, file, "Who?", "--repair", "150%"], "'150%' is not a share"),
        (["ask", file, file, "Who?", "--repair", "most"], "'most' is not a share"),
        (["ask", file, file, "Who?", "--repair", "64MB"], "'64MB' is not a share"),
        (["compile", file, "--model", folder], "is compiled already"),
        (["compile", str(text), str(text), "--model", folder], "two documents"),
        (["compile", str(text), "-o", str(tmp_path / "no" / "a.keep"), "--model", folder], "folder that exists"),
        (["compile", str(text), "--exact", "--chunk", "64", "--model", folder], "read at once"),
        (["ask", str(tmp_path / "none.keep"), "Who?"], "cannot be read"),
    ):
        status, out, err = run(monkeypatch, capsys, *args)
        assert (status, out) == (2, "")
        assert expected in err
        assert len(err.strip().splitlines()) == 1


def test_what_is_made_already_is_not_made_again(monkeypatch, capsys, folder: str, tmp_path: Path) -> None:
    docs = []
    for number in range(3):
        docs.append(tmp_path / f"{number}.txt")
        docs[-1].write_text(TEXT + str(number))
    args = ["compile", *map(str, docs), "--model", folder, "--budget", "25%", "--resume", "--json"]

    def made(*more: str) -> list[bool]:
        status, out, _ = run(monkeypatch, capsys, *args, *more)
        assert status == 0
        return [json.loads(line)["made"] for line in out.splitlines()]

    assert made() == [True] * 3
    before = (tmp_path / "0.keep").read_bytes()
    assert made() == [False] * 3
    assert (tmp_path / "0.keep").read_bytes() == before
    docs[1].write_text(TEXT + "another")
    (tmp_path / "2.keep").write_bytes(before[:-20])
    assert made() == [False, True, True]
    assert made("--budget", "30%") == [True] * 3
    assert made("--no-ids", "--budget", "30%") == [True] * 3


def test_one_document_goes_into_a_folder_too(monkeypatch, capsys, folder: str, tmp_path: Path) -> None:
    """As the README has it: keepkv compile report.txt -o compiled, then keepkv ask compiled/report.keep."""
    text = tmp_path / "report.txt"
    text.write_text(TEXT)
    status, _, _ = run(monkeypatch, capsys, "compile", str(text), "-o", str(tmp_path / "compiled"), "--model", folder)
    assert status == 0
    assert (tmp_path / "compiled" / "report.keep").is_file()


def test_ray_is_asked_for_by_name(monkeypatch, capsys, folder: str, tmp_path: Path) -> None:
    text = str(tmp_path / "text.txt")
    Path(text).write_text(TEXT)
    monkeypatch.setitem(sys.modules, "ray", None)
    status, _, err = run(monkeypatch, capsys, "compile", text, "--model", folder, "--ray")
    assert status == 2
    assert "keepkv[ray]" in err
    status, _, err = run(monkeypatch, capsys, "compile", "-", "--model", folder, "--ray")
    assert status == 2
    assert "standard input" in err


TEXT = FOX


def test_the_command_line(monkeypatch, capsys, folder: str, tmp_path: Path) -> None:
    def store(*args: str) -> tuple[int, str, str]:
        return run(monkeypatch, capsys, "store", *args, "--store", str(tmp_path / "store"))

    text = tmp_path / "fox.txt"
    text.write_text(TEXT)
    assert "empty" in store("list")[2]
    for what in ("added", "there already"):
        status, out, err = store("add", str(text), "--model", folder, "--budget", "20%", "--method", "snapkv")
        assert (status, err) == (0, "")
        assert what in out
    assert "fox.txt" in store("list")[1]
    status, out, _ = store("show", "fox.txt")
    assert status == 0
    assert '"file"' in out
    status, _, err = store("show", "nothing")
    assert (status, len(err.strip().splitlines())) == (2, 1)
    assert store("rm", str(text))[0] == 0
    assert "left 0" in store("gc", "--limit", "1MB")[2]
    assert "not a number of bytes" in store("gc", "--limit", "10%")[2]
