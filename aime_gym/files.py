"""Safe files: written completely or not at all, compared with digests, and checked while they are read."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import tokenize
import uuid
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeGuard

import numpy as np

from aime_gym.errors import AimeGymError

DAMAGED_NPZ = (
    *(OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, MemoryError),
    *(ValueError, TypeError, LookupError, ArithmeticError, SyntaxError, tokenize.TokenError),
)
"""What reading a damaged npz file, or another zip archive, raises: RuntimeError where a bit says that it is encrypted,
MemoryError where an array's header says that it is huge, and the second line where that header makes no sense."""

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
"""Names of the files that `write_atomically` writes before it gives them their own; a killed process leaves them."""

LARGEST_JSON = 64 * 1024**2
"""Bytes of a JSON file that is read."""

DEEPEST_JSON = 32
"""How far objects and lists may be nested in a JSON file that is read."""

LARGEST_NPZ = 1024**3
"""Bytes that the arrays of an npz file may take in memory."""


def write_atomically(path: str | Path, content: str | bytes | memoryview) -> Path:
    """Writes a file so that a reader, whenever the writer dies, finds the old content or the new one.

    Several threads, processes or containers may write the same file at once: the last one's content stays.

    Args:
        path: The file; its folder is made when missing.
        content: All of it; text becomes UTF-8.

    Returns:
        The path.

    Raises:
        OSError: If the disk is full; the old file stays as it was.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    # Not a name of tempfile's, whose files only their owner can read. Containers that share a folder share pids.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        before = "the file that was there is intact" if path.exists() else "nothing was written"
        told = f"{error.strerror} for {len(data) / 1e6:.1f} MB; {before}"
        raise OSError(error.errno, told, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def file_stamp(path: str | Path) -> tuple[int, int, int]:
    """What changes when a file is written anew: its inode, size and time."""
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


def json_text(content: Any, indent: int | None = 2) -> str:
    """Text that every reader of JSON takes: a number that is not finite is null, as JSON knows none.

    Args:
        content: Objects, lists, strings, numbers (NumPy's too) and arrays; anything else, e.g. a path, is written as
            `str` names it.
        indent: Spaces before nested values; None for a single line.
    """
    return json.dumps(_plain(content), indent=indent, allow_nan=False)


def write_json(path: str | Path, content: Any) -> Path:
    """Writes a JSON file, whole or not at all, as `json_text` has it.

    Returns:
        The path.

    Raises:
        OSError: If the disk is full; the old file stays as it was.
    """
    return write_atomically(path, json_text(content) + "\n")


def read_json(path: str | Path, what: str = "a JSON object", remedy: str = "") -> dict[str, Any]:
    """Reads a JSON file that holds an object, wherever it comes from.

    Args:
        path: The file.
        what: It should hold, for the message.
        remedy: What the user can do if it cannot be used, for the message.

    Raises:
        AimeGymError: If it cannot be read, is no strict JSON (NaN and Infinity are none), holds something else than an
            object, or is too large, nested too deep or full of integers beyond 64 bits.
    """
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"it is larger than {LARGEST_JSON / 1024**2:.0f} MB")
        content = parse_json(path.read_bytes().decode())
        if not isinstance(content, dict):
            raise ValueError(f"expected keys and values; got {content!r:.80}")
    except (OSError, ValueError) as error:
        raise AimeGymError(f"{path} does not hold {what} ({reason(error)}). {remedy}".rstrip()) from error
    return content


def parse_json(text: str) -> Any:
    """The content of JSON text from outside.

    Raises:
        ValueError: For the same reasons as `read_json`.
    """
    try:
        content = json.loads(text, parse_constant=_refuse_constant, parse_int=_integer, parse_float=_float)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    level, depth = [content] if isinstance(content, dict | list) else [], 0
    while level:
        if depth > DEEPEST_JSON:
            raise ValueError("it is nested too deep")
        level = [part for one in level for part in (one.values() if isinstance(one, dict) else one)]
        level, depth = [part for part in level if isinstance(part, dict | list)], depth + 1
    return content


def are_numbers(content: Any) -> bool:
    """Whether JSON's content is a list of numbers, or an empty one."""
    return isinstance(content, list) and all(isinstance(one, int | float) for one in content)


def check_archive(path: str | Path) -> None:
    """Compares what a zip archive holds with its checksums, as those who read it do not always.

    Raises:
        ValueError: If something in it is damaged; for other errors see `zipfile.ZipFile`.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged} in it is damaged")


def npz_names(path: str | Path) -> list[str]:
    """The names of the arrays in an npz file, without reading them.

    Raises:
        AimeGymError: If it is no npz file, or its arrays would take more memory than `LARGEST_NPZ`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _npz_names(archive)
    except DAMAGED_NPZ as error:
        raise AimeGymError(f"{path} is not a readable npz file ({reason(error)}).") from error


def read_npz(path: str | Path, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """Reads arrays of an npz file. Pickled objects are never loaded.

    Args:
        path: The file.
        names: Names of the arrays; all by default.

    Raises:
        AimeGymError: For the same reasons as `npz_names`, or if an array is not there or damaged: before memory is
            taken, the size that its header states is compared with the bytes that are there.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            known = _npz_names(archive)
            arrays = {}
            for name in known if names is None else names:
                try:
                    arrays[name] = _read_array(archive, f"{name}.npy")
                except DAMAGED_NPZ as error:
                    raise AimeGymError(f"{path}: {name!r} cannot be read ({reason(error)}).") from error
            return arrays
    except AimeGymError:
        raise
    except DAMAGED_NPZ as error:
        raise AimeGymError(f"{path} is not a readable npz file ({reason(error)}).") from error


def _npz_names(archive: zipfile.ZipFile) -> list[str]:
    size = sum(info.file_size for info in archive.infolist())
    if size > LARGEST_NPZ:
        raise ValueError(f"its arrays take {size / 1e9:.1f} GB; at most {LARGEST_NPZ / 1e9:.1f} are read")
    names = archive.namelist()
    return [name.removesuffix(".npy") for name in names if name.endswith(".npy")]


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    info = archive.getinfo(name)
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError(f"version {version} of npy")
        if dtype.hasobject:
            raise ValueError("it holds pickled objects")
        declared, there = math.prod(shape) * dtype.itemsize, info.file_size - file.tell()
        if declared != there:
            raise ValueError(f"shape {shape} of {dtype} is {declared} bytes, but there are {there}")
        content = bytearray(file.read())
    array = np.frombuffer(content, dtype).reshape(shape, order="F" if is_fortran else "C")
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))  # torch takes no other


def _plain(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    if isinstance(content, np.ndarray | np.generic):
        return _plain(content.tolist())
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    return content if content is None or isinstance(content, str | int) else str(content)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _integer(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits:.20} is not finite")
    return number


def reason(error: BaseException) -> str:
    """An error's message in one line, shortened, for a message of our own; its kind where it has none."""
    return f"{' '.join(str(error).split()) or type(error).__name__:.200}"


DIGESTS = "digests.json"
"""File name -> SHA-256 of the file, in hexadecimal, for files of the same folder."""


def write_digests(folder: Path, names: Iterable[str]) -> None:
    """Enters files into their folder's `digests.json`; those of other names stay.

    Args:
        folder: Where the files are.
        names: Names of the files, which have just been written; one that is not there loses its entry.

    Raises:
        OSError: If the disk is full.
    """
    path = folder / DIGESTS
    try:
        digests = read_json(path) if path.exists() else {}
    except AimeGymError:  # what it said of files that are replaced now matters no more
        digests = {}
    for name in names:
        digests.pop(name, None)
        if (folder / name).is_file():
            digests[name] = digest_of(folder / name)
    write_json(path, digests)


def check_digest(path: Path) -> None:
    """Compares a file with what its folder's `digests.json` says of it; without an entry there is nothing to compare.

    Raises:
        AimeGymError: If it is another file than the one that was written.
    """
    beside = path.parent / DIGESTS
    if not beside.is_file() or not path.is_file():
        return
    expected = read_json(beside, "digests of files", "Get the folder again, or delete the file to load what is there.")
    if path.name in expected and expected[path.name] != digest_of(path):
        raise AimeGymError(
            f"{path} is not the file that {DIGESTS} beside it tells of: it was damaged or changed, or writing the "
            f"folder was interrupted. Get or make it again; if you changed it yourself, delete {DIGESTS}."
        )


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


WEIGHTS = ("config.yaml", "heads.safetensors", "model.pt", "model.safetensors")
"""The files of a model's folder that decide what it predicts; released folders have ``model.pt``, ours the others."""


def weights_digest(folder: str | Path) -> str:
    """Says which config and weights a model's folder holds, in 16 hexadecimal digits.

    They follow from the SHA-256 of each file: that in `digests.json`, with which the file is compared when it is read,
    or that of the file itself where there is none.

    Raises:
        AimeGymError: If `digests.json` is damaged.
    """
    folder = Path(folder)
    there = (folder / DIGESTS).is_file()
    told = read_json(folder / DIGESTS, "digests of files", "Get the folder again.") if there else {}
    digests = {name: told.get(name) or digest_of(folder / name) for name in WEIGHTS if (folder / name).is_file()}
    text = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


REVISION = "revision.json"
"""Counts the weights that a model's folder has held: ``{"revision": 1, "digest": "..."}``."""


class Revision(NamedTuple):
    """Which weights a model has. Ids and names stay when weights change; this does not.

    Examples:
        >>> import aime_gym
        >>> print(aime_gym.load_pretrained_model("cheetah-state").revision)
        cheetah-state, revision 1 (950a269388303e08)

    Attributes:
        model: The name of its folder.
        number: Counts the weights that the folder has held, from 1 on; None if it is not known.
        digest: The digest of config and weights, in 16 hexadecimal digits; see `weights_digest`.
    """

    model: str
    number: int | None
    digest: str

    def __str__(self) -> str:
        number = "unknown revision" if self.number is None else f"revision {self.number}"
        return f"{self.model}, {number} ({self.digest})"

    @classmethod
    def from_dict(cls, content: Any) -> Revision:
        """Reads what `_asdict` gave, wherever it comes from; a ValueError says that it is something else."""
        if not isinstance(content, Mapping) or set(content) != set(cls._fields):
            raise ValueError(f"expected {', '.join(cls._fields)} of weights; got {content!r:.80}")
        model, number, digest = (content[name] for name in cls._fields)
        if not (isinstance(model, str) and len(model) <= 255 and model.isprintable()):
            raise ValueError(f"expected the name of a model; got {model!r:.80}")
        if number is not None and not _is_revision(number):
            raise ValueError(f"expected the number of a revision; got {number!r:.80}")
        if not _is_digest(digest):
            raise ValueError(f"expected a digest of 16 hexadecimal digits; got {digest!r:.80}")
        return cls(model, number, digest)


def _is_revision(number: Any) -> TypeGuard[int]:
    return type(number) is int and 1 <= number < 2**53  # beyond there JSON's numbers are no longer exact


def _is_digest(digest: Any) -> TypeGuard[str]:
    return isinstance(digest, str) and re.fullmatch("[0-9a-f]{16}", digest) is not None


_NO_REVISION = "Delete it: the revision is unknown then, and the next save counts from 1."


def read_revision(folder: str | Path) -> Revision:
    """Says which weights a model's folder holds.

    The number is unknown where the folder has no `revision.json`, or one that tells of other weights.

    Raises:
        AimeGymError: If that file or `digests.json` is damaged.
    """
    folder, digest = Path(folder), weights_digest(folder)
    number, of = _noted(folder) or (None, digest)
    return Revision(folder.resolve().name, number if of == digest else None, digest)


def count_revision(folder: str | Path) -> None:
    """Counts the weights that were just written into a model's folder.

    The number grows by one if `revision.json` tells of other weights. It is 1 where there is none that can be read.

    Raises:
        OSError: If the disk is full.
    """
    folder, digest = Path(folder), weights_digest(folder)
    try:
        number, of = _noted(folder) or (0, "")
    except AimeGymError:  # what is damaged tells nothing of the weights before
        number, of = 0, ""
    write_json(folder / REVISION, {"revision": number if of == digest else number + 1, "digest": digest})


def _noted(folder: Path) -> tuple[int, str] | None:
    """Number and digest of the weights that `revision.json` tells of."""
    path, what = folder / REVISION, "the revision of weights"
    if not path.is_file():
        return None
    content = read_json(path, what, _NO_REVISION)
    number, digest = (content.get(key) for key in ("revision", "digest"))
    if not _is_revision(number) or not _is_digest(digest):
        raise AimeGymError(f"{path} does not hold {what}: {content!r:.80}. {_NO_REVISION}")
    return number, digest


def file_digest(path: str | Path) -> str:
    """Says what a file holds, in 16 hexadecimal digits."""
    return files_digest([Path(path)])


def files_digest(paths: list[Path]) -> str:
    """One SHA-256 of several files, in 16 hexadecimal digits, by their names and bytes."""
    digest: Any = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
