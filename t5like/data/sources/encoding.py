"""Decode the bytes of files as UTF-8, and refuse other formats and encodings.

The message names the format, if the first bytes identify it, and a command that converts the file.
"""

import codecs
import re

from t5like.errors import DataError

HEAD = 2**16  # bytes at the start of a file that `refuse_other_formats` examines
MARK = b"\xef\xbb\xbf"  # UTF-8's byte-order mark; files may begin with it
BLOCK = bytes(512)  # the smallest hole of a file
_CONTROL = bytes({*range(32)} - set(b"\t\n\v\f\r\x1b"))  # bytes that text hardly has
GZIP, ZSTANDARD = rb"\x1f\x8b", rb"\x28\xb5\x2f\xfd"

_ICONV = "convert it, as in iconv -f {} -t UTF-8 FILE > NEW"
_BY_LINE = "unpack it, or use data.text_documents=line, which reads gzip and Zstandard"
_FORMATS = (  # first bytes, format, fix
    (GZIP, "compressed by gzip", _BY_LINE),
    (ZSTANDARD, "compressed by Zstandard", _BY_LINE),
    (rb"\xfd7zXZ\x00", "compressed by xz", "unpack it with xz -dk FILE"),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "compressed by bzip2", "unpack it with bzip2 -dk FILE"),
    (rb"\x04\x22\x4d\x18", "compressed by LZ4", "unpack it with lz4 -dk FILE"),
    (rb"PK(\x03\x04|\x05\x06)", "a zip archive (.docx, .xlsx and .epub files are zip archives)", "unpack it"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (rb"Rar!\x1a\x07", "a rar archive", "unpack it"),
    (rb"[^\0]{1,100}\0(?s:.){156,255}ustar[\0 ]", "a tar archive", "unpack it"),
    (rb"PAR1[\x15\x00]", "a Parquet file", "use data.source=parquet:GLOB"),
    (rb"ARROW1\0\0", "an Arrow file", "use data.source=hf:DIRECTORY for a data set that save_to_disk wrote"),
    (rb"SQLite format 3\0", "an SQLite database", "export its rows as JSON lines"),
    (rb"\x89HDF\r\n", "an HDF5 file", "export its rows as JSON lines"),
    (rb"%PDF-[0-9]", "a PDF file", "convert it with pdftotext FILE"),
    (rb"\xff\xfe\0\0", "UTF-32", _ICONV.format("UTF-32")),
    (rb"\0\0\xfe\xff", "UTF-32", _ICONV.format("UTF-32")),
    (rb"\xff\xfe|\xfe\xff", "UTF-16", _ICONV.format("UTF-16")),
)


def begins_with(pattern: bytes, head: bytes) -> bool:
    """Whether a file that begins with `head` has the format of this pattern, such as `GZIP`."""
    return re.match(pattern, head) is not None


def refuse_other_formats(head: bytes, path: str, unpacked: bool = False) -> None:
    """Raise DataError if the first bytes of a file identify another format than text in UTF-8.

    Args:
        head: up to `HEAD` bytes.
        path: the file, for the message.
        unpacked: the file is compressed, and `head` is decompressed.
    """
    for pattern, description, fix in _FORMATS:
        if begins_with(pattern, head):
            if unpacked:
                raise DataError(f"{path}, unpacked, is {description}, not text in UTF-8; unpack it, and convert that")
            raise DataError(f"{path} is {description}, not text in UTF-8; {fix}")
    refuse_nuls(head, path)


def refuse_nuls(raw: bytes, where: str) -> None:
    """Raise DataError if there are many NUL bytes. They are valid UTF-8, but text has few.

    Up to three, and one in 64 bytes, are allowed and kept: some web pages have them.
    """
    if b"\0" not in raw:  # several times faster than counting them
        return
    count = raw.count(b"\0")
    if count > 3 + len(raw) // 64:
        raise DataError(f"{where}: {count:,} of {len(raw):,} bytes are NUL; {_explain_nuls(raw, count)}")


def _explain_nuls(raw: bytes, count: int) -> str:
    """The probable cause of NULs: an encoding in 2 or 4 bytes has them at the positions of its high bytes."""
    by_position = [raw[position::4].count(b"\0") for position in range(4)]
    most = 0.9 * len(raw) / 4
    if count > 0.99 * len(raw) or BLOCK in raw:
        return "the file has a hole, probably from a crash; copy it again, or remove it"
    if min(by_position[0], by_position[1]) > most:
        return "it looks like UTF-32; " + _ICONV.format("UTF-32BE")
    if min(by_position[2], by_position[3]) > most:
        return "it looks like UTF-32; " + _ICONV.format("UTF-32LE")
    text = _is_text(raw.replace(b"\0", b""))
    for encoding, nuls in (
        ("UTF-16BE", by_position[0] + by_position[2]),
        ("UTF-16LE", by_position[1] + by_position[3]),
    ):
        # Letters of ASCII have a NUL each, and those of other scripts leave no text if NULs are taken away.
        if nuls > 0.9 * count and (nuls > 0.7 * len(raw) / 2 or not text):
            return "it looks like UTF-16; " + _ICONV.format(encoding)
    if text:
        return "the others are text in UTF-8; remove the NUL bytes, as in tr -d '\\000' < FILE > NEW"
    return "it is damaged, or not text; remove it"


def _is_text(raw: bytes) -> bool:
    """Whether bytes, which may end within a character, are UTF-8 with hardly any control characters."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(raw)
    except UnicodeDecodeError:
        return False
    return len(raw) - len(raw.translate(None, _CONTROL)) <= len(raw) // 100


def decode_utf8(raw: bytes, where: str, unit: str = "", begin: int = 0) -> str:
    """The text of some bytes.

    Args:
        raw: the bytes.
        where: the file, and the line if there is one.
        unit: what bytes are counted in, such as "line"; default: the file.
        begin: offset of these bytes in `unit`.

    Raises:
        DataError: the bytes are not UTF-8, or have many NULs; names the offset of the invalid byte in `unit`.
    """
    refuse_nuls(raw, where)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: invalid UTF-8 at byte {begin + error.start} of the {unit or 'file'} ({error.reason}); "
            "convert the file, as in iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"
        ) from None
