"""What concerns processes: workers, here or on a Ray cluster, threads, generators, a console, locks of folders."""

from __future__ import annotations

import multiprocessing
import os
import platform
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ContextDecorator, ExitStack, contextmanager, nullcontext, redirect_stdout, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from aime_gym.errors import AimeGymError
from aime_gym.files import TEMPORARY

if TYPE_CHECKING:
    import torch

LOCK = ".aime_gym.lock"
"""The file in a folder that says who writes to it."""

_STALE = 3600.0
"""Seconds after which a temporary file is what a killed process has left; to write one takes seconds."""


@contextmanager
def claimed(folder: str | Path) -> Iterator[Path]:
    """Keeps a folder for this process until it is left, and clears it of what killed processes have left there.

    The lock is the operating system's: it ends with its process, however that ends.

    Args:
        folder: Made when missing; it is gone again afterwards if nothing was written to it.

    Yields:
        The folder.

    Raises:
        AimeGymError: If another process holds it, or there is a file in its place.
    """
    folder = Path(folder)
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = _lock(folder)
    try:
        _remove_stale(folder)
        yield folder
    finally:
        (folder / LOCK).unlink(missing_ok=True)  # while it is held; the next process makes a new one
        lock.release()
        for path in new:
            with suppress(OSError):  # something was written to it
                path.rmdir()


@contextmanager
def all_claimed(*folders: Path) -> Iterator[list[Path]]:
    """Keeps several folders, as `claimed` keeps one; a folder that has several names, e.g. a link, is claimed once.

    Args:
        *folders: Folders, each as `claimed` takes it.

    Yields:
        Each folder once, by the first of its names.

    Raises:
        AimeGymError: For the same reasons as `claimed`.
    """
    named: dict[Path, Path] = {}
    for folder in folders:
        named.setdefault(folder.resolve(), folder)
    with ExitStack() as stack:
        yield [stack.enter_context(claimed(folder)) for folder in named.values()]


