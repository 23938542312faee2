"""A bundle's answers are those of lm-eval's transformers backend on the checkpoint, number by number."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from lm_eval_tasks import documents

from exporter.harness.model import BundleLM
from runtime import load
from runtime.errors import UserError

PER_TOKEN = 1e-5


@pytest.fixture(scope="module")
def model(tiny_bundle):
    return load(tiny_bundle, task="text-generation")


@pytest.fixture(scope="module")
def texts(tiny_checkpoint):
    return documents(tiny_checkpoint / "heldout.txt")


@pytest.fixture(scope="module")
def pairs(texts):
    """Contexts and continuations: true and false, long and short, and those whose tokens are easily got wrong."""
    asked = []
    for number, text in enumerate(texts[:16]):
        words = text.split(" ")
        rests = (words[5], " ".join(words[5:9]), " ".join(texts[number + 1].split(" ")[5:9]), "Paris.")
        asked += [(" ".join(words[:5]), f" {rest}") for rest in rests]
    special = [
        ("", "Mars is red"),
        ("<s>Mars is", " red"),
        ("Mars is ", "red"),
        ("Zürich ☁️", " clouds"),
        ("Mar", "s is red"),
    ]
    return [*asked, *special, ("\n".join(texts[:30]), " Mars is red"), ("Mars is", " " + " ".join(texts[:9]))]


def lengths(oracle, pairs):
    return [len(oracle._encode_pair(context, rest)[1]) if context else 3 for context, rest in pairs]


def assert_equal(answers, expected, tokens, per_token=PER_TOKEN):
    for (ours, greedy), (theirs, said), count in zip(answers, expected, tokens, strict=True):
        assert abs(ours - theirs) <= per_token * count
        assert greedy == said


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_loglikelihoods_are_those_on_transformers(model, oracle, requests, pairs, rows):
    asked = requests("loglikelihood", *pairs)
    expected = oracle.loglikelihood(asked, disable_tqdm=True)
    assert 0 < sum(said for _, said in expected) < len(expected)
    assert_equal(BundleLM(model, batch_size=rows).loglikelihood(asked), expected, lengths(oracle, pairs))


def test_so_are_those_of_the_other_target(tensorrt_bundle_of, oracle, requests, pairs):
    ours = BundleLM(load(tensorrt_bundle_of("fp32"), task="text-generation", device="cpu"))
    asked = requests("loglikelihood", *pairs)
    expected = oracle.loglikelihood(asked, disable_tqdm=True)
    assert_equal(ours.loglikelihood(asked), expected, lengths(oracle, pairs))


def test_whole_texts_are_scored_in_the_same_windows(model, oracle, requests, texts):
    whole = [*texts[:4], " ".join(texts[:50]), ""]
    asked = requests("loglikelihood_rolling", *((text,) for text in whole))
    tokens = [len(oracle.tok_encode(text)) for text in whole]
    assert max(tokens) > 3 * oracle.max_length
    answers = BundleLM(model, batch_size=2).loglikelihood_rolling(asked)
    for ours, theirs, count in zip(answers, oracle.loglikelihood_rolling(asked), tokens, strict=True):
        assert abs(ours - theirs) <= PER_TOKEN * count


def test_generated_text_is_that_of_transformers(model, oracle, requests, texts):
    contexts = [" ".join(text.split(" ")[:6]) for text in texts[:12]]
    asked = [(context, {"until": ["\n\n", "."], "max_gen_toks": 40}) for context in contexts]
    wishes = (["\n"], ["sol"], [], ["<extra_id_1>"], "capital", [" ", "of the"])
    asked += [("Complete the paragraph: Peru is", {"until": until, "max_gen_toks": 30}) for until in wishes]
    asked += [("<s>[chat] What is", {"until": ["?"], "max_gen_toks": 9}), (" ".join(texts[:60]), {"max_gen_toks": 60})]
    made = requests("generate_until", *asked)
    expected = oracle.generate_until(made, disable_tqdm=True)
    assert len(set(expected)) > 12
    assert BundleLM(model, batch_size=3).generate_until(made) == expected


def test_the_context_of_a_questions_choices_is_computed_once(model, requests):
    ours = BundleLM(model, batch_size=8)
    context, choices = "The largest planet in the solar system is", (" Jupiter", " Mars", " the Sun", " Saturn and red")
    ours.loglikelihood(requests("loglikelihood", *((context, choice) for choice in choices)))
    shared = len(ours.tok_encode(context))
    ends = [len(ours.tok_encode(context + choice)) - shared - 1 for choice in choices]
    assert ours.tokens.asked == 4 * shared + sum(ends)
    assert ours.tokens.computed == shared + sum(ends)


def test_examples_before_many_questions_are_computed_once(model, oracle, requests, texts):
    header = "\n".join(texts[:6]) + "\n"
    questions = [" ".join(text.split(" ")[:4]) for text in texts[6:16]]
    pairs = [(header + question, choice) for question in questions for choice in (" red", " blue", " in Asia")]
    ours, asked = BundleLM(model, batch_size=4), requests("loglikelihood", *pairs)
    answers = ours.loglikelihood(asked)
    tokens = lengths(oracle, pairs)
    alone = [BundleLM(model).loglikelihood([request])[0] for request in asked]
    assert_equal(answers, alone, tokens)
    # Of words as unlikely as e^-18: two units in the last place of their logits, of whichever of the two.
    assert_equal(answers, oracle.loglikelihood(asked, disable_tqdm=True), tokens, per_token=2e-5)
    read = [ours.tok_encode(context + choice)[:-1] for context, choice in pairs]
    distinct = {tuple(tokens[:end]) for tokens in read for end in range(1, len(tokens) + 1)}
    assert ours.tokens.computed == len(distinct)
    assert ours.tokens.computed * 10 < ours.tokens.asked == sum(map(len, read))


def test_a_chat_is_rendered_as_transformers_renders_it(model, oracle):
    ours = BundleLM(model)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "It is"}]
    for turns, begun in ((chat[:1], True), (chat, False)):
        rendered = ours.apply_chat_template(turns, add_generation_prompt=begun)
        assert rendered == oracle.apply_chat_template(turns, add_generation_prompt=begun)
        assert ours.tok_encode(rendered) == oracle.tok_encode(rendered)


def test_a_task_that_samples_is_drawn_for_and_can_be_repeated(model, requests):
    def said(**wishes):
        asked = [("Mars is", {"until": [], "max_gen_toks": 12, **wishes})] * 6
        return BundleLM(model, batch_size=4).generate_until(requests("generate_until", *asked))

    greedy, drawn = said(), said(do_sample=True, temperature=3.0, top_k=0)
    assert len(set(greedy)) == 1
    assert len(set(drawn)) > 3
    assert drawn == said(do_sample=True, temperature=3.0, top_k=0)
    assert said(do_sample=True, temperature=3.0, top_k=1) == greedy


@pytest.mark.parametrize(
    ("kind", "arguments", "told"),
    [
        ("generate_until", ("Mars", {"max_gen_toks": 600}), "600 new tokens, and a row holds 512"),
        ("generate_until", ("Mars", {"num_beams": 4}), "asks for num_beams .* what this can do is until"),
        ("loglikelihood", ("Mars", ""), "task test: a choice of document 0 is empty"),
        ("loglikelihood", ("o", "f"), "'f' has no token of its own"),
        ("loglikelihood", ("Mars", " red" * 800), "more than the 512 of a row"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_the_remedy(model, requests, kind, arguments, told):
    with pytest.raises(UserError, match=told):
        getattr(BundleLM(model), kind)(requests(kind, arguments))


def test_a_row_longer_than_the_bundles_is_refused(model):
    with pytest.raises(UserError, match=r"within 2..512"):
        BundleLM(model, max_length=513)


def test_a_shorter_row_cuts_off_the_beginning_as_on_transformers(model, oracle, requests, pairs, monkeypatch):
    monkeypatch.setattr(oracle, "_max_length", 12)
    some = [pair for pair, count in zip(pairs, lengths(oracle, pairs), strict=True) if count <= 12]
    asked = requests("loglikelihood", *some)
    expected = oracle.loglikelihood(asked, disable_tqdm=True)
    assert_equal(BundleLM(model, max_length=12).loglikelihood(asked), expected, itertools.repeat(3, len(some)))


def test_progress_ends_where_it_says(model, requests, texts):
    told = []
    ours = BundleLM(model, progress=lambda *step: told.append(step))
    ours.loglikelihood(requests("loglikelihood", *((text, " red") for text in texts[:5])))
    assert told[-1] == ("loglikelihood", ours.tokens.computed, ours.tokens.computed)
    assert np.all(np.diff([done for _, done, _ in told]) > 0)
    ours.generate_until(requests("generate_until", *((text, {"max_gen_toks": 3}) for text in texts[:3])))
    assert told[-1] == ("generate", 3, 3)
