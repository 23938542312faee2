"""Graphs without a cache on ONNX Runtime; the oracle is numpy, one row at a time without padding."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corruptions import redescribe
from forward_bundles import BOS, HIDDEN, MAX_LENGTH, PAD, VOCAB, Toy

from runtime.bundle import Bundle
from runtime.errors import CheckFailed, UserError
from runtime.forward import ForwardSession, open_forward

ROWS = [[BOS, 9, 5, 7, 10], [BOS, 4, 8], [BOS, 6, 6, 11]]
TASKS = ("feature-extraction", "text-classification", "token-classification", "question-answering")


def padded(rows: list[list[int]], side: str) -> tuple[np.ndarray, np.ndarray]:
    width = max(map(len, rows))
    ids, mask = np.full((len(rows), width), PAD), np.zeros((len(rows), width), np.int64)
    for row, tokens in enumerate(rows):
        where = slice(len(tokens)) if side == "right" else slice(width - len(tokens), width)
        ids[row, where], mask[row, where] = tokens, 1
    return ids, mask


def opened(toy: Toy, directory: Path) -> ForwardSession:
    return open_forward(Bundle.open(toy.write(directory / "toy")))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("task", TASKS)
def test_every_head_gives_each_row_what_it_gives_it_alone(task: str, side: str, tmp_path: Path) -> None:
    toy = Toy(task)
    ids, mask = padded(ROWS, side)
    outputs = opened(toy, tmp_path).run(ids, mask)
    assert all(array.dtype == np.float32 for array in outputs.values())
    for row, tokens in enumerate(ROWS):
        logits = toy.logits(tokens)
        real = mask[row].astype(bool)
        match task:
            case "feature-extraction":
                found, expected = outputs["last_hidden_state"][row, real], toy.hidden(tokens)
            case "text-classification":
                found, expected = outputs["logits"][row], logits[-1]
            case "token-classification":
                found, expected = outputs["logits"][row, real], logits
            case _:
                found = np.stack([outputs["start_logits"][row, real], outputs["end_logits"][row, real]], 1)
                expected = logits
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_last_real_tokens_have_logits_whatever_side_the_padding_is_on(
    side: str, target: str, tmp_path: Path
) -> None:
    toy = Toy("text-generation", target=target)
    logits = opened(toy, tmp_path).run(*padded(ROWS, side), keep=3)["logits"]
    assert logits.shape == (3, 3, VOCAB)
    for row, tokens in enumerate(ROWS):
        np.testing.assert_allclose(logits[row], toy.logits(tokens)[-3:], atol=1e-5)


def test_positions_count_from_the_first_column_unless_given(tmp_path: Path) -> None:
    """As transformers does: padding on the left moves a row's positions, unless its own are fed."""
    toy = Toy("feature-extraction", positions=True)
    session = opened(toy, tmp_path)
    found = session.run(*padded(ROWS, "right"))["last_hidden_state"]
    np.testing.assert_allclose(found[1, :3], toy.hidden(ROWS[1]), atol=1e-5)
    ids, mask = padded(ROWS, "left")
    moved = session.run(ids, mask)["last_hidden_state"][1, 2:]
    assert np.abs(moved - toy.hidden(ROWS[1])).max() > 0.1
    own = session.run(ids, mask, np.maximum(mask.cumsum(1) - 1, 0))["last_hidden_state"][1, 2:]
    np.testing.assert_allclose(own, toy.hidden(ROWS[1]), atol=1e-5)


