"""Text files as UTF-8 bytes: unpacked in bounded memory, other encodings by their mark, and refused with the way out.

A byte order mark says UTF-8, UTF-16 or UTF-32; without one a file is UTF-8, unless another encoding is given. A file
that is not is refused at once, by the place of its first wrong byte. A packed file that unpacks to more than
``MAX_EXPANSION`` times its size is refused (text packs 3 to 20 times): its rows would never end.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from forebear.errors import DataError

MAX_EXPANSION = 200
FREE_BYTES = 256 << 20  # that a file may unpack to, whatever its size
READ_BYTES = 1 << 20
ENCODINGS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
FORMATS_BY_FIRST_BYTES = {
    b"\x1f\x8b": "a gzip file; end its name in .gz",
    b"BZh": "a bzip2 file; end its name in .bz2",
    b"\x28\xb5\x2f\xfd": "a zstd file; unpack it (zstd -d)",
    b"\xfd7zXZ": "an xz file; unpack it (xz -d)",
    b"PK\x03\x04": "a zip file or an Excel sheet; unpack it, or save the sheet as CSV",
    b"PAR1": "a Parquet file; end its name in .parquet",
    b"ARROW1": "an Arrow file; save its rows as Parquet",
}


class ExpansionGuard:
    """Counts what a file has unpacked to, and refuses more than its size can account for."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._most = max(FREE_BYTES, MAX_EXPANSION * Path(name).stat().st_size)
        self._n_bytes = 0

    def add(self, n_bytes: int) -> None:
        """Note bytes.

        Raises:
            DataError: They are too many.
        """
        self._n_bytes += n_bytes
        if self._n_bytes > self._most:
            raise DataError(
                f"{self._name} unpacks to more than {self._most >> 20:,} MiB, over {MAX_EXPANSION} times its size; "
                "text does not pack so well, so this may be no file of rows. If it is one, give its rows unpacked, as "
                "CSV or JSON Lines."
            )


class _Unpacked(io.RawIOBase):
    def __init__(self, stream: Any, guard: ExpansionGuard) -> None:
        self._stream, self._guard = stream, guard

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self._stream.read(len(buffer))
        self._guard.add(len(part))
        buffer[: len(part)] = part
        return len(part)


@contextmanager
def open_text(name: str, encoding: str | None = None) -> Iterator[io.BufferedReader]:
    """A text file as a stream of UTF-8 bytes, unpacked and without a byte order mark.

    Args:
        name: The file.
        encoding: Its encoding, where it has no byte order mark; None: UTF-8.

    Raises:
        DataError: It unpacks to too much.
    """
    with pa.input_stream(name, compression="detect") as stream:
        mark = stream.read(4)
    encoding = next((of_mark for bom, of_mark in ENCODINGS.items() if mark.startswith(bom)), encoding)
    with pa.input_stream(name, compression="detect") as stream:
        if mark.startswith(codecs.BOM_UTF8):
            stream.read(len(codecs.BOM_UTF8))
        elif encoding is not None:
            stream = pa.transcoding_input_stream(stream, encoding, "utf-8")
        yield io.BufferedReader(_Unpacked(stream, ExpansionGuard(name)), READ_BYTES)


def is_utf8(name: str) -> bool:
    """Whether a text file is UTF-8, or another encoding that its byte order mark names."""
    try:
        check_text(name)
    except DataError:
        return False
    return True


def check_text(name: str, encoding: str | None = None) -> None:
    """Read a text file through once.

    Raises:
        DataError: It is not of the given encoding (None: UTF-8); the line names the first wrong byte and the way out.
            Or it unpacks to too much.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    n_bytes, n_lines = 0, 0
    with open_text(name, encoding) as file:
        while True:
            try:
                part = file.read(READ_BYTES)
            except UnicodeDecodeError as error:
                wrong = error.object[error.start]
                raise DataError(
                    f"{name} is not {encoding}: after line {n_lines + 1:,} a byte is 0x{wrong:02x} ({error.reason}). "
                    "Give its own encoding by --encoding; latin-1 takes any byte."
                ) from error
            if not n_bytes:
                _refuse_other_formats(name, part)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(part, final=not part)
            except UnicodeDecodeError as error:
                place, wrong = n_bytes - pending + error.start, error.object[error.start]
                line = n_lines + 1 + error.object[: error.start].count(b"\n")
                raise DataError(
                    f"{name} is not UTF-8: byte {place:,} (from 0), in line {line:,}, is 0x{wrong:02x}. "
                    "If it is Latin-1, as Excel writes it, give --encoding cp1252."
                ) from error
            if not part:
                return
            n_bytes += len(part)
            n_lines += part.count(b"\n")


def _refuse_other_formats(name: str, beginning: bytes) -> None:
    for first, what in FORMATS_BY_FIRST_BYTES.items():
        if beginning.startswith(first):
            raise DataError(f"{name} is no text: by its first bytes it is {what}.")
    if b"\0" in beginning[:4]:
        kind = "utf-16-be" if beginning.startswith(bytes(1)) else "utf-16-le"
        raise DataError(
            f"{name} begins with NUL bytes; it may be UTF-16 without a byte order mark. If so, give --encoding {kind}."
        )
