from __future__ import annotations

import io

import pytest

from exporter.cli._process import Terminated
from runtime.errors import UserError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def type_in(monkeypatch: pytest.MonkeyPatch):
    """What the user types, at a terminal or into a pipe."""
    return lambda text, terminal=False: monkeypatch.setattr("sys.stdin", (Terminal if terminal else io.StringIO)(text))


def test_a_conversation_remembers_its_turns(cli, model, type_in):
    model.answers = [["A ", "moon."], "Ice."]
    type_in("What?\n\nAnd a comet?\n")
    outcome = cli("chat", "b", "--system", "Be brief.")
    assert (outcome.code, outcome.out) == (0, "A moon.\nIce.\n")
    assert " ".join(model.prompts[1][0]) == "system: Be brief. user: What? assistant: A moon. user: And a comet?"
    assert "123.4 tokens/s" in outcome.err


def test_exit_ends_without_asking_the_model(cli, model, type_in):
    type_in("/exit\nmore\n")
    assert cli("chat", "b").code == 0
    assert model.prompts == []


def test_sampling_options_arrive(cli, model, type_in):
    model.answers = ["x"]
    type_in("Hi\n")
    cli("chat", "b", "--temperature", "0.5", "--max-new-tokens", "9", "--stop", "END")
    assert (model.options["temperature"], model.options["max_new_tokens"]) == (0.5, 9)
    assert model.options["stop"] == ("END",)


def test_an_interrupt_stops_the_answer_and_keeps_what_was_said(cli, model, type_in):
    model.answers = [["Half ", KeyboardInterrupt()], "Whole."]
    type_in("One?\nTwo?\n")
    outcome = cli("chat", "b")
    assert (outcome.code, outcome.out) == (0, "Half \nWhole.\n")
    assert "stopped" in outcome.err
    assert " ".join(model.prompts[1][0]) == "user: One? assistant: Half user: Two?"


def test_a_message_interrupted_before_any_answer_is_forgotten(cli, model, type_in):
    model.answers = [[KeyboardInterrupt()], "Whole."]
    type_in("One?\nTwo?\n")
    cli("chat", "b")
    assert " ".join(model.prompts[1][0]) == "user: Two?"


def test_an_interrupt_at_the_prompt_leaves_with_130(cli, model, monkeypatch):
    def interrupted(prompt: str = "") -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert cli("chat", "b").code == 130


def test_a_request_to_end_is_not_taken_for_a_stopped_answer(cli, model, type_in):
    model.answers = [["Half ", Terminated()], "Whole."]
    type_in("One?\nTwo?\n")
    assert cli("chat", "b").code == 130
    assert len(model.prompts) == 1


def test_a_conversation_that_no_longer_fits_forgets_its_oldest_turns_and_says_so(cli, model, type_in):
    model.max_length = 16  # 4 are kept for the answer
    model.answers = ["b b b", "d d d", "f"]
    type_in("a a a\nc c c\ne e e\n")
    outcome = cli("chat", "b", "--system", "s")
    assert " ".join(model.prompts[1][0]) == "system: s user: c c c"
    assert " ".join(model.prompts[2][0]) == "system: s user: e e e"
    assert outcome.err.count("its oldest turns are forgotten") == 2


def test_a_message_longer_than_the_capacity_is_refused_and_the_conversation_goes_on(cli, model, type_in):
    model.max_length = 12
    model.answers = ["b", "d"]
    type_in(f"a\n{'long ' * 20}\nc\n", terminal=True)
    outcome = cli("chat", "b")
    assert outcome.code == 0
    assert "error: the message makes 21 tokens, the capacity is 12" in outcome.err
    assert " ".join(model.prompts[1][0]) == "user: a assistant: b user: c"


def test_a_refused_message_from_a_pipe_ends_with_2(cli, model, type_in):
    model.max_length = 12
    type_in("long " * 20)
    assert cli("chat", "b").code == 2


def test_a_template_that_refuses_a_turn_does_not_keep_it(cli, model, type_in, monkeypatch):
    model.answers = ["b"]
    encode = model.encode_chat

    def refuse(messages):
        if "bad" in messages[-1]["content"]:
            raise UserError("the template refuses: bad")
        return encode(messages)

    monkeypatch.setattr(model, "encode_chat", refuse)
    type_in("bad\ngood\n", terminal=True)
    cli("chat", "b")
    assert " ".join(model.prompts[0][0]) == "user: good"


def test_a_bundle_without_a_template_is_refused_before_its_weights_are_loaded(cli, model):
    model.template = False
    outcome = cli("chat", "b")
    assert (outcome.code, model.loaded) == (2, {})
    assert "nemotron-export generate" in outcome.err


def test_bytes_that_are_not_text_are_refused(cli, model, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    outcome = cli("chat", "b")
    assert outcome.code == 2
    assert "not UTF-8" in outcome.err


def test_a_real_bundle_answers(cli, tiny_bundle, type_in):
    type_in("What is a moon?\n")
    outcome = cli("chat", tiny_bundle, "--max-new-tokens", "40", "--greedy")
    assert outcome.code == 0
    assert len(outcome.out.split()) > 3