def test_a_graph_that_takes_embeddings_is_fed_token_ids_all_the_same(tmp_path: Path) -> None:
    toy = Toy("feature-extraction", embeds=True)
    found = opened(toy, tmp_path).run(*padded(ROWS, "right"))["last_hidden_state"]
    np.testing.assert_allclose(found[0], toy.hidden(ROWS[0]), atol=1e-5)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (None, r"has no embed_tokens\.npy; export"),
        (b"nothing", r"embed_tokens\.npy is damaged .*; copy or export"),
        (np.zeros((VOCAB, HIDDEN + 1), np.float32), rf"has shape .* takes \({VOCAB}, {HIDDEN}\); export"),
        (np.zeros((VOCAB - 1, HIDDEN), np.float32), rf"has shape .* takes \({VOCAB}, {HIDDEN}\); export"),
    ],
)
def test_embeddings_that_cannot_be_looked_up_are_named(table: Any, message: str, tmp_path: Path) -> None:
    path = Toy("feature-extraction", embeds=True).write(tmp_path / "toy")
    file = path / "embed_tokens.npy"
    file.unlink()
    if isinstance(table, bytes):
        file.write_bytes(table)
    elif table is not None:
        np.save(file, table)
    redescribe(path)
    with pytest.raises(UserError, match=message):
        open_forward(Bundle.open(path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1, 2]], [[1]]), r"takes tokens and mask \[batch, sequence\]"),
        (([1, 2], [1, 1]), r"takes tokens and mask \[batch, sequence\]"),
        (([[1, 2]], [[1, 2]]), "should hold 0 and 1 only"),
        (([[1, 2], [1, 2]], [[1, 1], [0, 0]]), "row 1 has no real token; leave it out"),
        (
            ([[1] * (MAX_LENGTH + 1)], [[1] * (MAX_LENGTH + 1)]),
            f"rows of {MAX_LENGTH + 1} tokens pass the {MAX_LENGTH}",
        ),
        (([[1, VOCAB]], [[1, 1]]), f"token id {VOCAB} is outside the vocabulary of {VOCAB}"),
        (([[1, 2]], [[1, 1]], [[0, 1]]), "takes no position_ids; export"),
    ],
)
def test_what_a_graph_would_get_wrong_is_refused(arguments: Any, message: str, tmp_path: Path) -> None:
    session = opened(Toy("token-classification"), tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        session.run(*map(np.array, arguments))
    assert "\n" not in str(caught.value)


def test_positions_beyond_the_model_are_refused(tmp_path: Path) -> None:
    session = opened(Toy("token-classification", positions=True), tmp_path)
    with pytest.raises(UserError, match=rf"position_ids should be within 0\.\.{MAX_LENGTH - 1}"):
        session.run(*map(np.array, ([[1, 2]], [[1, 1]], [[0, MAX_LENGTH]])))


def test_what_does_not_run_such_graphs_says_so(tmp_path: Path) -> None:
    bundle = Bundle.open(Toy("question-answering", target="tensorrt").write(tmp_path / "toy"))
    with pytest.raises(UserError, match="tensorrt-rtx has no engines of such graphs yet; use --backend onnxruntime"):
        open_forward(bundle, backend="tensorrt-rtx")
    assert "TensorRT has no engines of such graphs yet" in open_forward(bundle).choice
    assert open_forward(bundle, backend="onnxruntime").choice == ""
    with pytest.raises(UserError, match="unknown device 'tpu'; known: cpu, cuda"):
        open_forward(bundle, device="tpu")
    half = replace(bundle, manifest=replace(bundle.manifest, precision="bf16"))
    with pytest.raises(UserError, match="bfloat16 does not run on ONNX Runtime"):
        open_forward(half)
    other = replace(bundle, manifest=replace(bundle.manifest, target="openvino"))
    with pytest.raises(UserError, match="is for openvino; export it with --target"):
        open_forward(other)


def test_a_graph_that_does_not_run_is_named(tmp_path: Path) -> None:
    """Its embeddings are fewer than its configuration says."""
    session = opened(Toy("token-classification", config={"vocab_size": 999}), tmp_path)
    with pytest.raises(CheckFailed, match=r"onnxruntime-cpu cannot run a batch of .*; run nemotron-export selftest"):
        session.run(np.array([[1, 500]]), np.array([[1, 1]]))


def test_a_graph_with_a_cache_is_opened_otherwise(bundle_dir: Path) -> None:
    bundle = Bundle.open(bundle_dir)
    assert bundle.has_cache
    with pytest.raises(UserError, match="has a key/value cache; open it with"):
        open_forward(bundle)
