from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import UserError
from runtime.stopping import StopStrings

PIECES = st.lists(st.text("ab", max_size=4), max_size=8)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


def feed(pieces: Sequence[str], stops: Sequence[str]) -> tuple[list[str], bool]:
    watch, released = StopStrings(stops), []
    for piece in pieces:
        text, stopped = watch.push(piece)
        released.append(text)
        if stopped:
            return released, True
    return [*released, watch.flush()], False


def oracle(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Read one character at a time and look back."""
    for end in range(len(text) + 1):
        if met := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, met))], True
    return text, False


@given(PIECES, STOPS)
def test_the_text_kept_does_not_depend_on_how_it_was_cut(pieces: list[str], stops: list[str]) -> None:
    released, stopped = feed(pieces, stops)
    assert ("".join(released), stopped) == oracle("".join(pieces), stops)


@given(PIECES, STOPS)
def test_what_is_shown_is_never_taken_back(pieces: list[str], stops: list[str]) -> None:
    released, _ = feed(pieces, stops)
    final, _ = oracle("".join(pieces), stops)
    for n in range(len(released)):
        assert final.startswith("".join(released[:n]))


def test_text_that_cannot_be_a_stop_string_is_shown_at_once() -> None:
    watch = StopStrings(["\n\nUser:"])
    assert watch.push("Hello\n") == ("Hello", False)
    assert watch.push("there\n\nUs") == ("\nthere", False)
    assert watch.push("er: me") == ("", True)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UserError, match="a stop string is empty"):
        StopStrings(["x", ""])
