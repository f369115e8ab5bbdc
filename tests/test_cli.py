"""The command line: what it lists, what it refuses, and with which exit code; and the doctor."""

import errno
import importlib.metadata
import inspect
import os
import re
import signal
import subprocess
import sys
import time
from ctypes.util import find_library
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import aime_gym
from aime_gym.cli import COMMANDS, Command, flags_of, in_flags, main, negated
from aime_gym.commands import doctor
from aime_gym.data.trajectories import save_trajectory, write_metadata
from aime_gym.files import write_atomically
from aime_gym.gl import what_lacks
from aime_gym.world_model import checkpoint, packed
from aime_gym.world_model.fast_dynamics import choose_dtype
from tests.tiny_model import make_tiny_model


def run(*words: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "aime_gym", *words], stderr=subprocess.PIPE, text=True, timeout=120, **options
    )


def test_help_lists_every_command():
    result = run("--help", stdout=subprocess.PIPE)
    assert result.returncode == 0
    assert all(f"\n  {name} " in result.stdout for name in COMMANDS)


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == aime_gym.__version__


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    dataclass = getattr(importlib.import_module(COMMANDS[name].module), COMMANDS[name].dataclass)
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert dataclass.__doc__.split()[0] in told
    lines = [line.strip(" \u2502") for line in told.splitlines()]
    listed = {flag for line in lines if line.startswith("-") for flag in re.findall(r"--[a-z][\w.-]*", line)}
    flags = flags_of(COMMANDS[name].module, COMMANDS[name].dataclass)
    assert listed == {"--help", *flags, *(negated(flag) for flag, switch in flags.items() if switch)}


@pytest.mark.parametrize("name", ["collect", "imitate"])
def test_help_breaks_no_sentence(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")
    with pytest.raises(SystemExit):
        main([name, "--help"])
    told = capsys.readouterr().out
    dataclass = getattr(importlib.import_module(COMMANDS[name].module), COMMANDS[name].dataclass)
    texts = re.findall(
        r'^    """(.*?)"""', inspect.getsource(dataclass).partition("def run")[0], re.DOTALL | re.MULTILINE
    )
    texts = [" ".join(text.split()) for text in texts if "Examples:" not in text]
    assert len(texts) > 10
    assert [text for text in texts if text not in told] == []


def test_help_waits_for_nothing_heavy():
    probe = """
import contextlib, io, sys
from aime_gym.cli import COMMANDS, main
for name in COMMANDS:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main([name, "--help"])
    print(name, *[heavy for heavy in HEAVY if heavy in sys.modules])
"""
    heavy = ("torch", "stable_baselines3", "lightning_fabric", "matplotlib", "dm_control", "mujoco", "shimmy", "jax")
    code = probe.replace("HEAVY", repr(heavy))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == list(COMMANDS), result.stdout + result.stderr


def test_no_command_prints_the_list_and_fails(capsys):
    assert main([]) == 2
    assert "usage: aime-gym COMMAND" in capsys.readouterr().out


def test_an_unknown_command_suggests_the_nearest(capsys):
    assert main(["colect"]) == 2
    assert "Did you mean 'collect'?" in capsys.readouterr().err


def test_flags_have_their_old_names_for_a_release(capsys):
    renamed = ["--uncertainty_penalty=0.1", "--max-disagreement", "0"]
    assert main(["dream", *renamed]) == 2
    told = capsys.readouterr().err
    assert "--max-doubt is more than 0" in told
    assert "--uncertainty-penalty is now called --doubt-penalty" in told


def test_envs_in_the_current_folder_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder not in ("", os.getcwd())])
    code = (
        "import gymnasium\ngymnasium.register('Near-v0', 'gymnasium.envs.classic_control:PendulumEnv', None, False, 5)"
    )
    (tmp_path / "nearby_envs.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    words = ["collect", "nearby_envs:Near-v0", "--trajectories", "1", "--workers", "1", "--out", "data"]
    assert main(words) == 0
    assert (tmp_path / "data" / "0.npz").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--versio", "Unknown option '--versio'. Did you mean '--version'? Known: --help, --version."),
        ("dram", "Unknown command 'dram'. Did you mean 'dream'?"),
        ("collect --trajectoris 3", "no flag --trajectoris. Did you mean '--trajectories'? `aime-gym collect --help`"),
        ("collect walkr", "Unknown embodiment 'walkr'. Did you mean 'walker'?"),
        ("pretrain-small reachr --rounds 1", "Unknown embodiment 'reachr'. Did you mean 'reacher'?"),
        ("dream --embodiment chetah", "Unknown embodiment 'chetah'. Did you mean 'cheetah'?"),
        ("dream cartpole --quick", "names the body by a flag: --embodiment cartpole."),
        ("pretrain walker --train.setupp=mdp", "no flag --train.setupp. Did you mean '--train.setup'?"),
        ("dream --quick=False", "--quick is a switch: write --quick or --no-quick; got False."),
        ("compare --trust false random", "--trust is a switch: write --trust or --no-trust; got false."),
        ("train data --no-tensorboard=1", "--tensorboard is a switch: write --tensorboard or --no-tensorboard; got 1."),
    ],
)
def test_a_misspelt_word_is_told_before_anything_heavy_is_imported(words, message):
    probe = f"""
import sys
from aime_gym.cli import main
code = main({words.split()!r})
print(*[name for name in ("torch", "stable_baselines3", "dm_control", "matplotlib", "tyro") if name in sys.modules])
sys.exit(code)
"""
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout.strip()) == (2, ""), result.stderr
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("pass model=, one of a, b", "pass --model, one of a, b"),
        ("pass video='play.mp4' for a film", "pass --video 'play.mp4' for a film"),
        ("pass max_steps=3, seed=0", "pass --max-steps 3, seed=0"),
        ("video is a path; got 3.", "--video is a path; got 3."),
        ("obs_type='image' needs more", "obs_type='image' needs more"),
        ("runs/model=3/x and --model=3", "runs/model=3/x and --model=3"),
    ],
)
def test_messages_of_the_library_name_flags(message, told):
    assert in_flags(message, "play", {"--model", "--video", "--max-steps"}) == told


