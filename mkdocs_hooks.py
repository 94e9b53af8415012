"""What mkdocs must know about this repository: folders in the navigation, pages from outside docs/, and links that leave docs/.

The Markdown files link to one another, and to source files and records, as they lie in the repository. On the site a link to a
source file leads to the reference of its module, and any other link out of docs/ becomes plain text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent
PROJECT = {
    "CONTRIBUTING.md": "project/contributing.md",
    "DESIGN.md": "project/design.md",
    "CHANGELOG.md": "project/changelog.md",
}
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
_FENCE = re.compile(r"^(```.*?^```[^\n]*)", re.MULTILINE | re.DOTALL)


def on_config(config: Any) -> Any:
    """A folder in the navigation stands for its README.md and the pages that this links to.

    Notes are called by their short names there, since their headings are questions.
    """
    config.nav = [_expanded(item) for item in config.nav]
    return config


def on_files(files: Files, *, config: Any) -> Files:
    """The pages for contributors lie at the root of the repository."""
    for name, uri in PROJECT.items():
        if (ROOT / name).exists():
            files.append(File.generated(config, uri, content=(ROOT / name).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links of the repository become links of the site."""
    source = {uri: name for name, uri in PROJECT.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    parts = _FENCE.split(markdown)
    parts[::2] = [_LINK.sub(lambda link: _relinked(link, source, page.file.src_uri), part) for part in parts[::2]]
    return "".join(parts)


def _expanded(item: Any) -> Any:
    (title, place), *_ = item.items()
    if place == "project/":
        return {title: [uri for name, uri in PROJECT.items() if (ROOT / name).exists()]}
    if not isinstance(place, str) or not place.endswith("/"):
        return item
    index = (ROOT / "docs" / place / "README.md").read_text("utf-8")
    pages = dict.fromkeys(re.findall(r"\]\(([\w-]+\.md)\)", index))
    named = {name: name.removesuffix(".md").replace("-", " ").capitalize() for name in pages} if place == "notes/" else {}
    entries = [{named[name]: f"{place}{name}"} if name in named else f"{place}{name}" for name in pages]
    return {title: [f"{place}README.md", *entries]}


def _relinked(link: re.Match[str], source: str, uri: str) -> str:
    """A link of the file `source`, for the site's page `uri`."""
    text, target = link.groups()
    path, _, anchor = target.partition("#")
    if "://" in target or target.startswith("mailto:") or not path:
        return link[0]
    place = os.path.normpath(os.path.join(os.path.dirname(source), path))  # noqa: PTH118, PTH120  not a path of this machine
    if place in PROJECT:
        place = f"docs/{PROJECT[place]}"
    elif place.startswith("src/keepkv/"):
        module = place.removeprefix("src/keepkv/").removesuffix(".py").partition("/")[0]
        place, anchor = f"docs/reference/{module}.md", ""
    inside = place.startswith("docs/") and ((ROOT / place).is_file() or place.removeprefix("docs/") in PROJECT.values())
    if not inside:
        return text if not place.startswith("docs/") else link[0]  # what is missing in docs/ is for mkdocs to complain about
    here = os.path.dirname(f"docs/{uri}")  # noqa: PTH120
    return f"[{text}]({os.path.relpath(place, here)}{'#' * bool(anchor)}{anchor})"
