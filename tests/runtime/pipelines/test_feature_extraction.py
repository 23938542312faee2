"""The oracle is transformers' own pipeline over the same toy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forward_bundles import HIDDEN, Toy
from toy_pipelines import assert_same, transformers_pipeline

from runtime import pipeline

TOY = Toy("feature-extraction")


@pytest.mark.parametrize("inputs", ["the sun is a star", ["mars"], ["mars", "the moon is cold", "red"]])
def test_hidden_states_are_those_of_transformers(inputs: Any, tmp_path: Path) -> None:
    path = TOY.write(tmp_path / "toy")
    assert_same(pipeline("feature-extraction", path)(inputs), transformers_pipeline(TOY, path)(inputs))


def test_tensors_are_arrays_without_the_padding_of_their_batch(tmp_path: Path) -> None:
    pipe = pipeline(TOY.write(tmp_path / "toy"), return_tensors=True)
    found = pipe(["mars", "the moon is cold"], batch_size=2)
    assert [(array.shape, array.dtype) for array in found] == [((1, n, HIDDEN), np.float32) for n in (2, 5)]
    np.testing.assert_allclose(found[0], pipe("mars"), atol=1e-6)
