"""Model folders: strict loading, exact round trips, and no surprise from broken files."""

import json
import re
import shutil
import tracemalloc
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import aime_gym
from aime_gym.bodies.lookup import get_embodiment
from aime_gym.data.demonstrations import BUNDLED, find_demonstrations
from aime_gym.errors import AimeGymError
from aime_gym.files import DIGESTS, REVISION, read_json, read_revision, weights_digest
from aime_gym.world_model.checkpoint import (
    PRETRAINED,
    bundled_models,
    load_policy,
    load_pretrained_model,
    load_starts,
    read_weights,
    save_model,
)
from aime_gym.world_model.config import ModelConfig, NetConfig
from aime_gym.world_model.heads import Heads
from aime_gym.world_model.model import WorldModel
from aime_gym.world_model.trust import load_trust

PARITY = Path(__file__).parent / "parity"
RELEASED = PARITY / "walker-mdp-rssm"


@pytest.fixture
def released(tmp_path) -> Path:
    """A copy of a released folder, to break."""
    return Path(shutil.copytree(RELEASED, tmp_path / "released"))


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """A folder of this project, with heads and starts."""
    body = get_embodiment("walker")
    torch.manual_seed(0)
    config = ModelConfig.for_embodiment(
        body,
        "mdp",
        "rssmo",
        memory_dim=6,
        stochastic_dim=3,
        hidden_size=5,
        encoders={"tabular": NetConfig("mlp", 5, 1, have_head=False)},
        decoders={"tabular": NetConfig("dmlp", 4, 1)},
        probes={},
        standardise=True,
    )
    model = WorldModel(config)
    model.set_standardisation(
        {s.name: torch.full((s.dim,), 0.5) for s in body.sensors},
        {s.name: torch.full((s.dim,), 2.0) for s in body.sensors},
    )
    model.heads = Heads(9, 6, ("walk", "run"), "walker", 24, 9, 9, ensemble=2, hidden_size=4, ensemble_hidden_size=4)
    folder = tmp_path_factory.mktemp("own")
    save_model(model, folder)
    starts: dict[str, np.ndarray] = {s.name: np.zeros((10, 4, s.dim), np.float32) for s in body.sensors}
    starts |= {"pre_action": np.zeros((10, 4, 6), np.float32), "is_reset": np.ones(4, bool)}
    np.savez(folder / "starts.npz", **starts, physics=np.zeros((4, 18)))  # type: ignore[arg-type]
    return folder


@pytest.fixture
def ours(own, tmp_path) -> Path:
    """A copy of it, to break."""
    return Path(shutil.copytree(own, tmp_path / "ours"))


@pytest.mark.parametrize("name", sorted(path.name for path in PARITY.iterdir()))
def test_released_folders_load_strictly_and_survive_our_format(name, tmp_path):
    model = load_pretrained_model(PARITY / name)
    file = torch.load(PARITY / name / "model.pt", weights_only=True)
    state = model.state_dict()
    assert {key.removeprefix("cell.") for key in state} == set(file)
    assert all(torch.equal(value, file[key.removeprefix("cell.")]) for key, value in state.items())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.folder == PARITY / name

    save_model(model, tmp_path)
    again = load_pretrained_model(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in state.items())
    assert set(load_file(tmp_path / "model.safetensors")) == set(file)


def test_own_folders_come_back_bit_for_bit_with_their_heads(own, tmp_path):
    model = load_pretrained_model(own)
    assert model.heads is not None
    assert model.heads.tasks == ("walk", "run")
    save_model(model, tmp_path)
    for name in ("config.yaml", "model.safetensors", "heads.safetensors"):
        assert (tmp_path / name).read_bytes() == (own / name).read_bytes()
    assert not list(tmp_path.glob(".*"))  # nothing temporary is left

    model.heads = None
    save_model(model, tmp_path)
    assert load_pretrained_model(tmp_path).heads is None, "heads of an older model must not come back"