def test_a_body_that_only_a_file_names_is_told_in_the_words_of_a_shell(tmp_path, capsys):
    data, env = tmp_path / "data", "a_package_of_mine:Env-v0"
    save_trajectory(data, 0, {"pre_action": np.zeros((9, 1), np.float32)})
    save_trajectory(data, 1, {"pre_action": np.zeros((9, 1), np.float32)})
    write_metadata(data, {"embodiment": env})
    assert main(["train", str(data), "--out", str(tmp_path / "model")]) == 2
    assert f"if you trust it, name it yourself as the embodiment: {env}." in capsys.readouterr().err
    assert main(["to-minari", str(data), "mine-v0"]) == 2
    told = capsys.readouterr().err
    assert "if you trust it, `python -c 'import a_package_of_mine, aime_gym.cli; aime_gym.cli.main()' to-minari" in told


def test_sigterm_ends_a_command_as_ctrl_c_does(tmp_path):
    """Also where a command has nothing to say of its own; tests/test_parallel.py has the ends of other processes."""
    command = ["collect", "walker", "--trajectories", "20000", "--workers", "1", "--out", str(tmp_path / "data")]
    code = f"import sys, aime_gym.cli\nsys.exit(aime_gym.cli.main({command!r}))"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 100
        while not (tmp_path / "data" / "0.npz").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        told = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert "aime-gym: Ended by SIGTERM." in told
    assert "Traceback" not in told


def test_a_misspelt_task_suggests_one_that_the_model_knows(capsys):
    assert main(["dream", "--task", "jum"]) == 2  # the body has a task jump, of which the model knows nothing
    told = capsys.readouterr().err
    assert "Unknown task of this model's heads 'jum'. Known: walk, stand, run." in told
    assert main(["dream", "--task", "wlak"]) == 2
    assert "Did you mean 'walk'?" in capsys.readouterr().err


def test_a_missing_model_is_asked_for_by_its_flag(capsys):
    assert main(["play", "--embodiment", "humanoid"]) == 2
    told = capsys.readouterr().err
    assert "pass --model, one of" in told
    assert "model=" not in told


