"""Kinds of work, each in a process of its own, measured in turns: medians, spread, and ratios of neighbours in time."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from aime_gym.errors import AimeGymError
from aime_gym.files import write_atomically

HERE = Path(__file__).parents[1]
THIS, OTHER = "this checkout", "other checkout"


@dataclass(frozen=True)
class Kind:
    """Some work in a checkout of this repository, by its name in `benchmarks.work` or as ``module:function``."""

    work: str
    options: Mapping[str, Any]
    checkout: Path = HERE


@dataclass
class Measured:
    """What came of kinds of work that were done in turns."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of doing the work once, a stretch."""

    def rates(self, amount: float = 1.0) -> dict[str, list[float]]:
        """How much of an amount that the work does at once it does in a second."""
        return {name: [amount / each for each in seconds] for name, seconds in self.seconds.items()}

    def ratios(self, base: str) -> dict[str, list[float]]:
        """How many times as fast as `base` each is, by stretches that were neighbours in time."""
        return {
            name: [slow / fast for slow, fast in zip(self.seconds[base], seconds, strict=True)]
            for name, seconds in self.seconds.items()
        }


def measure(kinds: Mapping[str, Kind], repeats: int = 15, seconds: float = 0.4, threads: int = 1) -> Measured:
    """Does all kinds of work in turns.

    Args:
        kinds: By name.
        repeats: Timed stretches of each.
        seconds: About how long one takes.
        threads: CPU threads. On one the seconds are those of the CPU.

    Raises:
        AimeGymError: If a process fails.
    """
    measured = Measured()
    with ExitStack() as stack:
        workers = {name: stack.enter_context(_Worker(kind, threads)) for name, kind in kinds.items()}
        once = {name: min(worker.take(1), worker.take(1)) for name, worker in workers.items()}
        calls = {name: max(1, round(seconds / max(each, 1e-6))) for name, each in once.items()}
        for _ in range(repeats):
            for name, worker in workers.items():
                measured.seconds.setdefault(name, []).append(worker.take(calls[name]) / calls[name])
    return measured


def both_checkouts(work: str, options: Mapping[str, Any], against: Path | None) -> dict[str, Kind]:
    """The same work here and, if there is one, in the other checkout."""
    kinds = {THIS: Kind(work, options)}
    return kinds if against is None else {**kinds, OTHER: Kind(work, options, against)}


def absolute(model: str) -> str:
    """A folder by its whole path, which other checkouts find, too; else the bundled name as it is."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def check_against(against: Path | None, model: str) -> None:
    """Raises an `AimeGymError` unless the other checkout is one, and reads the same weights."""
    if against is None:
        return
    if not (against / "aime_gym").is_dir():
        raise AimeGymError(f"--against takes a checkout of this repository; there is no {against / 'aime_gym'}.")
    if not Path(model).is_dir():
        raise AimeGymError(f"Two checkouts may bundle different weights: give --model a folder, not {model}.")


def report(title: str, rows: Mapping[str, Measured], amounts: Mapping[str, float], unit: str, base: str) -> None:
    """Prints one row a kind of work, a group of them for each measurement.

    Args:
        title: What is measured.
        rows: Measurements by name.
        amounts: How much of the unit the work does at once, by the same names.
        unit: What is counted a second.
        base: What ratios are to, where it was measured.
    """
    table = Table(title=title)
    for column in ("", "kind", f"{unit} a second", "lowest to highest", f"times {base}", "middle half"):
        table.add_column(column, justify="left" if column in ("", "kind") else "right")
    for name, measured in rows.items():
        ratios = measured.ratios(base) if base in measured.seconds else {}
        for kind, values in measured.rates(amounts[name]).items():
            told = [f"{statistics.median(ratios[kind]):.2f}", "{:.2f} to {:.2f}".format(*_half(ratios[kind]))]
            spread = f"{min(values):,.4g} to {max(values):,.4g}"
            row = [name, kind, f"{statistics.median(values):,.4g}", spread, *(told if ratios else ["", ""])]
            table.add_row(*row)
    Console().print(table)


def write(
    output: Path | None, rows: Mapping[str, Measured], amounts: Mapping[str, float], base: str, **told: Any
) -> None:
    """Writes the numbers as JSON, if there is an `output`; see `report`."""
    if output is None:
        return
    results = {}
    for name, measured in rows.items():
        rates = measured.rates(amounts[name])
        ratios = measured.ratios(base) if base in measured.seconds else {}
        results[name] = {
            "per_second": rates,
            "median": {kind: statistics.median(values) for kind, values in rates.items()},
            "ratio": {kind: statistics.median(values) for kind, values in ratios.items()},
            "ratio_middle_half": {kind: _half(values) for kind, values in ratios.items()},
        }
    machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    machine["cpu"] = torch.backends.cpu.get_cpu_capability()
    write_atomically(output, json.dumps({**told, **machine, "base": base, "results": results}, indent=2) + "\n")


def _half(values: Sequence[float]) -> tuple[float, float]:
    """Between which the middle half of the values lies."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


class _Worker:
    """A process that does some work as often as it is told."""

    def __init__(self, kind: Kind, threads: int):
        self._kind, self._threads = kind, threads

    def __enter__(self) -> _Worker:
        kind, threads = self._kind, self._threads
        asked = {"name": kind.work, "threads": threads, "options": dict(kind.options)}
        place = kind.checkout.resolve()
        environment = {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-W", "ignore", str(HERE / "benchmarks" / "work.py"), json.dumps(asked)]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, cwd=place, env=environment, **pipes)
        self._read()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def take(self, times: int) -> float:
        """The seconds of doing the work so many times."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{times}\n")
        self._process.stdin.flush()
        return float(self._read())

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise AimeGymError(f"{self._kind.work} failed in {self._kind.checkout}: see above.")
        return line
