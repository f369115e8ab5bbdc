"""In a notebook results are text and tables as anywhere else, and bars need no widgets."""

from __future__ import annotations

import warnings
from importlib.util import find_spec

import numpy as np
import pytest

from aime_gym.evaluation.compare import Comparison, PolicyReturns
from aime_gym.evaluation.explanation import Explanation
from aime_gym.evaluation.predict import PredictedReturn
from aime_gym.evaluation.returns import Episodes
from aime_gym.evaluation.score import Score
from aime_gym.parallel import job_progress
from aime_gym.training.callbacks import ProgressBar
from tests.test_verdict import compared


@pytest.fixture
def notebook(monkeypatch):
    """What rich's consoles take for a notebook, which knows no widgets: to show anything there would fail."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)


RESULTS = {
    "a comparison": (compared(10, 20), "SHAC from the dream"),
    "no markup": (
        Comparison("<b>", "walk", "model", 0, 5, (PolicyReturns("<i>", Episodes(np.ones(3), np.ones(3, int)), None),)),
        "<i>",
    ),
    "an explanation": (Explanation("walker", "walk", "model", None, 0, 2, "no [formula]", ()), "no [formula]"),
    "a score": (Score("walker", "walk", "some-model", "0", "mdp", 0, (1,)), "some-model"),
    "a prediction": (
        PredictedReturn(
            mean=1.0,
            interval=(0.0, 2.0),
            reason="Because.",
            policy="ppo",
            embodiment="walker",
            task="walk",
            model="model",
            dream=Episodes(np.ones(2), np.ones(2, int)),
        ),
        "Because.",
    ),
}


@pytest.mark.parametrize(("result", "words"), RESULTS.values(), ids=RESULTS)
@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value")
def test_results_are_text_in_a_notebook(result, words, notebook, monkeypatch, capsys):
    text = str(result)
    assert words in text
    assert repr(result) == text  # what a prompt shows
    if not isinstance(result, PredictedReturn):  # which is a sentence
        page = result._repr_html_()
        assert page.startswith("<pre")
        assert words.replace("<", "&lt;").replace(">", "&gt;") in page
    monkeypatch.undo()
    assert str(result) == text  # as outside of notebooks
    assert capsys.readouterr().out == ""


def test_bars_in_a_notebook_are_lines_that_are_written_over(notebook, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with job_progress("Collecting", 3, "episodes") as advance:
            for _ in range(3):
                advance()
    told = capsys.readouterr().out
    assert "3/3" in told
    assert "\r" in told
    assert "Collecting: 3 of 3 episodes are complete." in told.replace("\x1b[0m", "").replace("\x1b[1;36m", "")


def test_the_bar_of_trainings_shows_in_a_notebook(notebook, capsys):
    class Training:
        is_main, max_updates, update, loss, seconds = True, 2, 0, 1.0, 0.0

    bar = ProgressBar("Training")
    bar.trainer = Training()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bar._on_training_start()
        bar.trainer.update = 2
        bar._on_update_end()
        bar._on_training_end()
    assert "2/2" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(find_spec, ("nbclient", "ipykernel"))), reason="pip install nbclient ipykernel runs it in a real kernel"
)
def test_a_real_notebook():
    import nbformat
    from nbclient import NotebookClient

    sources = [
        "import aime_gym\n"
        "compared = aime_gym.compare(['random', 'zero'], 'Walker', task='walk', episodes=2, max_episode_steps=5)\n"
        "compared",
        "print(compared)",
        "aime_gym.AIME(aime_gym.load_pretrained_model('walker-state'), demonstrations='walker-walk').learn(1);",
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(book, timeout=500, kernel_name="python3").execute()
    (shown,), (printed,), learned = (cell.outputs for cell in book.cells)
    assert shown.data["text/html"].startswith("<pre")
    assert printed.text.strip("\n") == shown.data["text/plain"]
    assert not any("ipywidgets" in str(output) for output in learned)
