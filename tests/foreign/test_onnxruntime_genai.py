"""The bundle's directory, as it is, under onnxruntime-genai: the same greedy tokens, alone and in a batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from environments import environment, run

from runtime import load

pytestmark = pytest.mark.foreign
REQUIREMENTS = ["onnxruntime-genai==0.18.0", "onnxruntime"]
NEW = 32

SCRIPT = """
import json, sys
import numpy as np
import onnxruntime_genai as og

bundle, prompts, new, pad = sys.argv[1], *map(json.loads, sys.argv[2:])
model = og.Model(bundle)
longest = max(map(len, prompts))
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=longest + new, batch_size=len(prompts), do_sample=False)
generator = og.Generator(model, parameters)
generator.append_tokens(np.array([row + [pad] * (longest - len(row)) for row in prompts], np.int32))
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps([[int(token) for token in generator.get_sequence(row)][longest:] for row in range(len(prompts))]))
"""


@pytest.mark.parametrize(
    "prompts",
    [["Complete the paragraph: our solar system is"], ["Complete the paragraph: our solar system is", "The Sun"]],
    ids=["one prompt", "a right-padded batch"],
)
@pytest.mark.parametrize("cache", ["of the activations' dtype", "of int8"])
def test_greedy_tokens_are_ours(request: pytest.FixtureRequest, cache: str, prompts: list[str]) -> None:
    bundle: Path = request.getfixturevalue("int8_cache_bundle" if cache == "of int8" else "tiny_bundle")
    model = load(bundle)
    ids = [model.tokenizer.encode(prompt) for prompt in prompts]
    ours = model.generate(ids, greedy=True, max_new_tokens=NEW).sequences
    pad = json.loads((bundle / "genai_config.json").read_text())["model"]["pad_token_id"]

    python = environment("genai", REQUIREMENTS) / "python"
    printed = run([python, "-c", SCRIPT, bundle, json.dumps(ids), str(NEW), str(pad)])
    theirs = json.loads(printed)
    assert len(theirs) == len(prompts)
    for sequence, tokens in zip(ours, theirs, strict=True):
        assert len(sequence.token_ids) > 8
        assert tokens[: len(sequence.token_ids)] == sequence.token_ids
