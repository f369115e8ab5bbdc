"""The training loop, its callbacks and the prediction error."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from aime_gym.data.dataset import TrajectoryDataset, WindowSampler
from aime_gym.errors import AimeGymError
from aime_gym.files import write_atomically
from aime_gym.observations import to_tensors
from aime_gym.training.callbacks import Checkpoint, EarlyStopping, Evaluation, JsonLog, ProgressBar, TensorBoardLog
from aime_gym.training.model_folder import prediction_error
from aime_gym.training.trainer import Callback, Trainer


def make_dataset(lengths=(30, 40), dim=3):
    rng = np.random.default_rng(0)
    return TrajectoryDataset(
        [
            {
                "position": rng.normal(size=(length, dim)).astype(np.float32),
                "pre_action": rng.uniform(-1, 1, (length, 1)).astype(np.float32),
            }
            for length in lengths
        ]
    )


def noisy_loss(module, batch):
    """Depends on the weights, the batch and torch's random numbers."""
    noise = torch.randn_like(batch["position"])
    loss = (module(batch["position"] + 0.1 * noise) - batch["position"]).square().mean()
    return loss, {"mean": loss.detach()}


def make_trainer(folder: Path, max_updates=6, loss=noisy_loss, callbacks=None, schedule="cosine"):
    torch.manual_seed(0)
    module = nn.Linear(3, 3)
    sampler = WindowSampler(make_dataset(), 4, 5, seed=(0,), names=["position"])
    if callbacks is None:
        callbacks = [Checkpoint(folder, every_updates=1)]
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    return Trainer(module, optimizer, sampler, loss, max_updates, schedule=schedule, callbacks=callbacks)


class StopAt(Callback):
    """Stops, fails or interrupts at an update."""

    def __init__(self, update, action=lambda: None):
        self.update, self.action = update, action

    def _on_update_end(self):
        if self.trainer.update == self.update:
            self.action()
            return False
        return True


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path):
    unbroken = make_trainer(tmp_path / "a")
    unbroken.train()

    broken = make_trainer(tmp_path / "b")
    broken.callbacks += (StopAt(3, interrupt),)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert broken.update == 3
    assert broken.status == "interrupted"

    torch.rand(7)  # other random numbers were drawn in between
    resumed = make_trainer(tmp_path / "b")
    resumed.callbacks += (StopAt(-1),)
    resumed.load(tmp_path / "b" / "last.pt")
    assert resumed.update == 3
    resumed.train()

    for name, weight in unbroken.module.state_dict().items():
        assert torch.equal(weight, resumed.module.state_dict()[name])
    assert unbroken.loss == resumed.loss
    assert resumed.learning_rate == pytest.approx(0, abs=1e-12)  # the cosine's end


