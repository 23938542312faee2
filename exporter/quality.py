"""What a bundle's precision costs: its perplexity on a text, and how far its predictions are from transformers in fp32.

Perplexity, KL divergence of the next token and agreement of the most likely one are what the quantization literature
compares (as in llama.cpp's `perplexity --kl-divergence`); each window of the text is run by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from exporter.checkpoint import Checkpoint
from exporter.reference import Reference
from runtime.errors import CheckFailed, UserError
from runtime.measured import Quality
from runtime.session import Floats, Ints, Session

Logits = Callable[[Ints], Floats]  # tokens int64 [1, n] of a row of its own to its logits float32 [n, vocab]
Progress = Callable[[str, int, int], None]
Doubles = NDArray[np.float64]

_CHUNK = 1 << 22  # logits that are looked at together: a dozen positions of 256 000 tokens


def measure(
    checkpoint: Checkpoint, logits: Logits, windows: Ints, *, text: str, progress: Progress = lambda *_: None
) -> Quality:
    """Run windows of a text through a bundle and through transformers in fp32, and compare what they predict.

    One window's logits of each are in memory at a time; sums are in float64.

    Args:
        checkpoint: what the bundle was made from.
        logits: the bundle: token ids int64 [1, n], a row by itself, to logits float32 [n, vocab]; see `logits_of`.
        windows: token ids int64 [n, length], length at least 2.
        text: the file name that the record carries.
        progress: called with "quality", the windows done and their number.

    Raises:
        UserError: there is no window to predict in, or the bundle has another vocabulary.
        CheckFailed: a logit is not finite, or a figure is not.
    """
    if windows.ndim != 2 or not len(windows) or windows.shape[1] < 2:
        raise UserError(f"windows are [n, length] with at least 2 tokens each, not {list(windows.shape)}; correct them")
    tally = Tally()
    progress("quality", 0, len(windows))
    for done, exact in enumerate(Reference(checkpoint).each_logits(windows)):
        window = windows[done]
        ours = logits(window[None])
        if ours.shape != exact.shape:
            raise UserError(
                f"logits are {list(ours.shape)}, transformers' {list(exact.shape)}: bundle and checkpoint are not of "
                "one model; give the checkpoint that the bundle was made from"
            )
        for positions in _chunks(*exact.shape):
            tally.add(f"window {done}", window, positions, exact, ours)
        progress("quality", done + 1, len(windows))
    return tally.quality(text, windows.size)


def logits_of(session: Session) -> Logits:
    """A session as `measure` takes it: each row goes from position 0 into an empty cache that holds just it."""

    def logits(tokens: Ints) -> Floats:
        length = tokens.shape[1]
        empty = session.reopen(slots=1, capacity=length)
        whole = empty.step(tokens, np.array([length]), np.array([0]), keep=length)
        row: Floats = whole[0]
        return row

    return logits


def check_limits(quality: Quality, max_kl: float | None = None, max_perplexity_increase: float | None = None) -> None:
    """Check a bundle's quality against what its user accepts; None is no limit.

    Args:
        quality: as measured.
        max_kl: of the mean KL divergence, in nats.
        max_perplexity_increase: over the perplexity of transformers in fp32, in percent of that.

    Raises:
        CheckFailed: a limit is passed.
    """
    remedy = "raise the limit, or export at a higher precision"
    if max_kl is not None and not quality.kl_mean <= max_kl:
        raise CheckFailed(
            f"the mean KL divergence from transformers on {quality.text} is {quality.kl_mean:.4g} nats, "
            f"the limit {max_kl:.4g}; {remedy}"
        )
    increase = quality.perplexity_increase
    if max_perplexity_increase is not None and not increase <= max_perplexity_increase:
        raise CheckFailed(
            f"the perplexity on {quality.text} rises by {increase:.4g} % from {quality.reference_perplexity:.4g} to "
            f"{quality.perplexity:.4g}, the limit is {max_perplexity_increase:.4g} %; {remedy}"
        )


@dataclass
class Tally:
    """Per position: −log p of the next token by the bundle and by the reference, KL, and whether both agree."""

    surprise: list[Doubles] = field(default_factory=list)
    reference_surprise: list[Doubles] = field(default_factory=list)
    divergence: list[Doubles] = field(default_factory=list)
    agreement: list[NDArray[np.bool_]] = field(default_factory=list)

    def add(self, where: str, window: Ints, positions: slice, exact: Floats, ours: Floats) -> None:
        """Note some positions of a window from both sides' logits float32 [length, vocab]."""
        exact, ours, following = exact[positions], ours[positions], window[1:][positions]
        for name, given in (("the bundle", ours), ("transformers", exact)):
            if not np.isfinite(given).all():
                raise CheckFailed(f"{where} of the text: logits of {name} are not finite; see verify for where from")
        log_p, log_q = _log_softmax(exact), _log_softmax(ours)
        rows = np.arange(len(following))  # one fewer at the end of a window, where nothing follows
        self.note(
            surprise=-log_q[rows, following],
            reference_surprise=-log_p[rows, following],
            divergence=(np.exp(log_p) * (log_p - log_q)).sum(-1),
            agreement=exact.argmax(-1) == ours.argmax(-1),
        )

    def note(
        self, *, surprise: Doubles, reference_surprise: Doubles, divergence: Doubles, agreement: NDArray[np.bool_]
    ) -> None:
        """Note what was made of some positions' logits."""
        self.surprise.append(surprise)
        self.reference_surprise.append(reference_surprise)
        self.divergence.append(np.maximum(divergence, 0))  # rounding alone takes the sum below 0, where nothing differs
        self.agreement.append(agreement)

    def quality(self, text: str, tokens: int) -> Quality:
        """The figures of all positions."""
        divergence = np.concatenate(self.divergence)
        with np.errstate(over="ignore"):
            ours, exact = (
                float(np.exp(np.concatenate(side).mean())) for side in (self.surprise, self.reference_surprise)
            )
        for name, value in (("the bundle", ours), ("transformers", exact)):
            if not np.isfinite(value):
                raise CheckFailed(f"the perplexity of {name} on {text} is not finite; give a text of the model's kind")
        return Quality(
            text=text,
            tokens=tokens,
            perplexity=ours,
            reference_perplexity=exact,
            kl_mean=float(divergence.mean()),
            kl_p99=float(np.percentile(divergence, 99)),
            top1=float(np.concatenate(self.agreement).mean()),
        )


def _chunks(length: int, vocab: int) -> Iterator[slice]:
    """Positions 0..length-1 in runs whose logits take little memory in float64."""
    step = max(1, _CHUNK // vocab)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _log_softmax(logits: Floats) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
