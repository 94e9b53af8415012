"""Rooms: the pure core imports only torch, the host layer may import transformers, the outside both. Never upward."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import keepkv

SOURCE = Path(keepkv.__file__).parent
CORE = {
    "errors",
    "types",
    "budget",
    "rope",
    "draw",
    "reference",
    "recall",
    "score",
    "allot",
    "solve",
    "heads",
    "choose",
    "merge",
    "sets",
    "stored",
    "shared",
    "quantised",
    "spare",
    "pairs",
    "cluster",
    "method",
    "bound",
    "methods",
    "parts",
    "sdpa",
    "kernels",
    "attention",
    "compress",
}
HOST = {
    "observe",
    "report",
    "standin",
    "hosts",
    "history",
    "layer",
    "gather",
    "prefill",
    "cache",
    "smallest",
    "embedded",
    "loading",
}
OUTSIDE = {
    "reading",
    "ask",
    "conversation",
    "chat",
    "fidelity",
    "anatomy",
    "manual",
    "svg",
    "page",
    "figure",
    "progress",
    "options",
    "console",
    "cli",
    "__main__",
    "__init__",
    "files.__init__",
    "files.identity",
    "files.keepfile",
    "files.pack",
    "files.documents",
    "files.store",
    "files.tiers",
    "files.batch",
    "files.names",
    "files.commands",
    "chunks.__init__",
    "chunks.join",
    "chunks.blend",
    "chunks.craft",
    "chunks.documents",
}
SERVING = {f"serving.{path.stem}" for path in (SOURCE / "serving").glob("*.py")}  # as is eval
EVAL = {f"eval.{path.stem}" for path in (SOURCE / "eval").glob("*.py")}  # a sub-package of the outside
ALLOWED = {
    **dict.fromkeys(CORE, ({"torch"}, CORE)),
    "kernels": ({"torch", "triton"}, CORE),
    **dict.fromkeys(HOST, ({"torch", "transformers", "gguf", "tokenizers"}, CORE | HOST)),
    **dict.fromkeys(OUTSIDE, ({"torch", "transformers", "safetensors", "rich", "typer", "matplotlib"}, CORE | HOST | OUTSIDE)),
    **dict.fromkeys(EVAL, ({"torch", "transformers", "rich", "typer", "matplotlib", "numpy"}, CORE | HOST | OUTSIDE | EVAL)),
    **dict.fromkeys(SERVING, ({"torch", "transformers", "typer", "uvicorn", "vllm"}, CORE | HOST | OUTSIDE | SERVING)),
    "serving.settings": (set(), CORE),
    "serving.paged": ({"torch"}, CORE | HOST | {"serving.settings"}),
    "cli": ({"torch", "transformers", "rich", "typer"}, CORE | HOST | OUTSIDE | EVAL | SERVING),
    "files.batch": ({"torch", "ray"}, CORE | HOST | OUTSIDE),
    "eval.config": ({"tomli"}, CORE),
    "eval.readers": ({"datasets"}, CORE | EVAL),
    "eval.harness": ({"torch", "transformers", "lm_eval", "tqdm"}, CORE | HOST | OUTSIDE | EVAL),
}


def test_every_module_has_a_room_and_imports_downwards() -> None:
    files = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in SOURCE.rglob("*.py")}
    assert set(files) == CORE | HOST | OUTSIDE | EVAL | SERVING
    for name, path in files.items():
        packages, rooms = ALLOWED[name]
        for node in ast.walk(ast.parse(path.read_text())):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}: import by full name"
                below = [f"{node.module}.{alias.name}" for alias in node.names]
                imported = [x for x in below if x.removeprefix("keepkv.") in files] or [node.module or ""]
            for full in imported:
                package, _, rest = full.partition(".")
                if package == "keepkv":
                    assert not rest or rest in rooms, f"{name} imports {full}"
                elif package not in sys.stdlib_module_names:
                    assert package in packages, f"{name} imports {full}"


def test_no_module_is_a_god() -> None:
    assert max(len(path.read_text().splitlines()) for path in SOURCE.rglob("*.py")) < 400
