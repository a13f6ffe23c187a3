"""Files that are whole or absent, and the plain .npz (no pickle) that results are kept in."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "dense",
    "digest",
    "load_npz",
    "load_torch",
    "plain",
    "remove_partial_files",
    "replacing",
    "save_npz",
    "save_torch",
]


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file whole or not at all: yields a temporary path beside it, renamed on success.

    After any failure (a full disk, Ctrl-C) the temporary file is gone and what stood at `path`
    before still stands. The folder must exist.

    Args:
        path: where the file is to be.

    Yields:
        The path to write to, in the same folder and with the same suffix.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"a folder, no file: {path}: give the name of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {path.parent}: make it first")
    temporary = path.with_name(f".cka-probe-{secrets.token_hex(8)}{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # a disk that fills late says so here, before the rename
        temporary.replace(path)
    except OSError as error:
        if error.filename == str(temporary):
            error.filename = str(path)  # the name that the user knows
        raise
    finally:
        temporary.unlink(missing_ok=True)


# What a killed run leaves behind: the temporary files of `replacing` (any suffix), those of older
# versions (16 hexadecimal digits alone), and the folders in which a command collects its files.
_PARTIAL = re.compile(
    r"\.(cka-probe-[0-9a-f]{16}(\..*)?|[0-9a-f]{16}\.(npz|csv|png|html|pt|json)"
    r"|(writing|writable)-.*)"
)


def remove_partial_files(folder: Path) -> None:
    """Remove what a killed run left half written in a folder."""
    for path in folder.iterdir():
        if _PARTIAL.fullmatch(path.name):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def save_npz(
    path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]], meta: Any, *, version: int
) -> None:
    """Write arrays, meta (as a 0-d array of JSON text) and format (an integer) to one .npz.

    Args:
        path: taken as it is, without a suffix added.
        arrays: numbers or text by name; never objects.
        meta: what `plain` returns.
        version: of the format.

    Raises:
        OSError: where the folder does not exist or cannot be written; nothing is left there.
        ValueError: for an array of objects.
    """
    everything = {**arrays, "meta": np.array(json.dumps(meta)), "format": np.array(version)}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **everything)


def load_npz(
    path: str | os.PathLike[str], names: tuple[str, ...], *, version: int, what: str = "report"
) -> tuple[dict[str, NDArray[Any]], Any]:
    """Read what `save_npz` wrote; nothing in the file is executed.

    Args:
        path: the file.
        names: the arrays that belong in it; others are not read.
        version: the newest format that the caller understands.
        what: the file's kind, for the messages.

    Returns:
        (arrays by name, meta).

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where it is something else, is damaged, or of a newer format.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such {what}: {path}: check the path")
    if path.is_dir():
        raise IsADirectoryError(f"a folder, no {what}: {path}: give the file in it")
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            raise ValueError(f"not a {what}, nor any .npz: {path}: give the file that was saved")
        file.seek(0)
        try:
            _check_archive(file)
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                wanted = [k for k in (*names, "meta", "format") if k in archive]
                stored = {k: np.asarray(archive[k]) for k in wanted}  # a member may be bytes
        except Exception:  # of zipfile, zlib, numpy, and of Python's parser, which reads headers
            raise ValueError(f"{what} cut short or damaged: {path}: make it again") from None
    found = stored.pop("format", np.array(None))
    if found.ndim or found.dtype.kind not in "iu":
        raise ValueError(f"an .npz, but no {what}: {path}: give the file that was saved")
    if found > version:
        raise ValueError(f"{what} of a newer format ({found}): {path}: update cka-probe")
    if found < 1:
        raise ValueError(f"{what} of no known format ({found}): {path}: make it again")
    missing = [name for name in (*names, "meta") if name not in stored]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(missing)}: {path}: make it again")
    try:
        return stored, json.loads(str(stored.pop("meta")))
    except (ValueError, RecursionError):
        raise ValueError(f"{what} whose meta is no JSON: {path}: make it again") from None


_BOMB_BYTES, _BOMB_RATIO = 2**30, 50  # numbers of ours are packed two times or so, never so well


def _check_archive(file: IO[bytes]) -> None:
    """Refuse arrays that are larger than the file can hold, before numpy makes room for them.

    Raises:
        ValueError: a header that promises another size than is there, an array of objects, or far
            more bytes than an archive of this size holds of numbers.
    """
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        total, packed = (sum(m.file_size for m in members), sum(m.compress_size for m in members))
        if total > max(_BOMB_BYTES, _BOMB_RATIO * packed):
            raise ValueError(f"too large: {total} bytes: make the file again")
        for member in (m for m in members if m.filename.endswith(".npy")):
            with archive.open(member) as part:
                version = np.lib.format.read_magic(part)
                later = np.lib.format.read_array_header_2_0
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else later
                shape, _, dtype = read(part)
                size = math.prod(shape) * dtype.itemsize
                if dtype.hasobject or size != member.file_size - part.tell():
                    raise ValueError(f"not what it promises: {member.filename}: make it again")


def save_torch(path: str | os.PathLike[str], content: Any) -> None:
    """Write tensors and plain values whole or not at all, with a checksum of every part.

    Args:
        path: where the file is to be.
        content: what `torch.save` takes.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    with replacing(path) as temporary:
        try:
            with _checksums(), temporary.open("wb") as file:
                torch.save(content, file)
        except RuntimeError as error:  # torch reports its own failure after that of the disk
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            cause.filename = cause.filename or str(path)
            raise cause from None


@contextmanager
def _checksums() -> Iterator[None]:
    """Have torch write the checksums that `load_torch` checks, whatever the user set."""
    set_options = getattr(torch.serialization, "set_crc32_options", None)
    if set_options is None:  # torch 2.5 always writes them
        yield
        return
    before = torch.serialization.get_crc32_options()
    set_options(True)
    try:
        yield
    finally:
        set_options(before)


def load_torch(path: str | os.PathLike[str]) -> Any:
    """Read what `save_torch` wrote, on the CPU; nothing in the file is executed.

    torch does not check the checksums that it writes: a flipped bit would be another weight. Files
    without any, of torch's old format or saved with its checksums off, are read unchecked.

    Args:
        path: the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: a damaged file, or one that holds more than tensors and plain values.
    """
    try:
        with Path(path).open("rb") as file:
            zipped = file.read(2) == b"PK"
        if zipped:
            with zipfile.ZipFile(path) as archive:
                # with its checksums off torch writes 0 for every part
                checked = any(member.CRC for member in archive.infolist())
                damaged = archive.testzip() if checked else None
            if damaged is not None:
                raise ValueError(f"checksum differs: {damaged} of {path}: make the file again")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, OSError, ValueError):
        raise
    except Exception as error:  # BadZipFile, UnpicklingError, RuntimeError, EOFError, KeyError, ...
        raise ValueError(f"file damaged, or of another kind: {path}: make it again") from error


def plain(value: Any, where: str = "meta") -> Any:
    """The value as JSON would return it: tuples become lists, nan and infinity None.

    Args:
        value: dict (text keys), list, tuple, text, number, bool, None, or a NumPy number.
        where: its name, for the message.

    Raises:
        TypeError: for anything else, naming the place.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{k}]") for k, item in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    raise TypeError(f"{where} cannot be JSON: {value!r:.60}: use text keys, text, numbers, lists")


def dense(tensor: Tensor) -> Tensor:
    """A sparse tensor with all of its numbers, any other as it is."""
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def digest(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and content of a tensor."""
    sha = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    sha.update(dense(tensor).detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()