def test_a_users_mistake_is_one_line_without_a_traceback():
    result = run("collect", "walkr")
    assert result.returncode == 2
    assert result.stderr.startswith("aime-gym: Unknown embodiment 'walkr'. Did you mean 'walker'?")
    assert result.stderr.count("\n") == 1


def test_a_file_in_the_way_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["collect", "walker", "--trajectories", "1", "--workers", "1", "--out", str(tmp_path / "file/x")]) == 2
    assert f"{tmp_path / 'file'}" in capsys.readouterr().err


@dataclass
class Failing:
    """Raises what the test wants."""

    error = RuntimeError()

    def run(self) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/data/1.npz"),
            1,
            "/data/1.npz: No space left on device. Free",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/root/x"),
            1,
            "/root/x: Permission denied. Check the perm",
        ),
        (OSError("cannot open libfoo.so"), 1, "cannot open libfoo.so."),
        (ChildProcessError("The process that worked on a was ended."), 1, "The process that worked on a was ended.\n"),
        (ImportError("No module named 'torch'"), 1, "No module named 'torch'. `aime-gym doctor` says"),
        (aime_gym.AimeGymError("expected a, got b"), 2, "expected a, got b"),
        (KeyboardInterrupt(), 130, "Interrupted."),
    ],
)
def test_exit_codes_tell_whose_fault_it_was(monkeypatch, capsys, error, code, message):
    monkeypatch.setattr(Failing, "error", error)
    monkeypatch.setattr("aime_gym.cli.COMMANDS", {"fail": Command(__name__, "Failing", "")})
    assert main(["fail"]) == code
    assert capsys.readouterr().err.startswith(f"aime-gym: {message}")


@dataclass
class Writing:
    """Writes a file."""

    out = Path()

    def run(self) -> None:
        write_atomically(self.out, "much")


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.ENOSPC, "Free some"), (errno.EDQUOT, "Free some"), (errno.EFBIG, "`ulimit -f` says")]
)
def test_a_disk_that_takes_no_more_is_the_machines_fault(tmp_path, monkeypatch, capsys, number, remedy):
    def full(file):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(Writing, "out", tmp_path / "file")
    monkeypatch.setattr("aime_gym.cli.COMMANDS", {"write": Command(__name__, "Writing", "")})
    assert main(["write"]) == 1
    told = f"aime-gym: {tmp_path / 'file'}: {os.strerror(number)} for 0.0 MB; nothing was written. {remedy} "
    assert capsys.readouterr().err.startswith(told)


def test_processes_that_train_together_say_an_error_once(monkeypatch, capsys):
    monkeypatch.setattr(Failing, "error", aime_gym.AimeGymError("expected a, got b"))
    monkeypatch.setattr("aime_gym.cli.COMMANDS", {"fail": Command(__name__, "Failing", "")})
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert main(["fail"]) == 2
    assert capsys.readouterr().err == "aime-gym: expected a, got b\n"


def test_a_defect_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("aime_gym.cli.COMMANDS", {"fail": Command(__name__, "Failing", "")})
    with pytest.raises(RuntimeError):
        main(["fail"])


