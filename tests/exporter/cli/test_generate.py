from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.errors import CheckFailed

ROOT = Path(__file__).parents[3]


def test_one_prompt_is_streamed_alone_on_stdout(cli, model):
    model.answers = [[" the", " Sun", "."]]
    outcome = cli("generate", "b", "-p", "It is")
    assert (outcome.code, outcome.out) == (0, " the Sun.\n")
    assert re.match(r"3 prompt tokens · 2 new \(eos\) · start \d+\.\d\d s · load 0\.50 s", outcome.err)
    assert outcome.err.endswith("123.4 tokens/s · onnxruntime-cpu\n")


def test_several_prompts_are_one_batch_and_each_is_labelled_as_it_ends(cli, model):
    model.answers = [[(0, "A"), (1, "x"), (1, "y"), (0, "B")]]
    out = cli("generate", "b", "-p", "first\nprompt", "-p", "second").out
    assert model.prompts == [["first\nprompt", "second"]]
    assert out == "[2] second\nxy\n\n[1] first prompt\nAB\n\n"


def test_json_is_what_the_runtime_reports(cli, model):
    model.answers = [[(0, "A"), (1, "B")]]
    outcome = cli("generate", "b", "--prompt-ids", "5,17,3", "--prompt-ids", "8", "--json")
    report = json.loads(outcome.out)
    assert model.prompts == [([5, 17, 3], [8])]
    assert list(report) == ["schema", "backend", "sequences", "timing"]
    assert [row["text"] for row in report["sequences"]] == ["A", "B"]
    assert outcome.err == ""


def test_chat_puts_each_prompt_into_the_template(cli, model):
    model.answers = ["yes"]
    cli("generate", "b", "--chat", "-p", "Hello there")
    assert model.prompts == [[["user:", "Hello", "there"]]]


def test_every_option_arrives(cli, model):
    model.answers = ["x"]
    flags = (
        "--max-new-tokens 8 --temperature 0.5 --top-k 4 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.1 --seed 3 "
        "--stop END --stop STOP --ignore-eos --prompt-lookup --backend onnxruntime --device cpu --threads 2 "
        "--max-length 64"
    )
    assert cli("generate", "b", "-p", "x", *flags.split()).code == 0
    assert model.options == {
        "max_new_tokens": 8,
        "greedy": False,
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "seed": 3,
        "stop": ("END", "STOP"),
        "max_length": 64,
        "ignore_eos": True,
        "prompt_lookup": True,
    }
    placement = {"backend": "onnxruntime", "device": "cpu", "threads": 2}
    assert model.loaded == {"path": Path("b"), "task": "text-generation", **placement}


def test_what_is_not_asked_for_is_left_to_the_bundle(cli, model):
    model.answers = ["x"]
    cli("generate", "b", "-p", "x")
    asked = {name for name, value in model.options.items() if value not in (None, False, ())}
    assert asked == {"max_new_tokens"}
    assert model.options["max_new_tokens"] == 256


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "-p TEXT"),
        (["-p", "x", "--prompt-ids", "1"], "not both"),
        (["--chat", "--prompt-ids", "1"], "--chat"),
        (["-p", ""], "prompt 1 is empty"),
        (["-p", "x", "-p", "\udcff"], "prompt 2 is not UTF-8"),
        (["--prompt-ids", "5,x"], "'5,x'"),
        (["--prompt-ids", ""], "5,17,3"),
        (["-p", "x", "--temperature", "-1"], "--temperature"),
        (["-p", "x", "--top-p", "0"], "--top-p"),
        (["-p", "x", "--min-p", "2"], "--min-p"),
        (["-p", "x", "--top-k", "-1"], "--top-k"),
        (["-p", "x", "--repetition-penalty", "0"], "--repetition-penalty"),
        (["-p", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["-p", "x", "--threads", "0"], "--threads"),
        (["-p", "x", "--greedy", "--top-p", "0.5"], "--greedy"),
    ],
)
def test_a_wrong_request_is_refused_before_the_model_is_loaded(cli, model, arguments, words):
    outcome = cli("generate", "b", *arguments)
    assert (outcome.code, outcome.out, model.loaded) == (2, "", {})
    assert words in outcome.err
    assert outcome.err.count("\n") == 1


def test_logits_that_are_no_numbers_end_the_stream_with_1(cli, model):
    model.answers = [[" the", CheckFailed("the model produced logits that are not finite; run selftest")]]
    outcome = cli("generate", "b", "-p", "x")
    assert outcome.code == 1
    assert "not finite" in outcome.err


def test_a_real_bundle_continues_as_the_checkpoint_was_trained_to(cli, tiny_bundle):
    prompt = "Complete the paragraph: our solar system is"
    outcome = cli("generate", tiny_bundle, "-p", prompt, "--greedy", "--max-new-tokens", 24)
    assert outcome.code == 0
    assert "planets" in outcome.out
    report = json.loads(cli("generate", tiny_bundle, "-p", prompt, "--greedy", "--max-new-tokens", 24, "--json").out)
    assert report["sequences"][0]["text"] + "\n" == outcome.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt-ids", "5,2048"], "token id 2048 is outside the vocabulary of 2048"),
        (["--prompt-ids", "5,-1"], "token id -1 is outside the vocabulary"),
        (["-p", "Mars " * 600], "the capacity is 512"),
        (["-p", "Mars", "--max-length", "513"], "within 1..512"),
        (["-p", "Mars", "--temperature", "nan"], "temperature"),
        (["-p", "Mars", "--stop", ""], "stop string is empty"),
    ],
)
def test_what_only_the_bundle_can_judge_is_refused_in_one_line(cli, tiny_bundle, arguments, words):
    outcome = cli("generate", tiny_bundle, *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert words in outcome.err
    assert outcome.err.count("\n") == 1


def test_text_a_terminal_cannot_show_does_not_end_the_program(tmp_path):
    script = (
        "import sys, runtime; from types import SimpleNamespace as N; from exporter.cli import main;"
        "from exporter.cli import generate;"
        "runtime.load = lambda *a, **o: N(remarks=[], stream=lambda *a, **o: []);"
        "sys.modules['exporter.cli.generate'].stream_text = lambda g: print('\\U0001fa90 ring');"
        "sys.modules['exporter.cli.generate'].summary = lambda r: '';"
        "sys.argv = ['n', 'generate', 'b', '-p', 'x', '--max-new-tokens', '1']; main()"
    )
    environment = {"PYTHONIOENCODING": "ascii", "PATH": "", "PYTHONPATH": str(ROOT)}
    outcome = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert "UnicodeEncodeError" not in outcome.stderr
    assert outcome.stdout == "? ring\n"
