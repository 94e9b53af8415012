"""Files are written whole or not at all, whatever stops the writing."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from keepkv import InputError, paths
from keepkv.documents import document as documents
from keepkv.models import loading
from keepkv.paths import atomic_file, atomic_folder


def write(file: Path, text: str) -> None:
    with atomic_file(file) as scratch:
        scratch.write_text(text)


def write_half(opened: AbstractContextManager[Path], error: BaseException) -> None:
    with opened as scratch:
        (scratch / "a" if scratch.is_dir() else scratch).write_text("half")
        raise error


def test_what_was_written_is_there_and_nothing_else(tmp_path: Path) -> None:
    for text in ("old", "new"):
        write(tmp_path / "file", text)
        assert (tmp_path / "file").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_the_old_file_stays_if_the_writing_stops(error, tmp_path: Path) -> None:
    write(tmp_path / "file", "old")
    with pytest.raises(type(error)):
        write_half(atomic_file(tmp_path / "file"), error)
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_old_file_stays_if_the_process_is_killed(tmp_path: Path) -> None:
    write(tmp_path / "file", "old")
    code = (
        "import os, signal, sys; from pathlib import Path; from keepkv.paths import atomic_file\n"
        "with atomic_file(Path(sys.argv[1])) as scratch:\n"
        "    scratch.write_text('ne'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    status = subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], check=False).returncode
    assert status < 0
    assert (tmp_path / "file").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir() if not path.name.endswith(".tmp")} == {"file"}


def test_a_file_is_flushed_before_it_gets_its_name(tmp_path: Path, monkeypatch) -> None:
    order = []
    flush, replace = paths.flush, Path.replace
    monkeypatch.setattr(paths, "flush", lambda path: (order.append("folder" if path.is_dir() else "file"), flush(path)))
    monkeypatch.setattr(Path, "replace", lambda self, target: (order.append("rename"), replace(self, target))[1])
    write(tmp_path / "file", "text")
    assert order == ["file", "rename", "folder"]


def test_links_rights_and_devices_stay_what_they_are(tmp_path: Path) -> None:
    write(tmp_path / "file", "old")
    (tmp_path / "file").chmod(0o600)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
    for place in (tmp_path, Path(os.devnull)):
        with pytest.raises(OSError, match="not a regular file"):
            write(place, "new")
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "none" / "file", "new")


def test_a_folder_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with pytest.raises(KeyboardInterrupt):
        write_half(atomic_folder(target), KeyboardInterrupt())
    assert not list(tmp_path.iterdir())
    for text in ("first", "second"):  # another process was faster: its folder stays
        with atomic_folder(target) as scratch:
            (scratch / "a").write_text(text)
    assert (target / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_disk_that_is_full_costs_no_document_and_no_conversation(compiled, folder: str, tmp_path: Path, monkeypatch) -> None:
    from keepkv.text.conversation import Conversation

    document, _ = compiled
    model, tokenizer = loading.load(folder)
    talk = Conversation(model, tokenizer)
    talk.say("Hello", max_new_tokens=3)
    savers = {
        "a.keep": lambda file: documents.save(document, file, model, tokenizer),
        "talk.json": talk.save,
    }
    before = {}
    for name, save in savers.items():
        save(tmp_path / name)
        before[name] = (tmp_path / name).read_bytes()

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(paths, "flush", full)
    for name, save in savers.items():
        with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
            save(tmp_path / name)
        assert (tmp_path / name).read_bytes() == before[name]
    assert {path.name for path in tmp_path.iterdir()} == set(savers)


def test_nothing_is_opened_that_could_be_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("text")
    assert paths.read_file(tmp_path / "file") == b"text"
    for place in (tmp_path / "pipe", tmp_path, Path(os.devnull), Path("/dev/zero")):
        with pytest.raises(OSError, match=r"regular file|directory"):
            paths.read_file(place, pipes=True)
    with pytest.raises(OSError, match="more than 3 bytes"):
        paths.read_file(tmp_path / "file", limit=3)
    with pytest.raises(OSError, match="null byte"):
        paths.read_file(Path("a\0b"))
    read_end, write_end = os.pipe()  # a shell's <(...)
    os.write(write_end, b"piped")
    os.close(write_end)
    assert paths.read_file(Path(f"/dev/fd/{read_end}"), pipes=True) == b"piped"
    os.close(read_end)


def test_what_a_user_has_read_or_said_is_for_its_owner(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        for private, mode in ((True, 0o600), (False, 0o644)):
            paths.write_file(tmp_path / str(private), "text", private=private)
            assert (tmp_path / str(private)).stat().st_mode & 0o777 == mode
        (tmp_path / "True").chmod(0o640)
        paths.write_file(tmp_path / "True", "more", private=True)  # whoever has given it other rights means them
        assert (tmp_path / "True").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(umask)


def test_what_killed_processes_leave_is_removed_when_it_is_old(tmp_path: Path) -> None:
    old, new, other = (tmp_path / f".{name}.abc.tmp" for name in ("model", "model.x", "other"))
    for place in (old, new, other):
        place.mkdir()
        (place / "weights").write_text("half")
    new = new.rename(tmp_path / ".model.def.tmp")
    for place in (old, other):
        os.utime(place / "weights", (0, 0))
        os.utime(place, (0, 0))
    with atomic_folder(tmp_path / "model"):
        pass
    assert [place.exists() for place in (old, new, other)] == [False, True, True]