def test_a_reader_that_leaves_is_no_traceback():
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as closed_pipe:
        result = run("--help", stdout=closed_pipe)
    assert (result.returncode, result.stderr) == (1, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_under_stdout_is_told():
    with open("/dev/full", "wb") as full:
        result = run("--help", stdout=full)
    assert result.returncode == 1
    assert result.stderr.startswith("aime-gym: No space left on device.")
    assert "Traceback" not in result.stderr


# --- the doctor

CONSTRAINTS = (Path(__file__).parents[1] / ".ci/constraints.txt").read_text()


@pytest.fixture
def models(tmp_path, monkeypatch):
    """An own folder of bundled models."""
    monkeypatch.setattr(checkpoint, "PRETRAINED", tmp_path)
    return tmp_path


@pytest.mark.slow  # it tries each library of GL in a process of its own
def test_the_doctor_finds_that_the_main_job_can_run(models, capsys):
    make_tiny_model(models / "walker-state")
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert "`aime-gym dream` can run here." in told
    for what in ("python", "mujoco", "threads", "bfloat16", "GL egl", "GL osmesa", "video", "walker-state"):
        assert what in told


def test_the_doctor_runs_where_torch_does_not(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch is broken')")
    search = os.pathsep.join(filter(None, [str(tmp_path), *sys.path]))
    result = run("doctor", stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": search, "COLUMNS": "200"})
    assert result.returncode == 1
    assert "ImportError: libtorch is broken" in result.stdout
    assert "Traceback" not in result.stderr


def test_no_model_and_a_broken_model_are_missing(models):
    assert [finding.state for finding in doctor.check_models()] == ["missing"]
    make_tiny_model(models / "walker-state")
    assert [finding.state for finding in doctor.check_models()] == ["ok"]
    weights = models / "walker-state/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert [finding.state for finding in doctor.check_models()] == ["missing"]


@pytest.mark.parametrize(
    ("version", "state"), [("3.17.0", "ok"), ("4.0.0", "missing"), ("3.2.9", "missing"), ("3.18.0+cpu", "ok")]
)
def test_versions_out_of_the_supported_range_are_flagged(version, state):
    finding = doctor.judge("mujoco", "mujoco>=3.3.2,<4", version, version)
    assert finding.state == state
    assert bool(finding.remedy) == (state != "ok")


def test_versions_that_no_test_has_met_are_told():
    assert doctor.judge("mujoco", "mujoco>=3.3.2,<4", "3.17.0", "3.17.0").found == "3.17.0"
    assert "untested: newer than 3.17.0" in doctor.judge("mujoco", "mujoco>=3.3.2,<4", "3.18.1", "3.18.1").found
    assert "does not work with MuJoCo 4" in doctor.judge("mujoco", "mujoco>=3.3.2,<4", "4.0.0", "4.0.0").found
    assert "untested" not in doctor.judge("python", "python>=3.11", "3.13.7", "3.13.7 on Linux").found
    assert "untested" in doctor.judge("python", "python>=3.11", "3.14.0", "3.14.0 on Linux").found
    pins = dict(line.lower().replace("_", "-").split("==") for line in CONSTRAINTS.splitlines() if "==" in line)
    tested = {name: version for name, version in doctor.TESTED.items() if name != "python"}
    assert tested == {name: pins[name.replace("_", "-")] for name in tested}


def test_without_dm_control_the_doctor_says_how_to_install_it(monkeypatch):
    """Also on Python 3.13 and newer, where the package cannot ask for it: it asks for labmaze, which has no wheel."""

    def version(name):
        if name == "dm_control":
            raise importlib.metadata.PackageNotFoundError
        return "99"

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    line = "dm_control>=1.0.30; python_version < '3'"
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: [line, "lxml; python_version > '3'"])
    assert not [*doctor.check_extras()]  # whatever the marker of what is not of an extra
    finding, _ = doctor.check_packages()
    assert (finding.what, finding.state) == ("dm_control", "missing")
    assert finding.remedy.startswith("pip install")


def test_every_runtime_dependency_is_checked():
    checked = {finding.what for finding in doctor.check_packages()}
    assert {"torch", "gymnasium", "dm_control", "mujoco", "stable-baselines3", "tyro"} <= checked
    assert "pytest" not in checked


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other backends")
def test_what_a_backend_lacks_is_told_in_words(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert doctor.rendering_error(doctor.start_rendering("glfw")) == "there is no display"
    monkeypatch.setattr("aime_gym.gl.ctypes.util.find_library", lambda name: None)
    assert what_lacks("osmesa") == "the library OSMesa is not installed"


@pytest.mark.skipif(sys.platform != "linux" or find_library("OSMesa") is not None, reason="OSMesa is here")
def test_a_picture_by_a_library_that_is_not_there_says_so():
    probe = "from tests.test_rendering import scene, MuJoCoRenderer; MuJoCoRenderer(scene(), 8, 8)"
    options = {"capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([sys.executable, "-c", probe], env={**os.environ, "MUJOCO_GL": "osmesa"}, **options)
    assert "does not work here (the library OSMesa is not installed). Install one" in done.stderr


@pytest.mark.parametrize(
    ("speedup", "told"),
    [
        (1.83, "are 1.8 times as fast as in float32, so precision 'auto' has it used"),
        (1.02, "are 1.0 times as fast as in float32, so precision 'auto' has it not used"),
        (0.04, "are 25.0 times as slow as in float32, so precision 'auto' has it not used"),
    ],
)
def test_precision_follows_the_measured_speed_of_bfloat16(monkeypatch, speedup, told):
    """Not what the processor says of itself: some emulate what they declare, and some systems do not tell."""
    monkeypatch.setattr(packed, "bf16_speedup", lambda: speedup)
    assert told in {finding.what: finding.found for finding in doctor.check_torch()}["bfloat16"]
    assert (choose_dtype("auto", 1024) == torch.bfloat16) == (speedup > 1.2)
    assert choose_dtype("auto", 1) == torch.float32
    assert (packed.resolve_precision("auto", "cpu") == "bf16-mixed") == (speedup > 1.2)


def test_the_speed_of_bfloat16_is_measured_once():
    began = time.process_time()
    speedup = packed.bf16_speedup()
    assert 0.001 < speedup < 100
    assert time.process_time() - began < 1
    assert packed.bf16_speedup() == speedup


def test_what_single_commands_need_is_offered(monkeypatch):
    def version(name):
        if name == "pygame":
            raise importlib.metadata.PackageNotFoundError
        return "0.1"

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    findings = {finding.what: finding for finding in doctor.check_extras()}
    assert findings["pygame"].state == "not needed"
    assert "aime-gym play" in findings["pygame"].found
    assert findings["pygame"].remedy == "pip install -c .ci/constraints.txt -e '.[play]'"
    assert findings["minari"].state == "warning"  # too old, but nothing else needs it
    assert findings["minari"].remedy.endswith("'.[minari]'")


def test_a_backend_that_takes_its_process_along_is_a_finding(monkeypatch):
    monkeypatch.setattr(doctor, "_RENDER", "import os; os.abort()")
    assert doctor.rendering_error(doctor.start_rendering("egl")) == "ended with code -6"


def test_a_backend_that_hangs_is_a_finding(monkeypatch):
    monkeypatch.setattr(doctor, "_RENDER", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "GL_TIMEOUT", 0.2)
    assert doctor.rendering_error(doctor.start_rendering("egl")) == "no picture within 0.2 s"


@pytest.mark.parametrize(
    ("chosen", "broken", "state", "remedy"),
    [
        ("egl", (), "ok", ""),
        ("egl", ("egl",), "warning", "export MUJOCO_GL=osmesa"),
        ("off", (), "warning", "export MUJOCO_GL=egl"),
        ("egl", ("egl", "osmesa", "glfw"), "warning", "one of the lines above"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other backends")
def test_the_backend_in_use_is_judged(monkeypatch, chosen, broken, state, remedy):
    monkeypatch.setenv("MUJOCO_GL", chosen)
    monkeypatch.setattr(doctor, "start_rendering", lambda backend: backend)
    monkeypatch.setattr(doctor, "rendering_error", lambda backend: "broken" if backend in broken else None)
    *backends, rendering = doctor.check_gl()
    assert (rendering.state, rendering.remedy) == (state, remedy)
    assert all(finding.remedy for finding in backends if finding.found == "broken")


def test_a_failing_check_does_not_end_the_examination(monkeypatch):
    def fail():
        raise RuntimeError("surprise\nsecond line")

    for check in ("check_torch", "check_gl", "check_models"):
        monkeypatch.setattr(doctor, check, fail)
    findings = {finding.what: finding for finding in doctor.examine()}
    assert findings["torch"].state == "missing"  # the last finding of that name: the failed check
    assert findings["rendering"] == doctor.Finding("rendering", "missing", "RuntimeError: surprise", doctor.INSTALL)
    assert "current folder" in findings


def test_a_folder_without_room_is_missing(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert [finding.state for finding in doctor.check_folder()] == ["ok"]
    monkeypatch.setattr(doctor, "NEEDED_SPACE", 1e18)
    assert [finding.state for finding in doctor.check_folder()] == ["missing"]
