"""The bundle's directory, as it is, under onnxruntime-genai: transformers' tokens, alone, in a batch, turn by turn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from environments import environment, run
from transformers_reference import reference_logits, reference_tokens

from runtime import load
from runtime.bundle import Bundle
from runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.foreign
REQUIREMENTS = ["onnxruntime-genai==0.18.0", "onnxruntime"]
NEW = 32
PROMPT = "Complete the paragraph: our solar system is"

# Prints the new tokens of each row; of a row alone, after each turn: tokens that are appended, and then generated on.
SCRIPT = """
import json, sys
import numpy as np
import onnxruntime_genai as og

bundle, turns, new, pad, options = sys.argv[1], *map(json.loads, sys.argv[2:])
model = og.Model(bundle)
parameters = og.GeneratorParams(model)
most = sum(max(map(len, rows)) + new for rows in turns)
parameters.set_search_options(max_length=most, batch_size=len(turns[0]), **options)
generator = og.Generator(model, parameters)
told = []
for rows in turns:
    longest = max(map(len, rows))
    before = len(generator.get_sequence(0)) if told else 0
    generator.append_tokens(np.array([row + [pad] * (longest - len(row)) for row in rows], np.int32))
    for _ in range(new):
        if not generator.is_done():
            generator.generate_next_token()
    told.append([[int(token) for token in generator.get_sequence(row)][before + longest:] for row in range(len(rows))])
print(json.dumps(told))
"""


def theirs(bundle: Path, *turns: Sequence[Sequence[int]], new: int = NEW, **options: Any) -> list[list[list[int]]]:
    """New tokens of each turn's rows."""
    python = environment("genai", REQUIREMENTS) / "python"
    pad = json.loads((bundle / "genai_config.json").read_text())["model"]["pad_token_id"]
    arguments = (json.dumps(turns), str(new), str(pad), json.dumps({"do_sample": False, **options}))
    told: list[list[list[int]]] = json.loads(run([python, "-c", SCRIPT, bundle, *arguments]))
    return told


def encode(bundle: Path, *prompts: str) -> list[list[int]]:
    return [Tokenizer(Bundle.open(bundle)).encode(prompt) for prompt in prompts]


@pytest.mark.parametrize("prompts", [[PROMPT], [PROMPT, "The Sun"]], ids=["one prompt", "a right-padded batch"])
def test_greedy_tokens_are_transformers(tiny_bundle: Path, tiny_checkpoint: Path, prompts: list[str]) -> None:
    rows = encode(tiny_bundle, *prompts)
    (told,) = theirs(tiny_bundle, rows)
    for row, tokens in zip(rows, told, strict=True):
        (expected,) = reference_tokens(tiny_checkpoint, [row], do_sample=False, max_new_tokens=NEW)
        assert len(expected) > 8
        assert tokens[: len(expected)] == expected


@pytest.mark.parametrize("prompts", [[PROMPT], [PROMPT, "The Sun"]], ids=["one prompt", "a right-padded batch"])
def test_greedy_tokens_on_a_cache_of_int8_are_ours(int8_cache_bundle: Path, prompts: list[str]) -> None:
    rows = encode(int8_cache_bundle, *prompts)
    (told,) = theirs(int8_cache_bundle, rows)
    ours = load(int8_cache_bundle).generate(rows, greedy=True, max_new_tokens=NEW).sequences
    for sequence, tokens in zip(ours, told, strict=True):
        assert len(sequence.token_ids) > 8
        assert tokens[: len(sequence.token_ids)] == sequence.token_ids


def test_a_conversation_goes_on_from_the_cache(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    first, second = encode(tiny_bundle, PROMPT, "The Sun is a star. Mars is")
    (said,), (then,) = theirs(tiny_bundle, [first], [second[1:]], new=12)
    assert said == reference_tokens(tiny_checkpoint, [first], do_sample=False, max_new_tokens=12)[0]
    whole = [*first, *said, *second[1:]]
    (expected,) = reference_tokens(tiny_checkpoint, [whole], do_sample=False, max_new_tokens=12)
    assert len(expected) > 4
    assert then[: len(expected)] == expected


def test_sampled_tokens_are_among_the_most_likely_and_follow_the_seed(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    rows, k = encode(tiny_bundle, PROMPT, "The Sun"), 8
    options = {"do_sample": True, "top_k": k, "top_p": 1.0, "temperature": 2.0}
    (told,) = theirs(tiny_bundle, rows, random_seed=1, **options)
    assert theirs(tiny_bundle, rows, random_seed=1, **options) == [told]
    assert theirs(tiny_bundle, rows, random_seed=2, **options) != [told]
    ranks = []
    for row, padded in zip(rows, told, strict=True):
        tokens = _until_the_end(padded, tiny_bundle)
        logits = reference_logits(tiny_checkpoint, [*row, *tokens])[len(row) - 1 : -1]
        ranks += [int((at > at[token] + 1e-3).sum()) for at, token in zip(logits, tokens, strict=True)]
    assert max(ranks) < k  # the token's place among the most likely: 0 is greedy's
    assert np.mean(np.array(ranks) > 0) > 0.1


def _until_the_end(tokens: list[int], bundle: Path) -> list[int]:
    """A row's tokens up to its end of text; the others of its batch may go on, and it is padded."""
    ends = [at for at, token in enumerate(tokens) if token in Bundle.open(bundle).eos_token_ids]
    return tokens[: ends[0] + 1] if ends else tokens
