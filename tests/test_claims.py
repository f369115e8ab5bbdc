"""Files are whole however many write them at once, and a folder is one process's at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from aime_gym.errors import AimeGymError
from aime_gym.files import write_atomically
from aime_gym.parallel import claimed

WRITER = """
import os, sys
from aime_gym.files import write_atomically
os.getpid = lambda: 1  # as in containers that share a folder
for _ in range(60):
    write_atomically(sys.argv[1], sys.argv[2] * 50_000)
"""
HOLDER = """
import sys, time
from aime_gym.parallel import claimed
with claimed(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def start(code: str, *words: str | Path, **options) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, words)], text=True, **options)


def contents_while_written(path: Path, running) -> set[str]:
    """What a reader finds: the letters of each content, of which a whole one has one."""
    found = set()
    while running():
        if path.exists():
            text = path.read_text()
            found.add("".join(sorted(set(text))) + ("" if len(text) == 50_000 else " cut"))
    return found


def test_threads_that_write_one_file_at_once_leave_it_whole(tmp_path):
    path, failures = tmp_path / "file", []

    def write(letter):
        try:
            for _ in range(40):
                write_atomically(path, letter * 50_000)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=[letter]) for letter in "abc"]
    for thread in threads:
        thread.start()
    found = contents_while_written(path, lambda: any(thread.is_alive() for thread in threads))
    assert failures == []
    assert found <= set("abc")
    assert [child.name for child in tmp_path.iterdir()] == ["file"]


def test_processes_of_one_number_that_write_one_file_at_once_leave_it_whole(tmp_path):
    path = tmp_path / "file"
    writers = [start(WRITER, path, letter) for letter in "abc"]
    found = contents_while_written(path, lambda: any(writer.poll() is None for writer in writers))
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert found <= set("abc")
    assert [child.name for child in tmp_path.iterdir()] == ["file"]


def test_a_file_can_be_read_by_whom_the_umask_lets(tmp_path):
    mask = os.umask(0o022)
    try:
        assert write_atomically(tmp_path / "file", "text").stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(mask)


def test_a_folder_is_held_by_one_process_until_that_ends_however_it_does(tmp_path):
    holder = start(HOLDER, tmp_path / "out", stdout=subprocess.PIPE)
    assert holder.stdout.readline() == "held\n"
    held = rf"out is being written to by another call \(process {holder.pid} on"
    with pytest.raises(AimeGymError, match=held), claimed(tmp_path / "out"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with claimed(tmp_path / "out"):
        pass


def test_a_folder_is_held_against_the_same_process_too(tmp_path):
    with claimed(tmp_path), pytest.raises(AimeGymError, match="being written to"), claimed(tmp_path):
        pass
    with claimed(tmp_path):
        pass


def test_nothing_is_left_of_a_folder_to_which_nothing_was_written(tmp_path):
    with pytest.raises(KeyError), claimed(tmp_path / "new" / "out"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with claimed(tmp_path / "new" / "out"):
        (tmp_path / "new" / "out" / "file").touch()
    assert [path.name for path in (tmp_path / "new" / "out").iterdir()] == ["file"]


def test_a_file_is_no_folder_to_write_to(tmp_path):
    (tmp_path / "file").touch()
    for place in ("file", "file/out"):
        with pytest.raises(AimeGymError, match=r"write to; .*file is a file\."), claimed(tmp_path / place):
            pass


def test_what_killed_processes_left_is_cleared_and_what_is_being_written_or_of_others_stays(tmp_path):
    own = "0123456789abcdef" * 2
    ages = {f".0.npz.{own}.tmp": 7200, f"run/.last.pt.{own}.tmp": 7200, f".1.npz.{own}.tmp": 0, "0.npz": 7200}
    for name, age in (ages | {"run/.notes.tmp": 7200, ".0.npz.12.tmp": 7200}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))
    with claimed(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        *(".0.npz.12.tmp", f".1.npz.{own}.tmp", ".notes.tmp", "0.npz")
    ]
