"""Disks that fill up while a command writes: it says so, and ends as usual when there is room again."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.faults.jobs import check, finish, prepare, start

pytestmark = pytest.mark.slow

COMMANDS = ("collect", "train", "fit-heads", "imitate", "dream")


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, str]:
    return prepare(tmp_path_factory.mktemp("given"))


@pytest.fixture(scope="module")
def usual(tmp_path_factory, given) -> Callable[[str], Path]:
    """The folder of a command that nothing disturbed."""
    folder = tmp_path_factory.mktemp("usual")

    @cache
    def run(command: str) -> Path:
        finish(command, folder / command, given)
        return folder / command

    return run


def sizes(folder: Path) -> list[int]:
    return [path.stat().st_size for path in folder.rglob("*") if path.is_file()]


@pytest.fixture
def disk(tmp_path):
    """A small file system, where they may be made."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip(f"no file system can be made here: {made.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_told_and_costs_nothing(command, share, given, usual, disk, tmp_path):
    pages = sum(-(-size // 4096) for size in sizes(usual(command)))
    subprocess.run(["mount", "-o", f"remount,size={int(pages * share) * 4}k", str(disk)], check=True)
    log, out = (disk / "out").with_suffix(".log"), disk / "out"
    log.symlink_to(tmp_path / "log")  # on another disk
    process = start(command, out, given)
    assert process.wait(900) == 1, log.read_text()[-3000:]
    assert "No space left" in log.read_text()
    assert "Free some space" in log.read_text()
    assert "Traceback" not in log.read_text()
    subprocess.run(["mount", "-o", f"remount,size={pages * 8}k", str(disk)], check=True)
    finish(command, out, given)
    check(command, out, usual(command))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_may_not_grow_is_told_and_costs_nothing(command, given, usual, tmp_path):
    most = max(sizes(usual(command))) // 2
    out = tmp_path / "out"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    process = start(command, out, given, preexec_fn=limit)
    log = out.with_suffix(".log")
    assert process.wait(900) == 1, log.read_text()[-3000:]
    assert "File too large" in log.read_text()
    assert "ulimit -f" in log.read_text()
    assert "Traceback" not in log.read_text()
    finish(command, out, given)
    check(command, out, usual(command))