def _lock(folder: Path) -> FileLock:
    lock = FileLock(folder / LOCK, thread_local=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise AimeGymError(
            f"{folder} is being written to by another call{_holder(folder)}: wait for it, or choose another folder."
        ) from error
    except (FileExistsError, NotADirectoryError) as error:
        file = next((path for path in (folder, *folder.parents) if path.is_file()), folder)
        raise AimeGymError(f"Expected a folder to write to; {file} is a file.") from error
    (folder / LOCK).write_text(f"{os.getpid()} on {platform.node()}")
    return lock


def _holder(folder: Path) -> str:
    """Which process that is, as far as it has said so."""
    with suppress(OSError):
        if said := (folder / LOCK).read_text():
            return f" (process {said})"
    return ""


def _remove_stale(folder: Path) -> None:
    for path in folder.rglob(".*.tmp"):
        with suppress(OSError):
            if TEMPORARY.fullmatch(path.name) and time.time() - path.stat().st_mtime > _STALE:
                path.unlink()


def available_cores() -> int:
    """The CPUs that this process may run on, which are fewer than the machine's under `taskset` or a batch system."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


Workers = int | Literal["ray"]
"""How many processes of this machine work, or ``"ray"``: all cores of the Ray cluster that it belongs to."""


def run_in_processes(
    function: Callable[[Any], Any],
    jobs: Mapping[str, Any],
    workers: Workers,
    advance: Callable[[], None] = lambda: None,
    envs: Sequence[str] = (),
) -> list[Any]:
    """Runs jobs side by side, in processes that end with this one, however it ends.

    An error of a job, or Ctrl-C, ends the others at once; what they have written whole stays. On a Ray cluster, all
    machines are to have the same files under the same paths.

    Args:
        function: At the top level of a module of this package, as other processes need it. They do not run the
            user's script.
        jobs: Name -> the function's argument, which can be pickled.
        workers: Processes, at most, each of one thread and silent. With one, the jobs run here, with the threads and
            the terminal of the caller; with more, a single job has a process of its own, too. See `Workers`.
        advance: Called after each job.
        envs: Ids of Gymnasium envs that the jobs make, which the script may have registered.

    Returns:
        What the function returned, in the order of the jobs.

    Raises:
        ChildProcessError: If a process died; names its job.
        AimeGymError: If there is no Ray cluster to work on.
    """
    if workers == "ray":
        return _run_on_ray(function, jobs, advance, _pickle_specs(envs)) if jobs else []
    if workers <= 1 or not jobs:
        results = []
        for job in jobs.values():
            results.append(function(job))
            advance()
        return results
    context = multiprocessing.get_context("spawn")
    alive, life = context.Pipe(duplex=False)  # the former tells the workers when the latter is closed, or this one dies
    pids: Any = context.RawArray("q", len(jobs))  # who works on which job
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _start_worker, (alive, pids, _pickle_specs(envs)))
    processes: list[Any] = []
    try:
        with _without_main():
            futures = [pool.submit(_run_job, function, index, job) for index, job in enumerate(jobs.values())]
            pool.submit(int)  # the pool watches only those processes that had begun before its latest submission
        processes = multiprocessing.active_children()
        ended: SimpleQueue[Future] = SimpleQueue()  # as futures' own `wait`, interrupted, leaves them locked for ever
        for future in futures:
            future.add_done_callback(ended.put)
        for _ in futures:
            while (done := _next(ended)) is None:
                if any(process.exitcode is not None for process in processes):
                    pool.submit(int)  # for that reason, too
            done.result()
            advance()
        pool.shutdown()
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        pool.shutdown()  # all processes have ended then
        ends = {process.pid: process.exitcode for process in processes}
        begun = {name: pid for name, pid in zip(jobs, pids, strict=True) if pid}
        raise ChildProcessError(_obituary(begun, ends)) from error
    finally:
        life.close()
        pool.shutdown(cancel_futures=True)
        alive.close()


def _next(ended: SimpleQueue[Future]) -> Future | None:
    """The next one, if it comes within a second."""
    with suppress(Empty):
        return ended.get(timeout=1.0)
    return None


def join_cluster() -> Any:
    """Ray, with this process in the cluster that runs; raises an `AimeGymError` where there is none."""
    import ray

    if not ray.is_initialized():
        try:
            ray.init("auto", log_to_driver=False)
        except ConnectionError as error:
            told = "--workers ray works on a Ray cluster that runs already: `ray start --head` begins one, and says how"
            raise AimeGymError(f"{told} other machines join. On this machine alone give --workers a number.") from error
    return ray


def _run_on_ray(
    function: Callable[[Any], Any], jobs: Mapping[str, Any], advance: Callable[[], None], specs: bytes
) -> list[Any]:
    """Each job takes one core of the cluster, and the place of another if its machine is lost."""
    ray = join_cluster()
    remote = ray.remote(_run_elsewhere)
    started = {remote.remote(function, job, os.getcwd(), specs): name for name, job in jobs.items()}
    waiting = list(started)
    try:
        while waiting:
            (ended,), waiting = ray.wait(waiting)
            ray.get(ended)
            advance()
        return ray.get(list(started))
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError) as error:
        raise ChildProcessError(_obituary({started[ended]: 1}, {})) from error
    finally:
        for job in waiting:
            ray.cancel(job, force=True)


def _run_elsewhere(function: Callable[[Any], Any], job: Any, folder: str, specs: bytes) -> Any:
    """Runs a job in the caller's folder, silently."""
    os.chdir(folder)
    _register(specs)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        return function(job)


def run_in_parallel(
    function: Callable[[Any], Any],
    jobs: Mapping[str, Any],
    workers: Workers,
    title: str,
    unit: str,
    envs: Sequence[str] = (),
) -> None:
    """Runs jobs as `run_in_processes` does, under one progress bar; with one worker each job shows its own.

    Args:
        function: See `run_in_processes`.
        jobs: See `run_in_processes`.
        workers: See `run_in_processes`.
        title: Title of the progress bar.
        unit: What the jobs are.
        envs: See `run_in_processes`.
    """
    bar = nullcontext(lambda: None) if workers == 1 else job_progress(title, len(jobs), unit)
    with bar as advance:
        run_in_processes(function, jobs, workers, advance, envs)


def make_console(**options: Any) -> Console:
    """A console whose bars show in notebooks, too, where rich's own need widgets: as a line that is written over.

    Args:
        **options: What `Console` takes.
    """
    notebook = {"force_jupyter": False, "force_terminal": True, "width": 100} if Console().is_jupyter else {}
    return Console(**options | notebook)


@contextmanager
def job_progress(title: str, total: int, unit: str) -> Iterator[Any]:
    """A progress bar; yields a function that advances it, and says at the end how many are complete."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=make_console()) as progress:
        bar = progress.add_task(title, total=total)
        try:
            yield lambda count=1: progress.advance(bar, count)
        finally:
            done = int(progress.tasks[0].completed + 1e-6)  # shares of jobs add up with rounding
            progress.console.print(f"{title}: {done} of {total} {unit} are complete.", markup=False)


@contextmanager
def _without_main() -> Iterator[None]:
    """Processes that begin meanwhile do not run the user's script, which may have no `if __name__ == "__main__"`."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _pickle_specs(envs: Sequence[str]) -> bytes:
    """What is registered under these ids, also where the script itself defines the env."""
    import cloudpickle
    import gymnasium

    names = [name.rsplit(":", 1)[-1] for name in envs]
    return cloudpickle.dumps([gymnasium.registry[name] for name in names if name in gymnasium.registry])


_pids: Any = None
"""In a worker: the number of the process that works on each job."""


def _start_worker(alive: Connection, pids: Any, specs: bytes) -> None:
    """Leaves Ctrl-C to the parent, threads to other processes and the terminal to its one progress bar."""
    global _pids
    _pids = pids
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=[alive], daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - several bars at once cannot be read
    _register(specs)


def _register(specs: bytes) -> None:
    import cloudpickle
    import gymnasium

    for spec in cloudpickle.loads(specs):
        gymnasium.registry.setdefault(spec.id, spec)


def _end_with(alive: Connection) -> None:
    alive.poll(None)  # until the other end is closed
    os._exit(1)


def _run_job(function: Callable[[Any], Any], index: int, job: Any) -> Any:
    _pids[index] = os.getpid()
    result = function(job)
    _pids[index] = 0
    return result


def _obituary(begun: Mapping[str, int], ends: Mapping[int | None, int | None]) -> str:
    """Who died: jobs that were begun -> their processes, and how processes ended; the pool terminates the others."""
    own = {name: ends.get(pid) for name, pid in begun.items() if ends.get(pid) not in (0, -signal.SIGTERM)}
    died = own or dict.fromkeys(begun, -signal.SIGTERM)
    if not died:
        return "A process ended before it began to work."
    code = next(iter(died.values()))
    how = "" if code is None else f" by {signal.Signals(-code).name}" if code < 0 else f" with exit code {code}"
    memory = " Where memory is short, take fewer --workers." if code == -getattr(signal, "SIGKILL", 9) else ""
    return (
        f"The process that worked on {' or '.join(died)} was ended{how}.{memory} What is complete is kept: the same "
        "call goes on from there."
    )


_counting, _mine = threading.Lock(), threading.local()

_inside, _usual = 0, 1  # how many Python threads are inside, and the torch threads there were before the first


class one_thread(ContextDecorator):
    """Runs what is inside on one torch thread, if `wanted`; also decorates functions. Afterwards all is as before.

    It is faster with few slots, and safe where Gymnasium's `AsyncVectorEnv` makes an env and then forks: OpenMP's
    threads do not survive a fork, and who waits for them in the child waits for ever. Where several Python threads are
    inside, the number that torch gives to new threads is 1 until the next of them leaves.

    Args:
        wanted: Whether to do anything.
    """

    def __init__(self, wanted: bool = True):
        self._wanted, self._entered = wanted, False

    def _recreate_cm(self) -> one_thread:  # each call of a decorated function enters its own
        return one_thread(self._wanted)

    def __enter__(self) -> None:
        global _inside, _usual
        self._entered = self._wanted and not getattr(_mine, "inside", False)
        if self._entered:
            import torch  # imported late: it takes seconds

            with _counting:
                if not _inside:
                    _usual = torch.get_num_threads()
                _inside += 1
                torch.set_num_threads(1)
            _mine.inside = True

    def __exit__(self, *error: object) -> None:
        global _inside
        if self._entered:
            import torch

            _mine.inside = False
            with _counting:
                _inside -= 1
                torch.set_num_threads(_usual)


@contextmanager
def so_many_threads(count: int | None) -> Iterator[None]:
    """Runs what is inside on so many torch threads, or on the caller's where None or 0; afterwards all is as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Torch draws from the seed inside, on the CPU and on `device`; afterwards its generators are as before."""
    import torch

    gpus = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def generators_kept() -> Iterator[None]:
    """What draws inside from the generators of Python, NumPy and torch, as SB3's agents do, leaves them as before."""
    import torch

    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002
