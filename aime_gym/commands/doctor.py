"""`aime-gym doctor`: what is installed, what works on this machine, and what to do about the rest."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

from packaging.requirements import Requirement
from packaging.version import Version
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aime_gym.flags import Options
from aime_gym.gl import DM_CONTROL
from aime_gym.parallel import available_cores

DISTRIBUTION = "aime-gym"
INSTALL = "pip install -c .ci/constraints.txt -e ."
EXTRAS = {
    "play": "the window of `aime-gym play`",
    "minari": "data sets of Minari",
    "hdf5": "logs in HDF5 files",
    "parquet": "logs in Parquet files, also LeRobot's",
    "ray": "`--workers ray`",
    "strangers": "`aime-gym strangers`",
}
"""What can be installed beside the package, and what for."""
TESTED = MappingProxyType(
    {
        "python": "3.13",
        "dm_control": "1.0.50",
        "gymnasium": "1.4.0",
        "mujoco": "3.17.0",
        "numpy": "2.4.6",
        "shimmy": "2.0.1",
        "stable-baselines3": "2.9.2",
        "torch": "2.13.0",
    }
)
"""The newest versions that the tests have met of what decides most."""
BEYOND = MappingProxyType({"mujoco": "; dm_control, up to the newest that is tested, does not work with MuJoCo 4"})
"""What is known of versions newer than that."""
NEEDED_SPACE = 200e6
"""Bytes that a run of the main job may write."""
GL_TIMEOUT = 60.0
GL_MENDS = {
    "egl": "apt-get install libegl1 libegl-mesa0, then MUJOCO_GL=egl",
    "osmesa": "apt-get install libosmesa6, then MUJOCO_GL=osmesa",
    "glfw": "needs a display (DISPLAY)",
    "cgl": "needs a desktop session",
}
_RENDER = """
from aime_gym.envs.real import RealEnv
from aime_gym.envs.rendering import choose_backend, what_lacks
if lacking := what_lacks(choose_backend()):
    raise SystemExit(lacking)
env = RealEnv("walker", render_mode="rgb_array", width=64, height=64)
try:
    env.reset(seed=0)
    frame = env.render()
except Exception as error:
    raise SystemExit(str(error.__cause__ or error))
if frame.shape != (64, 64, 3) or frame.min() == frame.max():
    raise SystemExit("the picture is empty")
"""


class Finding(NamedTuple):
    """One line of the report."""

    what: str
    state: Literal["ok", "not needed", "warning", "missing"]
    """``"missing"``: the main job cannot run; ``"warning"``: it can, but something else cannot, or not well;
    ``"not needed"``: absent, and something else does its work."""
    found: str
    remedy: str = ""
    """What to do about it."""


@dataclass
class Doctor(Options):
    """Say what is installed, what works on this machine, and what to do about the rest.

    The exit code is 0 where the main job (`aime-gym dream`) can run and 1 elsewhere.
    """

    def run(self) -> None:
        """Prints the findings.

        Raises:
            SystemExit: With code 1, if the main job cannot run.
        """
        console = Console()
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("", "what", "found", "what to do"):
            table.add_column(column, overflow="fold")
        styles = {"ok": "green", "not needed": "dim", "warning": "yellow", "missing": "bold red"}
        findings = list(examine())
        for what, state, found, remedy in findings:
            table.add_row(Text(state, styles[state]), Text(what), Text(found), Text(remedy))
        console.print(table)
        missing = [finding.what for finding in findings if finding.state == "missing"]
        if missing:
            console.print(f"`aime-gym dream` cannot run here. In the way: {', '.join(missing)}.", highlight=False)
            raise SystemExit(1)
        console.print("`aime-gym dream` can run here.", highlight=False)


def examine() -> Iterator[Finding]:
    """All findings. A check that itself fails is a finding too: the doctor is for broken installations."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("python", check_python),
        ("packages", check_packages),
        ("extras", check_extras),
        ("torch", check_torch),
        ("rendering", check_gl),
        ("video", check_ffmpeg),
        ("bundled models", check_models),
        ("current folder", check_folder),
    ]
    for what, check in checks:
        try:
            yield from check()
        except Exception as error:
            lines = str(error).splitlines() or [""]
            yield Finding(what, "missing", f"{type(error).__name__}: {lines[0]}", INSTALL)


