"""The house: folders import downwards only, nobody imports the command line, and nothing heavy comes in unasked."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import keepkv

SOURCE = Path(keepkv.__file__).parent
FILES = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in sorted(SOURCE.rglob("*.py"))}
PURE = {"errors", "types", "budget", "recipe", "paths", "ops", "slots", "attend", "observe", "score", "allot", "choose",
        "merge", "methods", "compress"}  # fmt: skip  # these know PyTorch, and no transformers


def imports(name: str) -> Iterator[str]:
    """Every module that a module imports, also inside functions: keepkv's own without `keepkv.`, others by package."""
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: import by full name"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            full = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for target in full:
            package, _, rest = target.partition(".")
            if package != "keepkv":
                yield package
                continue
            while rest and rest not in FILES and f"{rest}.__init__" not in FILES:
                rest = rest.rpartition(".")[0]
            yield f"keepkv.{rest}".rstrip(".")


def room(name: str) -> str:
    """The folder, or the file beside the folders, that a module belongs to."""
    return name.partition(".")[0]


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of a graph, or nothing."""
    done: set[str] = set()

    def visit(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node not in done:
            for after in sorted(graph.get(node, ())):
                if circle := visit(after, [*way, node]):
                    return circle
            done.add(node)
        return []

    return next((circle for node in sorted(graph) if (circle := visit(node, []))), [])


def test_no_import_cycle_between_folders_and_nobody_imports_the_command_line() -> None:
    graph: dict[str, set[str]] = {}
    for name in FILES:
        own = {target.removeprefix("keepkv.") for target in imports(name) if target.startswith("keepkv.")}
        graph.setdefault(room(name), set()).update({room(target) for target in own} - {room(name)})
    assert {name for name, targets in graph.items() if "cli" in targets} <= {"__main__"}
    assert cycle(graph) == []


def test_a_cycle_is_found() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}}) == []


def test_the_mathematics_knows_no_host() -> None:
    for name in FILES:
        if room(name) in PURE:
            foreign = {target for target in imports(name) if not target.startswith("keepkv")} - set(sys.stdlib_module_names)
            assert foreign <= {"torch", "triton", "typing_extensions"}, name


def test_the_library_comes_without_the_command_line_s_packages() -> None:
    """Every public name and every module outside cli/ that needs no extra."""
    needs_extra = {"attend.triton_kernels", "eval.lm_eval_model", *(name for name in FILES if name.startswith("serving.vllm."))}
    modules = [f"keepkv.{name}".removesuffix(".__init__") for name in FILES
               if room(name) not in ("cli", "__main__", "__init__") and name not in needs_extra]  # fmt: skip
    code = (
        "import sys, importlib, transformers, keepkv\n"
        "before = set(sys.modules)  # an old transformers brings rich, by way of httpx\n"
        "for name in keepkv.__all__: getattr(keepkv, name)\n"
        f"for module in {modules!r}: importlib.import_module(module)\n"
        "print([p for p in ('typer', 'rich', 'matplotlib', 'fastapi') if p in sys.modules and p not in before])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"


def test_what_is_public_is_what_is_there() -> None:
    imported = (node for node in ast.walk(ast.parse(FILES["__init__"].read_text())) if isinstance(node, ast.ImportFrom))
    declared = {alias.asname for node in imported if (node.module or "").startswith("keepkv.") for alias in node.names}
    assert declared == set(keepkv.__all__)
    assert all(getattr(keepkv, name) is not None for name in keepkv.__all__)
    assert set(keepkv.__all__) <= set(dir(keepkv))