def test_half_precision_on_disk_is_float32_in_memory(own, tmp_path):
    model = load_pretrained_model(own)
    save_model(model, tmp_path, torch.float16)
    assert (tmp_path / "model.safetensors").stat().st_size < 0.8 * (own / "model.safetensors").stat().st_size
    for (name, value), exact in zip(
        load_pretrained_model(tmp_path).state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert value.dtype == torch.float32, name
        torch.testing.assert_close(value, exact, atol=1e-3, rtol=1e-3)


def test_the_released_policy(released):
    policy = load_policy(released)
    assert policy(torch.zeros(2, 32)).mode.shape == (2, 6)
    (released / "policy.pt").unlink()
    with pytest.raises(AimeGymError, match=r"policy\.pt"):
        load_policy(released)
    config = (released / "config.yaml").read_text()
    (released / "config.yaml").write_text(config[: config.index("policy:")])
    with pytest.raises(AimeGymError, match="policy"):
        load_policy(released)


def rename(weights):
    weights["prior_mean.net.9.weight"] = weights.pop("prior_mean.net.0.weight")


def pickled_code(weights):
    weights["prior_mean.net.0.weight"] = Path


BROKEN = {
    "missing": (lambda w: w.pop("prior_mean.net.0.weight"), r"lacks.*prior_mean\.net\.0\.weight"),
    "extra": (lambda w: w.update({"prior_mean.net.9.bias": torch.zeros(1)}), r"no place for.*prior_mean\.net\.9\.bias"),
    "renamed": (rename, r"lacks.*prior_mean\.net\.0\.weight"),
    "misshapen": (
        lambda w: w.update({"memory_cell.bias_hh": torch.zeros(71)}),
        r"memory_cell\.bias_hh.*\[72\].*\[71\]",
    ),
    "transposed": (
        lambda w: w.update({"prior_std.net.0.weight": w["prior_std.net.0.weight"].t().contiguous()}),
        r"prior_std\.net\.0\.weight.*\[16, 24\].*\[24, 16\]",
    ),
    "NaN": (lambda w: w["memory_cell.weight_hh"].view(-1)[5].fill_(torch.nan), r"memory_cell\.weight_hh.*finite"),
    "integers": (lambda w: w.update({"initial_state": torch.zeros(1, 8, dtype=torch.long)}), "initial_state.*int64"),
    "no tensor": (lambda w: w.update({"initial_state": [0.0]}), "initial_state.*list"),
    "reward": (lambda w: w.update({"decoders.reward.log_std": torch.zeros(1)}), r"no place for.*decoders\.reward"),
    "code": (pickled_code, "weights"),
}


@pytest.mark.parametrize("change", BROKEN)
def test_weights_must_fit_exactly(released, change):
    breaking, message = BROKEN[change]
    weights = torch.load(released / "model.pt", weights_only=True)
    breaking(weights)
    torch.save(weights, released / "model.pt")
    with pytest.raises(AimeGymError, match=message) as caught:
        load_pretrained_model(released)
    assert "model.pt" in str(caught.value)


def test_the_config_decides_which_parts_there_are(released):
    config = (released / "config.yaml").read_text()
    for old, new, missing in (
        ("use_reward: false", "use_reward: true", "decoders.reward"),
        (
            "  idm_mode: detach",
            "  idm_mode: detach\n  intrinsic_reward_config: {num_ensembles: 2}",
            "emb_prediction_heads",
        ),
        ("  min_std: null", "  min_std: null\n  standardise: true", "normaliser"),
    ):
        (released / "config.yaml").write_text(config.replace(old, new))
        with pytest.raises(AimeGymError, match=f"lacks.*{missing}"):
            load_pretrained_model(released)
    (released / "config.yaml").write_text(config.replace("idm_mode: detach", "idm_mode: none"))
    with pytest.raises(AimeGymError, match=r"no place for.*idm"):
        load_pretrained_model(released)


def test_folders_must_be_model_folders(released, tmp_path, monkeypatch):
    for wrong, message in (
        (tmp_path / "nowhere", "nowhere"),
        (released / "model.pt", "is a file"),
        (tmp_path, "config.yaml"),
        (3, "3"),
        ("walker-nothing", "walker-nothing"),
    ):
        with pytest.raises(AimeGymError, match=message):
            load_pretrained_model(wrong)  # type: ignore[arg-type]
    (released / "model.pt").unlink()
    with pytest.raises(AimeGymError, match=r"model\.pt"):
        load_pretrained_model(released)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AimeGymError, match=r"model\.pt"):
        load_pretrained_model("released")  # a folder, though its name has no slash


