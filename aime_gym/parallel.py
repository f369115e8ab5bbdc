"""Independent jobs in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def run_in_parallel(function: Callable[[Any], None], jobs: Sequence[Any], workers: int, title: str, unit: str) -> None:
    """Runs jobs; Ctrl-C ends them, and what they have written stays.

    Args:
        function: Of the top level of a module, as processes need it.
        jobs: Its arguments, which can be pickled.
        workers: Processes, of one thread each and silent, under one progress bar; with 1 the jobs run here, each with
            what it shows of its own.
        title: Of the progress bar.
        unit: What the jobs are.
    """
    if workers == 1:
        for job in jobs:
            function(job)
        return
    with job_progress(title, len(jobs), unit) as advance:
        if jobs:
            context = multiprocessing.get_context("spawn")
            with context.Pool(min(workers, len(jobs)), _start_silent_worker) as pool:
                for _ in pool.imap_unordered(function, jobs):
                    advance()


@contextmanager
def job_progress(title: str, total: int, unit: str) -> Iterator[Any]:
    """A progress bar; yields a function that advances it, and says at the end how many are complete."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task(title, total=total)
        try:
            yield lambda count=1: progress.advance(bar, count)
        finally:
            done = int(progress.tasks[0].completed + 1e-6)  # shares of jobs add up with rounding
            progress.console.print(f"{title}: {done} of {total} {unit} are complete.")


@contextmanager
def without_main() -> Iterator[None]:
    """Processes that begin meanwhile do not run the user's script, which may have no `if __name__ == "__main__"`."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def start_worker() -> None:
    """Leaves Ctrl-C to the parent, and threads to other processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported


def _start_silent_worker() -> None:
    start_worker()
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - several bars at once cannot be read
