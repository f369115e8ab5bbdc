"""Five hundred damaged files of every kind: each loads as what it was, as something sane, or is refused in one line."""

from __future__ import annotations

import pytest

from tests.test_mutations import KINDS, Files, wrong

pytestmark = pytest.mark.slow

SEEDS = range(3, 24)
"""The quick tests have those before."""


def test_many_mutated_files_of_every_kind(tmp_path):
    assert len(KINDS) * len(SEEDS) >= 500
    found = wrong(Files(tmp_path / "files"), SEEDS, tmp_path)
    assert not found, "\n".join(found)