def test_ctrl_c_in_the_last_evaluation_lets_it_end_and_saves(tmp_path):
    def score(module):
        interrupt()
        return {"nmse": 1.0}

    trainer = make_trainer(tmp_path, callbacks=[Evaluation(score, every=100), Checkpoint(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    done = make_trainer(tmp_path, callbacks=[Evaluation(scripted([]), every=100), Checkpoint(tmp_path)])
    done.load(tmp_path / "last.pt")
    done.train()  # nothing is left to do
    assert (done.status, done.update) == ("finished", 6)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path):
    def explode(module, batch):
        loss, metrics = noisy_loss(module, batch)
        return (loss * torch.nan if trainer.update == 3 else loss), metrics

    trainer = make_trainer(tmp_path, loss=explode)
    with pytest.raises(AimeGymError, match=r"Update 4 .*nan.*last good checkpoint is .*last\.pt"):
        trainer.train()
    survivor = make_trainer(tmp_path)
    survivor.load(tmp_path / "last.pt")
    assert survivor.update == 3
    assert torch.equal(survivor.module.weight, trainer.module.weight)
    assert survivor.module.weight.isfinite().all()
    survivor.train()
    assert survivor.update == 6


def test_an_infinite_gradient_under_a_finite_loss_stops_too(tmp_path):
    trainer = make_trainer(tmp_path, loss=lambda module, batch: ((module.weight * 0).sqrt().sum(), {}))
    with pytest.raises(AimeGymError, match="gradient"):
        trainer.train()
    assert trainer.module.weight.isfinite().all()


@pytest.mark.parametrize("failing", ["os.fsync", "os.replace"])
def test_a_full_disk_is_a_clear_error_and_leaves_the_old_checkpoint(tmp_path, monkeypatch, failing):
    trainer = make_trainer(tmp_path, max_updates=2)
    trainer.train()
    before = (tmp_path / "last.pt").read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    again = make_trainer(tmp_path, max_updates=4)
    with monkeypatch.context() as patch:
        patch.setattr(failing, full)
        with pytest.raises(OSError, match=r"No space left .* intact: .*last\.pt"):
            again.train()
    assert (tmp_path / "last.pt").read_bytes() == before
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_checkpoint_killed_while_being_written_leaves_the_previous_one(tmp_path):
    path = tmp_path / "last.pt"
    write_atomically(path, b"good")
    child = os.fork()
    if child == 0:  # dies after the bytes are written and before they have their name
        os.fsync = lambda number: os._exit(9)  # type: ignore[assignment]
        write_atomically(path, b"half")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9
    assert path.read_bytes() == b"good"


def test_a_corrupt_or_foreign_checkpoint_is_named(tmp_path):
    trainer = make_trainer(tmp_path, max_updates=1)
    trainer.train()
    path = tmp_path / "last.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AimeGymError, match=r"last\.pt cannot be read"):
        make_trainer(tmp_path).load(path)
    path.write_bytes(whole)
    other = make_trainer(tmp_path)
    other.module.register_parameter("extra", nn.Parameter(torch.zeros(1)))
    with pytest.raises(AimeGymError, match="extra"):
        other.load(path)
    torch.save([1, 2], path)
    with pytest.raises(AimeGymError, match=r"last\.pt holds a list; expected a dict"):
        make_trainer(tmp_path).load(path)
    torch.save({"module": [1]}, path)
    with pytest.raises(AimeGymError, match=r"last\.pt is not of this run"):
        make_trainer(tmp_path).load(path)
    with pytest.raises(AimeGymError, match=r"no checkpoint .*missing\.pt"):
        make_trainer(tmp_path).load(tmp_path / "missing.pt")


def scripted(scores):
    iterator = iter(scores)
    return lambda module: {"nmse": next(iterator)}


def test_early_stop_waits_for_its_patience_and_the_best_is_kept(tmp_path):
    def hooks():
        scores = scripted([0.5, 0.3, 0.4, 0.35, 0.2])
        return [Evaluation(scores, every=1), EarlyStopping(patience=2), Checkpoint(tmp_path, every_updates=100)]

    trainer = make_trainer(tmp_path, max_updates=50, callbacks=hooks())
    trainer.train()
    assert trainer.update == 4  # 0.4 and 0.35 do not beat 0.3
    assert trainer.status == "finished"
    best = make_trainer(tmp_path, callbacks=hooks())
    best.load(tmp_path / "best.pt")
    assert best.update == 2
    assert best.callbacks[2].best_score == 0.3
    done = make_trainer(tmp_path, max_updates=50, callbacks=hooks())
    done.load(tmp_path / "last.pt")
    done.train()  # a finished run stays finished
    assert done.update == 4


def test_logs_average_metrics_and_a_resumed_log_has_no_line_twice(tmp_path):
    def hooks(stop):
        log = JsonLog(tmp_path / "log.jsonl", every=2)
        # The checkpoint is of update 3; lines up to update 4 are on disk when the run dies at 4.
        return [Evaluation(scripted([1.0] * 9), every=4), log, Checkpoint(tmp_path, every_updates=3), StopAt(stop)]

    losses = []

    class Record(Callback):
        def _on_update_end(self):
            losses.append(self.trainer.loss)
            return True

    def die():
        raise RuntimeError("power cut")

    trainer = make_trainer(tmp_path, callbacks=[*hooks(-1)[:3], StopAt(4, die), Record()])
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.train()
    resumed = make_trainer(tmp_path, callbacks=[*hooks(-1), Record()])
    resumed.load(tmp_path / "last.pt")
    assert resumed.update == 3
    losses = losses[:3]
    resumed.train()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines if "loss" in line] == [2, 4, 6]
    assert [line["update"] for line in lines if "held_out/nmse" in line] == [4, 6]
    assert lines[0]["loss"] == pytest.approx((losses[0] + losses[1]) / 2, rel=1e-5)


def test_tensorboard_and_progress_follow_the_run(tmp_path, capsys):
    progress = ProgressBar("Testing", line_every=0.0)
    trainer = make_trainer(tmp_path, max_updates=3, callbacks=[TensorBoardLog(tmp_path / "tb", every=1), progress])
    trainer.train()
    assert "Testing 2/3" in capsys.readouterr().out
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]


