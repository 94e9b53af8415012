"""The documentation: commands exist, Python runs, every error is on its page, every public name in the reference."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import keepkv
from helpers import FOX, ROOT
from keepkv import errors
from keepkv.cli.app import app
from keepkv.methods import registry

DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(ROOT)): path for path in sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])}
CODE = re.compile(r"(<!-- skip -->\s*)?^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = typer.main.get_command(app)


def blocks(page: Path, *languages: str) -> list[str]:
    """The code blocks of a page in these languages, without those that are marked to be skipped."""
    return [code for skip, language, code in CODE.findall(page.read_text("utf-8")) if language in languages and not skip]


def commands(shell: str) -> Iterator[list[str]]:
    """The words behind every `keepkv` of a shell script."""
    for line in shell.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="|&;>")
        words.whitespace_split = True
        command: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= set("|&;>"):
                while command and re.fullmatch(r"\w+=\S*", command[0]):
                    del command[0]
                if command and command[0].rpartition("/")[2] == "keepkv":
                    yield command[1:]
                command = []
            else:
                command.append(word)


def mistake(words: list[str]) -> str:
    """What is wrong with a command line, which is parsed and not run. typer brings a click of its own: its errors by shape."""
    command = COMMANDS
    while commands_of := getattr(command, "commands", None):
        name, *words = words
        if name not in commands_of:
            return f"no command {name}"
        command = commands_of[name]
    try:
        command.make_context("keepkv", [*words])
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        return str(error.format_message())
    return ""


@pytest.mark.parametrize("page", [name for name, path in PAGES.items() if any(commands("".join(blocks(path, "bash", "sh"))))])
def test_every_command_line_of_a_page_can_be_parsed(page: str) -> None:
    wrong = {shlex.join(words): mistake(words) for words in commands("".join(blocks(PAGES[page], "bash", "sh")))}
    assert {line: why for line, why in wrong.items() if why} == {}


def test_a_wrong_command_line_is_found() -> None:
    assert list(commands("A=1 .venv/bin/keepkv ask - '?' --json | jq . > x && keepkv methods # why")) == [
        ["ask", "-", "?", "--json"], ["methods"],
    ]  # fmt: skip
    assert not mistake(["ask", "x", "?", "--slot-dtype", "int8"])
    wrong = (
        ["ask", "x", "?", "--slots", "int8"],
        ["ask", "x", "?", "--repeat", "sometimes"],
        ["ask", "x"],
        ["store", "ad", "x"],
    )
    assert all(map(mistake, wrong))


@pytest.mark.parametrize("page", [name for name, path in PAGES.items() if name.startswith("docs/") and blocks(path, "python")])
def test_the_python_of_a_page_runs(
    page: str, folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("KEEPKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))
    monkeypatch.chdir(tmp_path)
    Path("report.txt").write_text(FOX * 3)
    code = "\n".join(blocks(PAGES[page], "python")).replace("your/model", folder)
    exec(compile(code.replace("max_new_tokens=100", "max_new_tokens=2"), page, "exec"), {})
    capsys.readouterr()


ERRORS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.KeepKVError)}
WORDS = 8  # of a message, which must be on the page


def template(node: ast.expr) -> str:
    """A message with … where something is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp):
        return template(node.left) + template(node.right)
    return "…"


def messages(source: str) -> Iterator[tuple[str, str]]:
    """What a module raises and warns of: the class, or "warning", and the message. `broken` makes an InputError of a file."""
    tree = ast.parse(source)
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or not call.args:
            continue
        name = ast.unparse(call.func).rpartition(".")[2]
        warns = ast.unparse(call.func) == "warnings.warn"
        if not warns and name not in {*ERRORS, "broken"}:
            continue
        told = call.args[0]
        helper = functions.get(ast.unparse(told.func)) if isinstance(told, ast.Call) else None
        returned = [n.value for n in ast.walk(helper) if isinstance(n, ast.Return) and n.value] if helper else [told]
        for message in map(template, returned):
            if message.strip("… "):
                yield "warning" if warns else "InputError" if name == "broken" else name, message


def plain(text: str) -> str:
    return re.sub("…+", "…", " ".join(text.replace("`", "").split()))


SECTIONS = dict(
    re.findall(r"^## (\w+)[^\n]*\n(.*?)(?=^## |\Z)", (DOCS / "errors.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
)


@pytest.mark.parametrize("module", sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "src").rglob("*.py")))
def test_every_error_and_warning_is_on_the_page_of_errors(module: str) -> None:
    missing = []
    for kind, message in messages((ROOT / module).read_text("utf-8")):
        section = "Warnings" if kind == "warning" else kind
        if " ".join(plain(message).split()[:WORDS]) not in plain(SECTIONS.get(section, "")):
            missing.append(f"{section}: {plain(message)}")
    assert missing == [], "docs/errors.md does not list these messages under these headings"


def test_every_class_of_error_has_a_section_and_no_message_on_the_page_is_gone() -> None:
    assert {*ERRORS, "Warnings"} <= SECTIONS.keys()
    known = [plain(message) for path in (ROOT / "src").rglob("*.py") for _, message in messages(path.read_text("utf-8"))]
    for kind in {*ERRORS, "Warnings"}:
        for listed in re.findall(r"^\* (`+)(.+?)\1", SECTIONS[kind], re.MULTILINE | re.DOTALL):
            start = " ".join(plain(listed[1]).split()[:WORDS])
            assert any(start in message for message in known), f"{kind}: no message begins with {start}"


PUBLIC = ("score", "allot", "choose", "compress", "types", "budget", "errors", "recipe", "merge", "methods", "observe", "slots",
          "attend", "cache", "documents")  # fmt: skip


def test_every_public_name_and_module_is_in_the_reference() -> None:
    text = "\n".join(path.read_text("utf-8") for path in (DOCS / "reference").glob("*.md"))
    shown = set(re.findall(r"^::: (\S+)", text, re.MULTILINE))
    assert {f"keepkv.{name}" for name in (*keepkv.__all__, *PUBLIC)} <= shown
    assert all((DOCS / "reference" / f"{name}.md").exists() for name in PUBLIC)
