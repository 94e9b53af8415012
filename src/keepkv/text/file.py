"""A text from a file or from standard input, with errors that say what to do."""

from __future__ import annotations

import sys
from pathlib import Path

from keepkv.errors import InputError
from keepkv.paths import read_file


def read_text(file: str) -> str:
    """The text of a UTF-8 file, or of standard input for "-".

    Raises:
        InputError: for a file that is missing, a folder, a device or a named pipe, is no UTF-8 text, or is empty.
    """
    name = "standard input" if file == "-" else repr(file)
    try:
        raw = sys.stdin.buffer.read() if file == "-" else read_file(Path(file), pipes=True)
    except OSError as error:
        raise InputError(f"{name} cannot be read ({error.strerror}): expected a text file, or - for standard input") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text (byte {error.start}): convert it to plain text first") from error
    if "\0" in text:
        raise InputError(f"{name} is a binary file: expected plain text")
    if not text.strip():
        raise InputError(f"{name} is empty: expected some text")
    return text
