"""The oracle is numpy, one text at a time."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corruptions import redescribe
from forward_bundles import HIDDEN, MAX_LENGTH, PAD, Toy

from runtime import load
from runtime.errors import CheckFailed, UserError
from runtime.manifest import Manifest

TEXTS = ["the sun is a star", "mars", "the moon is cold and old"]
TOY = Toy("feature-extraction")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return TOY.write(tmp_path / "toy", golden=True)


def test_the_mean_leaves_padding_out_and_the_last_is_each_texts_own(path: Path) -> None:
    model = load(path, task="feature-extraction")
    states = [TOY.hidden(model.tokenizer.encode(text)) for text in TEXTS]
    mean, last = (model.embed(TEXTS, pooling=pooling, normalize=False) for pooling in ("mean", "last"))
    assert (mean.shape, mean.dtype) == ((3, HIDDEN), np.float32)
    np.testing.assert_allclose(mean, [state.mean(0) for state in states], atol=1e-5)
    np.testing.assert_allclose(last, [state[-1] for state in states], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(model.embed(TEXTS), axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(model.embed(TEXTS) * np.linalg.norm(mean, axis=1)[:, None], mean, atol=1e-5)


def test_a_batch_is_bounded_and_its_size_changes_no_number(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(path, task="feature-extraction")
    expected = model.embed(TEXTS * 4)
    sizes: list[tuple[int, ...]] = []
    run = model._session.run

    def counted(ids: Any, mask: Any) -> Any:
        sizes.append(ids.shape)
        assert (ids[mask == 0] == PAD).all()
        return run(ids, mask)

    monkeypatch.setattr(model._session, "run", counted)
    np.testing.assert_allclose(model.embed(TEXTS * 4, batch_size=5), expected, atol=1e-5)
    assert [size[0] for size in sizes] == [5, 5, 2]
    model.embed(TEXTS * 4)
    assert [size[0] for size in sizes[3:]] == [8, 4]
    np.testing.assert_array_equal(model.embed("mars"), model.embed(["mars"]))


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "there is no text; give"),
        (["mars", ""], {}, "text 2 is empty; give"),
        ("", {}, "text 1 is empty; give"),
        (["mars " * 30], {}, f"text 1 has 31 tokens, .* takes {MAX_LENGTH}; shorten it, or export with a larger"),
        ("mars", {"pooling": "max"}, "unknown pooling 'max'; known: mean, last"),
        ("mars", {"batch_size": 0}, "batch_size should be at least 1, not 0"),
    ],
)
def test_bad_input_is_one_line_that_names_it(path: Path, texts: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load(path).embed(texts, **options)
    assert "\n" not in str(error.value)


def test_a_wrong_task_is_named_with_the_command_that_runs_it(path: Path) -> None:
    with pytest.raises(UserError, match="is for feature-extraction, not text-generation; use nemotron-export predict"):
        load(path, task="text-generation")
    replace(Manifest.load(path), task="fill-mask").save(path)
    with pytest.raises(UserError, match="is for 'fill-mask'; known: text-generation, feature-extraction, "):
        load(path)


def test_a_padding_token_that_is_none_is_refused(tmp_path: Path) -> None:
    path = Toy("feature-extraction", config={"pad_token_id": -1}).write(tmp_path / "toy")
    with pytest.raises(UserError, match=r"pad_token_id -1 is no token id within .*; correct or remove it"):
        load(path)


def test_what_was_not_checked_says_so(tmp_path: Path) -> None:
    model = load(Toy("feature-extraction", target="tensorrt").write(tmp_path / "toy"))
    assert model.backend == "onnxruntime-cpu"
    assert "no engines of such graphs yet" in model.remarks[0]
    assert "exported without the parity gate" in model.remarks[1]


def test_another_model_than_was_exported_does_not_load(tmp_path: Path) -> None:
    path = TOY.write(tmp_path / "toy", golden=True)
    wrong = TOY.golden()
    wrong.cases[0].outputs["last_hidden_state"][0, 0] += 1
    wrong.save(path / "golden.npz")
    redescribe(path)
    with pytest.raises(CheckFailed, match="is not the exported model"):
        load(path)
