"""Files on disk: written whole, read with care."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from aime_gym.errors import AimeGymError
from aime_gym.files import read_json, write_json


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
