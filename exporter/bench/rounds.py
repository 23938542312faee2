"""Rounds in which contenders take turns, and how alike they answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def in_turn(contenders: Sequence[T], number: int) -> list[T]:
    """The order of a round: who began in the one before goes last, so that nobody always follows the same one."""
    first = number % len(contenders)
    return [*contenders[first:], *contenders[:first]]


def leading(tokens: Sequence[int], expected: Sequence[int]) -> float:
    """The share of tokens before the first that differs."""
    same = [ours == theirs for ours, theirs in zip(tokens, expected, strict=True)]
    return (same.index(False) if False in same else len(same)) / len(same)
