"""The bundle's directory, as it is, under optimum's `ORTModelForCausalLM`: the tokens that transformers gives.

optimum-onnx 0.1.0 wants a transformers below 4.58: it runs in an environment of its own, which shares this one's torch.
"""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from environments import environment, run
from transformers_reference import reference_tokens

from runtime.bundle import Bundle
from runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.foreign
# Without their dependencies: of those, these are too new here, and the others are taken from here.
REQUIREMENTS = (
    *("--no-deps", "optimum==2.1.0", "optimum-onnx==0.1.0", "transformers==4.57.6"),
    *("tokenizers==0.22.2", "huggingface-hub==0.36.2", "requests", "urllib3", "charset-normalizer", "certifi"),
)
PROMPT = "Complete the paragraph: our solar system is"
NEW = 32

# Prints what `generate` gives for rows of token ids, with a mask of zeros where an id is null.
SCRIPT = """
import json, sys
import torch
from optimum.onnxruntime import ORTModelForCausalLM

model = ORTModelForCausalLM.from_pretrained(sys.argv[1])
assert model.can_use_cache
rows, options = map(json.loads, sys.argv[2:])
mask = torch.tensor([[int(token is not None) for token in row] for row in rows])
ids = torch.tensor([[token or 0 for token in row] for row in rows])
torch.manual_seed(options.pop("seed", 0))
print(json.dumps(model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1]:].tolist()))
"""


@pytest.fixture(scope="module")
def python() -> Path:
    bin_ = environment("optimum-beside-ours", REQUIREMENTS, constraints=None)
    packages = bin_.parent / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (packages / "ours.pth").write_text(sysconfig.get_path("purelib"))
    return bin_ / "python"


def theirs(python: Path, bundle: Path, rows: list[list[int | None]], **options: Any) -> list[list[int]]:
    tokens: list[list[int]] = json.loads(run([python, "-c", SCRIPT, bundle, json.dumps(rows), json.dumps(options)]))
    return tokens


@pytest.fixture(scope="module")
def encode(tiny_bundle: Path) -> Any:
    return Tokenizer(Bundle.open(tiny_bundle)).encode


@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {"do_sample": True, "seed": 3, "top_k": 20, "temperature": 1.3}],
    ids=["greedy", "sampling"],
)
def test_rows_of_one_length_have_transformers_tokens(
    python: Path, tiny_bundle: Path, tiny_checkpoint: Path, encode: Any, options: dict[str, Any]
) -> None:
    first, second = encode(PROMPT), encode("The Sun is a star and the Moon is")
    length = min(len(first), len(second))
    rows = [first[:length], second[:length]]
    expected = reference_tokens(tiny_checkpoint, rows, max_new_tokens=NEW, **options)
    assert theirs(python, tiny_bundle, rows, max_new_tokens=NEW, **options) == expected
    assert len(expected[0]) > 8


def test_a_row_padded_on_the_left_as_optimum_pads_gets_padding_alone_and_no_wrong_text(
    python: Path, tiny_bundle: Path, tiny_checkpoint: Path, encode: Any
) -> None:
    # The graph counts positions from a row's first column, so it answers such a row with logits that are not numbers:
    # their argmax is token 0, this checkpoint's padding. Rows of unequal length go one by one.
    whole, short = encode(PROMPT), encode("The Sun")
    rows = [whole, [None] * (len(whole) - len(short)) + short]
    full, padded = theirs(python, tiny_bundle, rows, max_new_tokens=8, do_sample=False)
    assert full == reference_tokens(tiny_checkpoint, [whole], max_new_tokens=8, do_sample=False)[0]
    assert padded == [0] * 8
