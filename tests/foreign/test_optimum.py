"""The bundle's directory, as it is, under optimum's `ORTModelForCausalLM`: the tokens that transformers gives.

optimum-onnx 0.1.0 wants a transformers below 4.58: it runs in an environment of its own, which shares this one's torch.
"""

from __future__ import annotations

import json
import sysconfig
from dataclasses import dataclass
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

# Prints what `generate` gives for each case: rows of token ids, with a mask of zeros where an id is null, and options.
SCRIPT = """
import json, sys
import torch
from optimum.onnxruntime import ORTModelForCausalLM

model = ORTModelForCausalLM.from_pretrained(sys.argv[1])
assert model.can_use_cache
told = []
for rows, options in json.loads(sys.argv[2]):
    mask = torch.tensor([[int(token is not None) for token in row] for row in rows])
    ids = torch.tensor([[token or 0 for token in row] for row in rows])
    torch.manual_seed(options.pop("seed", 0))
    told.append(model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1]:].tolist())
print(json.dumps(told))
"""
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW}
SAMPLING: dict[str, Any] = {"do_sample": True, "max_new_tokens": NEW, "seed": 3, "top_k": 20, "temperature": 1.3}


@dataclass(frozen=True)
class Cases:
    """Rows of one length, and of two; what optimum said to the first greedily and by sampling, and to the others."""

    even: list[list[int]]
    uneven: list[list[int | None]]
    told: list[list[list[int]]]


@pytest.fixture(scope="module")
def cases(tiny_bundle: Path) -> Cases:
    bin_ = environment("optimum-beside-ours", REQUIREMENTS, constraints=None)
    packages = bin_.parent / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (packages / "ours.pth").write_text(sysconfig.get_path("purelib"))

    encode = Tokenizer(Bundle.open(tiny_bundle)).encode
    whole, other, short = encode(PROMPT), encode("The Sun is a star and the Moon is"), encode("The Sun")
    length = min(len(whole), len(other))
    even = [whole[:length], other[:length]]
    uneven = [whole, [None] * (len(whole) - len(short)) + short]
    asked = [(even, GREEDY), (even, SAMPLING), (uneven, GREEDY)]
    return Cases(even, uneven, json.loads(run([bin_ / "python", "-c", SCRIPT, tiny_bundle, json.dumps(asked)])))


@pytest.mark.parametrize(("case", "options"), [(0, GREEDY), (1, SAMPLING)], ids=["greedy", "sampling"])
def test_rows_of_one_length_have_transformers_tokens(
    cases: Cases, tiny_checkpoint: Path, case: int, options: dict[str, Any]
) -> None:
    expected = reference_tokens(tiny_checkpoint, cases.even, **options)
    assert cases.told[case] == expected
    assert len(expected[0]) > 8


def test_a_row_padded_on_the_left_as_optimum_pads_gets_padding_alone_and_no_wrong_text(
    cases: Cases, tiny_checkpoint: Path
) -> None:
    # The graph counts positions from a row's first column, so it answers such a row with logits that are not numbers:
    # their argmax is token 0, this checkpoint's padding. Rows of unequal length go one by one.
    full, padded = cases.told[2]
    assert full == reference_tokens(tiny_checkpoint, cases.uneven[:1], **GREEDY)[0]
    assert not any(padded)