@pytest.mark.parametrize("content", [b"", b"PK", b"not weights", b"\x80\x02}q\x00."])
def test_files_that_hold_no_weights(released, ours, content):
    (released / "model.pt").write_bytes(content)
    with pytest.raises(AimeGymError, match=r"model\.pt"):
        load_pretrained_model(released)
    (ours / "model.safetensors").write_bytes(content)
    with pytest.raises(AimeGymError, match=r"model\.safetensors"):
        load_pretrained_model(ours)


def test_state_dicts_only(released):
    torch.save([torch.zeros(1)], released / "model.pt")
    with pytest.raises(AimeGymError, match=r"state dict.*list"):
        load_pretrained_model(released)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "heads.safetensors", "config.yaml", "starts.npz"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_give_a_clear_error_or_a_valid_model(own, tmp_path_factory, name, data):
    source = RELEASED if name == "model.pt" else own
    folder = tmp_path_factory.mktemp("damaged")
    for path in source.glob("*.*"):
        shutil.copy(path, folder / path.name)
    content = bytearray((folder / name).read_bytes())
    if data.draw(st.booleans(), "truncate"):
        del content[data.draw(st.integers(0, len(content) - 1), "length") :]
    else:
        # Headers are where damage hurts: half of the flips go to the first and last 500 bytes.
        ends = st.one_of(st.integers(0, 499), st.integers(-500, -1)).map(lambda i: i % len(content))
        for position in data.draw(st.lists(st.one_of(ends, st.integers(0, len(content) - 1)), min_size=1, max_size=4)):
            content[position] ^= data.draw(st.integers(1, 255))
    (folder / name).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = load_pretrained_model(folder)
            if name == "starts.npz":
                load_starts(model)
        except AimeGymError as error:
            told = str(error)
        else:
            told = str(folder)
            assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    assert str(folder) in told
    shutil.rmtree(folder)


def test_heads_of_another_model_are_refused(ours):
    heads = Heads(10, 6, ("walk",), "walker", 24, 9, 9, hidden_size=4)
    (ours / DIGESTS).unlink()
    metadata = {"config": json.dumps(heads.config)}
    save_file(heads.state_dict(), ours / "heads.safetensors", metadata)
    with pytest.raises(AimeGymError, match=r"heads\.safetensors.*another model"):
        load_pretrained_model(ours)
    for metadata in ({}, {"config": "{"}, {"config": "[]"}, {"config": '{"size": 3}'}):
        save_file(heads.state_dict(), ours / "heads.safetensors", metadata)
        with pytest.raises(AimeGymError, match=r"heads\.safetensors"):
            load_pretrained_model(ours)


@pytest.mark.parametrize(
    "change",
    [
        {"nq": 10**7},
        {"nq": 10**30},
        {"nv": -1},
        {"nq": 2},  # the walker's third coordinate is an angle
        {"hidden_size": "4"},
        {"ensemble": 10**6},
        {"tasks": "walk"},
        {"tasks": ["walk"] * 2},
        {"tasks": [1]},
        {"quaternions": [8]},
        {"reward_limits": [1, 0]},
        {"reward_limits": 1},
        {"embodiment": None},
        {"terminates": 1},
        {"terminates": True, "pays_ends": 1},
        {"pays_ends": True},  # where nothing ends
        {"deep": [[[]]]},
    ],
)
def test_heads_that_cannot_be_are_refused_before_memory_is_taken(ours, change):
    heads = load_pretrained_model(ours).heads
    assert heads is not None
    (ours / DIGESTS).unlink()
    save_file(heads.state_dict(), ours / "heads.safetensors", {"config": json.dumps(heads.config | change)})
    tracemalloc.start()
    with pytest.raises(AimeGymError, match=r"heads\.safetensors"):
        load_pretrained_model(ours)
    assert tracemalloc.get_traced_memory()[1] < 1e7
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["config.yaml", "model.safetensors", "heads.safetensors"])
def test_files_that_changed_since_they_were_saved_are_refused(own, ours, name):
    content = bytearray((own / name).read_bytes())
    content[-3] ^= 1  # the last number of the weights, and of the config: still what could be
    (ours / name).write_bytes(content)
    with pytest.raises(AimeGymError, match=rf"{name}.*digests\.json"):
        load_pretrained_model(ours)
    (ours / DIGESTS).unlink()
    if name != "config.yaml":
        load_pretrained_model(ours)  # as released models are, which have none
    model = load_pretrained_model(own)
    save_model(model, ours)
    assert load_pretrained_model(ours).config == model.config, "a new save has new digests"