def test_a_checkpoint_is_also_due_by_the_clock(tmp_path):
    trainer = make_trainer(
        tmp_path, callbacks=[Checkpoint(tmp_path, 1000, every_minutes=0.0), StopAt(2, lambda: 1 / 0)]
    )
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    restored = make_trainer(tmp_path, callbacks=trainer.callbacks)
    restored.load(tmp_path / "last.pt")
    assert restored.update == 2


def test_images_become_channels_first_in_the_unit_range():
    image = np.zeros((2, 3, 4, 5, 3), np.uint8)
    image[..., 1] = 255
    tensor = to_tensors({"image": image})["image"]
    assert tensor.shape == (2, 3, 3, 4, 5)
    assert tensor[:, :, 1].eq(1).all()
    assert tensor[:, :, 0].eq(0).all()


class Drift(nn.Module):
    """A stand-in for a world model whose predictions are known: the last frame, plus 0.5 a step, plus noise."""

    observed, probed, codes = ("position",), (), MappingProxyType({})

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def observe(self, observations, actions, sample=True):
        assert not sample
        assert len(actions) == len(observations["position"]) == 10
        return observations["position"], None

    def imagine(self, state, actions, sample, generator, names):
        steps = torch.arange(1, len(actions) + 1).reshape(-1, 1, 1)
        position = state + 0.5 * steps
        if sample:
            position = position + torch.randn(position.shape, generator=generator)
        return SimpleNamespace(features=position)

    def decode(self, features, names):
        return {"position": features}


def test_nmse_equals_a_computation_by_hand():
    dataset = make_dataset(lengths=(60, 70))
    dataset.arrays["position"][:, 2] = 4.0  # constant: left out
    scores = prediction_error(Drift(), dataset, windows=7, seed=3)
    windows = dataset.sample_windows(7, 50, np.random.default_rng(3))["position"].astype(np.float64)
    variance = dataset.arrays["position"].astype(np.float64).var(0)[:2]
    expected = []
    for step in (1, 10, 40):
        error = windows[9, :, :2] + 0.5 * step - windows[9 + step, :, :2]
        expected.append((error**2 / variance).mean())
        assert scores[f"nmse_{step}"] == pytest.approx(expected[-1], rel=1e-5)
        assert scores[f"nmse_{step}/position"] == pytest.approx(expected[-1], rel=1e-5)
    assert scores["nmse"] == pytest.approx(np.exp(np.mean(np.log(expected))), rel=1e-5)


def test_nmse_depends_on_its_seed_alone():
    dataset = make_dataset(lengths=(60, 70))
    torch.manual_seed(5)
    first = prediction_error(Drift(), dataset, windows=5, seed=0, sample=True)
    state = torch.get_rng_state()
    assert prediction_error(Drift(), dataset, windows=5, seed=0, sample=True) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert prediction_error(Drift(), dataset, windows=5, seed=1, sample=True) != first
    assert prediction_error(Drift(), dataset, windows=5, seed=0, sample=False) != first


def test_a_last_evaluation_that_fails_keeps_the_checkpoint_and_is_made_up_for(tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a bar is shown as in a terminal
    scores = iter([RuntimeError("no memory"), {"nmse": 1.0}])

    def score(module):
        answer = next(scores)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def hooks(bar):
        return [Evaluation(score, every=100), bar, Checkpoint(tmp_path, every_updates=100)]

    bar = ProgressBar("Failing")
    with pytest.raises(RuntimeError, match="no memory"):
        make_trainer(tmp_path, callbacks=hooks(bar)).train()
    assert not bar._progress.live.is_started
    again = make_trainer(tmp_path, callbacks=hooks(ProgressBar("Going on")))
    again.load(tmp_path / "last.pt")
    assert again.update == 6
    again.train()
    assert again.status == "finished"
    assert (tmp_path / "best.pt").exists()


def test_only_callbacks_that_have_started_are_ended(tmp_path):
    ended = []

    class Unlucky(Callback):
        def _on_training_start(self):
            raise RuntimeError("no disk")

    class Ends(Callback):
        def _on_training_end(self):
            ended.append(self)

    first, last = Ends(), Ends()
    with pytest.raises(RuntimeError, match="no disk"):
        make_trainer(tmp_path, callbacks=[first, Unlucky(), last]).train()
    assert ended == [first]
