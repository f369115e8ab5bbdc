"""Files on disk: written whole, read with care."""

import io
import json
import math
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from aime_gym import files
from aime_gym.errors import AimeGymError
from aime_gym.files import npz_names, read_json, read_npz, write_json


def test_json_is_strict_whatever_is_written(tmp_path):
    content = {"nan": math.nan, "more": [np.float32("inf"), {"where": tmp_path}], "array": np.arange(3), 1: True}
    path = write_json(tmp_path / "new" / "a.json", content)

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    there = json.loads(path.read_text(), parse_constant=refuse)
    assert there == {"nan": None, "more": [None, {"where": str(tmp_path)}], "array": [0, 1, 2], "1": True}
    assert read_json(path) == there
    assert list(path.parent.iterdir()) == [path], "nothing else is left"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1, 2]", "expected keys and values"),
        ("null", "expected keys and values"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": 1e999}', "not finite"),
        ('{"a": 1' + "0" * 5000 + "}", "5001 digits"),
        ('{"a": 1' + "0" * 30 + "}", "31 digits"),
        ('{"a": ' * 100 + "1" + "}" * 100, "nested too deep"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deep"),
        ('{"a": 1', "delimiter"),
        ("", "Expecting value"),
    ],
)
def test_json_from_outside_is_an_object_of_sane_numbers(tmp_path, text, reason):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(AimeGymError, match=reason) as caught:
        read_json(tmp_path / "a.json", remedy="Delete it.")
    assert str(caught.value).endswith("Delete it.")
    assert "\n" not in str(caught.value)


def test_json_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "binary.json", tmp_path / "missing.json", tmp_path):
        with pytest.raises(AimeGymError, match="does not hold a JSON object"):
            read_json(Path(path))


def npz_with_header(path: Path, header: str, content: bytes = bytes(8)) -> Path:
    """An npz file with one array `a`, whose header says what it likes."""
    whole = io.BytesIO()
    np.lib.format.write_array(whole, np.zeros(1))
    prefix = whole.getvalue()[:8]  # magic and version
    header = header.ljust(117) + "\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", prefix + len(header).to_bytes(2, "little") + header.encode() + content)
    return path


def test_arrays_come_back_as_numpy_wrote_them(tmp_path):
    arrays = {
        "c": np.arange(6, dtype="f4").reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "none": np.zeros((0, 3)),
        "one": np.array(True),
        "other bytes": np.arange(3, dtype=">f8"),
    }
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    there = read_npz(tmp_path / "a.npz")
    assert list(there) == npz_names(tmp_path / "a.npz") == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(there[name], array)
        assert there[name].dtype == array.dtype.newbyteorder("=")
        assert there[name].flags.writeable
    assert list(read_npz(tmp_path / "a.npz", ["one"])) == ["one"]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [("(10000000000,)", "<f8"), ("(-1,)", "<f8"), ("(1, 2)", "<f8"), ("(1,)", "|O"), ("(1,)", "<q9")],
)
def test_what_an_array_says_of_its_size_takes_no_memory(tmp_path, shape, dtype):
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    path = npz_with_header(tmp_path / "a.npz", header)
    tracemalloc.start()
    with pytest.raises(AimeGymError, match=r"a\.npz: 'a' cannot be read"):
        read_npz(path)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_archives_that_unpack_to_too_much_are_refused_unread(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(1_000_000))
    monkeypatch.setattr(files, "LARGEST_NPZ", 7_000_000)
    for read in (read_npz, npz_names):
        with pytest.raises(AimeGymError, match=r"a\.npz.*take 0\.0 GB"):
            read(tmp_path / "a.npz")