def test_bundled_models_have_digests():
    for name in bundled_models():
        told = read_json(PRETRAINED / name / DIGESTS)
        assert set(told) == {"config.yaml", "model.safetensors", "heads.safetensors"}


def test_one_digest_names_the_weights_of_a_folder_everywhere(ours, tmp_path):
    for name in bundled_models():
        digest, card = weights_digest(PRETRAINED / name), (PRETRAINED / name / "README.md").read_text()
        assert set(re.findall(r"weights `?([0-9a-f]{16})\b", card)) == {digest}
        assert any(trust.strangers for trust in load_trust(PRETRAINED / name).values()), "found in these weights"
    digest = weights_digest(ours)
    (ours / "policy.pt").write_bytes(b"of an agent, which is no part of the model")
    assert weights_digest(ours) == digest
    (ours / DIGESTS).unlink()
    assert weights_digest(ours) == digest
    (ours / "config.yaml").write_text((ours / "config.yaml").read_text() + "# changed")
    assert weights_digest(ours) != digest
    (tmp_path / "model.pt").write_bytes(b"released weights")
    released = weights_digest(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"other weights")
    assert weights_digest(tmp_path) != released


def test_saves_count_the_revisions_of_a_folder(tmp_path, own, released):
    first, second = load_pretrained_model(own), load_pretrained_model(own)
    second.heads.reward_mean += 1.0
    for model, number in ((first, 1), (first, 1), (second, 2), (first, 3)):
        save_model(model, tmp_path / "model")
        saved = load_pretrained_model(tmp_path / "model").revision
        assert saved == ("model", number, weights_digest(tmp_path / "model"))
    assert str(saved) == f"model, revision 3 ({saved.digest})"
    assert load_pretrained_model(released).revision == ("released", None, weights_digest(released))
    for name in bundled_models():
        assert (read_revision(PRETRAINED / name).number or 0) >= 1


def test_the_revision_of_weights_that_nobody_counted_is_unknown(ours):
    (ours / DIGESTS).unlink()
    (ours / "config.yaml").write_text((ours / "config.yaml").read_text() + "# changed\n")
    changed = load_pretrained_model(ours)
    assert changed.revision.number is None
    assert "unknown revision" in str(changed.revision)
    save_model(changed, ours)
    assert load_pretrained_model(ours).revision.number == 1, "what is written is what was there first"
    (ours / REVISION).unlink()
    assert load_pretrained_model(ours).revision.number is None


@pytest.mark.parametrize(
    "content",
    [
        *("", "null", "[1]", "{}", '{"revision": 1}', '{"revision": true, "digest": "0123456789abcdef"}'),
        *('{"revision": 0, "digest": "0123456789abcdef"}', '{"revision": 1.5, "digest": "0123456789abcdef"}'),
        *('{"revision": 1, "digest": "0123456789ABCDEF"}', '{"revision": 1, "digest": ["0123456789abcdef"]}'),
        '{"revision": 99999999999999999, "digest": "0123456789abcdef"}',
    ],
)
def test_a_damaged_revision_is_refused_until_the_next_save(ours, content):
    model = load_pretrained_model(ours)
    (ours / REVISION).write_text(content)
    with pytest.raises(AimeGymError, match=r"revision\.json.*Delete it"):
        load_pretrained_model(ours)
    save_model(model, ours)
    assert load_pretrained_model(ours).revision.number == 1