def check_python() -> Iterator[Finding]:
    """The interpreter, against the oldest supported one."""
    version = platform.python_version()
    where = f"{version} on {platform.system()} {platform.machine()}"
    needed = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"]
    yield judge("python", f"python{needed}", version, where)


def check_packages() -> Iterator[Finding]:
    """Every runtime dependency, against the supported range."""
    for line in importlib.metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(line)
        by_hand = requirement.name == "dm_control"  # on Python 3.13 and newer
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}) and not by_hand:
            continue
        remedy = f"{DM_CONTROL}; dreams alone need none" if by_hand else INSTALL
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(requirement.name, "missing", f"not installed, supported: {requirement.specifier}", remedy)
        else:
            yield judge(requirement.name, line, version, version)


def check_extras() -> Iterator[Finding]:
    """Packages that single commands need: what they bring, and how to install them."""
    for extra, gain in EXTRAS.items():
        for requirement in map(Requirement, importlib.metadata.requires(DISTRIBUTION) or []):
            marker = requirement.marker
            if not marker or marker.evaluate({"extra": ""}) or not marker.evaluate({"extra": extra}):
                continue
            remedy = f"{INSTALL.removesuffix('.')}'.[{extra}]'"
            try:
                version = importlib.metadata.version(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                yield Finding(requirement.name, "not needed", f"not installed; for {gain}", remedy)
            else:
                found = judge(requirement.name, f"{requirement.name}{requirement.specifier}", version, version)
                yield found if found.state == "ok" else found._replace(state="warning", remedy=remedy)


def judge(what: str, requirement: str, version: str, found: str) -> Finding:
    """Compares an installed version with the supported range.

    Args:
        what: The finding's name.
        requirement: A requirement like ``"mujoco>=3.3.2,<4"``.
        version: The installed version.
        found: What to tell; whether the version is newer than those that were tested is added.
    """
    supported = Requirement(requirement).specifier
    tested = Version(TESTED.get(what, version)).release
    if Version(version).release[: len(tested)] > tested:
        found += f" (untested: newer than {TESTED[what]}{BEYOND.get(what, '')})"
    # Builds such as 2.13.0+cpu count as 2.13.0; pre-releases are judged by their number.
    if supported.contains(version, prereleases=True):
        return Finding(what, "ok", found)
    remedy = INSTALL if what != "python" else "make the virtual environment with another Python"
    return Finding(what, "missing", f"{found}, supported: {supported}", remedy)


def check_torch() -> Iterator[Finding]:
    """Threads, GPU, and whether bfloat16 pays, which is measured."""
    import torch

    from aime_gym.world_model.packed import bf16_is_fast, bf16_speedup

    threads, cores = torch.get_num_threads(), available_cores()
    if threads > cores:
        yield Finding("threads", "warning", f"{threads} on {cores} cores", f"export OMP_NUM_THREADS={cores}")
    else:
        yield Finding("threads", "ok", f"torch uses {threads} of {cores} cores")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none (not needed)"
    yield Finding("GPU", "ok", gpu)

    speedup = bf16_speedup()
    pace = f"{speedup:.1f} times as fast as" if speedup >= 1 else f"{1 / speedup:.1f} times as slow as"
    used = "used" if bf16_is_fast() else "not used"
    yield Finding("bfloat16", "ok", f"matrix products are {pace} in float32, so precision 'auto' has it {used}")


def check_gl() -> Iterator[Finding]:
    """The GL backends, each in a process of its own: a bad one can take its process along."""
    from aime_gym.errors import AimeGymError
    from aime_gym.gl import choose_backend

    backends = {"darwin": ("cgl", "glfw"), "win32": ("glfw",)}.get(sys.platform, ("egl", "osmesa", "glfw"))
    processes = {backend: start_rendering(backend) for backend in backends}
    errors = {backend: rendering_error(process) for backend, process in processes.items()}
    works = [backend for backend, error in errors.items() if error is None]
    for backend, error in errors.items():
        if error is None:
            yield Finding(f"GL {backend}", "ok", "renders")
        else:
            yield Finding(f"GL {backend}", "not needed" if works else "warning", error, GL_MENDS[backend])
    try:
        chosen = choose_backend()
    except AimeGymError as error:
        yield Finding("rendering", "warning", str(error), f"export MUJOCO_GL={works[0]}" if works else "")
        return
    if chosen in works:
        yield Finding("rendering", "ok", f"with {chosen}")
    elif works:
        yield Finding("rendering", "warning", f"{chosen} does not work", f"export MUJOCO_GL={works[0]}")
    else:
        yield Finding("rendering", "warning", "no backend works: no pictures, all else runs", "one of the lines above")


def start_rendering(backend: str) -> subprocess.Popen[str]:
    """Renders one frame of the walker with `backend` in a new process, whose exit code tells whether it worked."""
    return subprocess.Popen(
        [sys.executable, "-c", _RENDER],
        env={**os.environ, "MUJOCO_GL": backend},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def rendering_error(process: subprocess.Popen[str]) -> str | None:
    """Waits for `start_rendering`; the last line it said if it failed, else None."""
    try:
        _, stderr = process.communicate(timeout=GL_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"no picture within {GL_TIMEOUT:g} s"
    if process.returncode == 0:
        return None
    lines = stderr.strip().splitlines()
    return textwrap.shorten(lines[-1], 100, placeholder=" ...") if lines else f"ended with code {process.returncode}"


def check_ffmpeg() -> Iterator[Finding]:
    """The program that encodes the videos of reports."""
    import imageio_ffmpeg

    try:
        program = imageio_ffmpeg.get_ffmpeg_exe()
        version = imageio_ffmpeg.get_ffmpeg_version()
    except (RuntimeError, OSError) as error:
        remedy = "apt-get install ffmpeg, or pip install imageio-ffmpeg"
        yield Finding("video", "warning", str(error).strip().splitlines()[0], remedy)
    else:
        yield Finding("video", "ok", f"ffmpeg {version} ({Path(program).name})")


def check_models() -> Iterator[Finding]:
    """The bundled models: their size, and whether they load."""
    from aime_gym.errors import AimeGymError
    from aime_gym.world_model.checkpoint import bundled_models, load_pretrained_model

    names = bundled_models()
    if not names:
        remedy = f"a clone has them: {INSTALL}; or give --model"
        yield Finding("bundled models", "missing", "none", remedy)
    for name in names:
        try:
            model = load_pretrained_model(name)
        except AimeGymError as error:
            yield Finding(f"model {name}", "missing", str(error), "git checkout the folder, or install again")
            continue
        size = sum(file.stat().st_size for file in Path(str(model.folder)).rglob("*") if file.is_file())
        tasks = ", ".join(model.heads.tasks) if model.heads else "no reward heads"
        yield Finding(f"model {name}", "ok", f"{size / 1e6:.1f} MB, loads; {tasks}")


def check_folder() -> Iterator[Finding]:
    """Room and the right to write where the commands would write by default."""
    folder = Path.cwd()
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        yield Finding("current folder", "missing", f"{folder} cannot be written", "go to another one, or give --out")
    elif free < NEEDED_SPACE:
        yield Finding("current folder", "missing", f"{free / 1e6:.0f} MB free", "free some space, or give --out")
    else:
        yield Finding("current folder", "ok", f"{free / 1e9:.1f} GB free")