def test_starts_must_fit_the_model(ours):
    model = load_pretrained_model(ours)
    starts = load_starts(model)
    assert starts["velocity"].shape == (10, 4, 9)
    for name, value, message in (
        ("velocity", None, "velocity"),
        ("velocity", np.zeros((10, 4, 8)), "velocity"),
        ("height", np.zeros((9, 4, 1)), "height"),
        ("height", np.full((10, 4, 1), np.nan), "height.*finite"),
        ("is_reset", np.ones(5, bool), "is_reset"),
        ("pre_action", np.zeros((10, 0, 6)), "orientations|pre_action"),
        ("orientations", np.zeros((10, 4, 14), object), "npz"),
    ):
        changed = {key: array for key, array in (starts | {name: value}).items() if array is not None}
        np.savez(ours / "starts.npz", **changed)  # type: ignore[arg-type]
        with pytest.raises(AimeGymError, match=message):
            load_starts(model)
    (ours / "starts.npz").unlink()
    with pytest.raises(AimeGymError, match=r"starts\.npz"):
        load_starts(model)
    with pytest.raises(AimeGymError, match="folder"):
        load_starts(WorldModel(model.config))


def test_a_path_is_a_folder_of_the_users_whatever_is_bundled(own, tmp_path, monkeypatch):
    shutil.copytree(own, tmp_path / "walker-state")
    shutil.copytree(own, tmp_path / "walker-walk")
    monkeypatch.chdir(tmp_path)
    assert load_pretrained_model("walker-state").folder == PRETRAINED / "walker-state"
    mine = load_pretrained_model(Path("walker-state"))
    assert mine.folder == Path("walker-state")
    assert mine.config.memory_dim == 6
    assert find_demonstrations("walker-walk").parent == BUNDLED
    assert find_demonstrations(Path("walker-walk")) == Path("walker-walk")
    with pytest.raises(AimeGymError, match="no folder"):
        load_pretrained_model(Path("cheetah-state"))
    aime_gym.register_dream("Mine-v0", Path("walker-state"), real="AimeReal-Walker-v0")
    monkeypatch.chdir("/")
    kwargs = gym.registry.pop("Mine-v0").kwargs
    assert Path(kwargs["model"]) == tmp_path / "walker-state"


def test_a_body_names_its_model_of_states_where_no_folder_has_its_name(ours, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_pretrained_model("walker").folder == PRETRAINED / "walker-state"
    aime_gym.register_dream("Mine-v1", "walker")
    assert gym.registry.pop("Mine-v1").kwargs["model"] == "walker-state"
    with pytest.raises(AimeGymError, match="no folder"):
        load_pretrained_model(Path("walker"))
    shutil.copytree(ours, tmp_path / "walker")
    assert load_pretrained_model("walker").folder == Path("walker")


def test_dreams_do_not_begin_with_what_is_not_finite(ours):
    with np.load(ours / "starts.npz") as file:
        starts = dict(file)
    starts["velocity"][..., 0] = 3e38
    np.savez(ours / "starts.npz", **starts)
    make = {"model": ours, "obs_type": "state"}
    for dream in (gym.make("AimeDream-Walker-v0", **make), gym.make_vec("AimeDream-Walker-v0", num_envs=80, **make)):
        with pytest.raises(AimeGymError, match=rf"no finite latent or observation of the starts in {ours}"):
            dream.reset(seed=0)


def test_weights_are_of_a_size_that_can_be(ours):
    (ours / DIGESTS).unlink()
    weights, metadata = read_weights(ours / "model.safetensors")
    weights["decoders.velocity.net.net.2.weight"].fill_(3e38)
    save_file(weights, ours / "model.safetensors", metadata)
    with pytest.raises(AimeGymError, match=r"model\.safetensors: decoders.velocity.net.net.2.weight.*far too large"):
        load_pretrained_model(ours)


@pytest.mark.parametrize("physics", [np.full((4, 18), np.nan), np.zeros((4, 18), "U1"), np.zeros(4), np.zeros((3, 18))])
def test_starts_hold_physics_that_can_be(ours, physics):
    with np.load(ours / "starts.npz") as file:
        np.savez(ours / "starts.npz", **{**dict(file), "physics": physics})
    with pytest.raises(AimeGymError, match=r"starts\.npz: physics"):
        load_starts(load_pretrained_model(ours))


def test_absurd_physics_are_no_state(ours):
    env = gym.make("AimeReal-Walker-v0")
    with pytest.raises(AimeGymError, match="beyond 1e"):
        env.reset(options={"physics": np.full(18, 1e200)})
    env.close()


def test_bundled_models_load_by_name():
    for name in bundled_models():
        model = aime_gym.load_pretrained_model(name)
        assert model.folder is not None
        assert model.folder.name == name
        load_starts(model)
