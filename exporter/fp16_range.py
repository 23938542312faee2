"""Powers of two that keep a layer within fp16's range: relu² of x leaves it at 256.

A channel between `up_proj` and `down_proj`, and one between `v_proj` and `o_proj`, can be made smaller without changing
the function (`exporter.scaling`). Rows that are made smaller would lose weights under fp16's normal range, so what
their norm gives shrinks instead: its readers' columns grow by the largest factor that any row shrinks by.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from exporter.calibration import LayerActivations
from exporter.scaling import CONTEXT, DOWN, QKV, UP, Scaling
from runtime.errors import UserError
from runtime.measured import LayerRange

MOST = 65504.0  # the largest fp16
HEADROOM = 8.0  # of what a factor can keep small: other texts reach further than the one calibrated on
LEAST_HEADROOM = 2.0  # of what none can
_NORMS = {"input_layernorm": QKV, "post_attention_layernorm": UP}
_UP_GIVES, _SQUARED, _VALUES = "mlp.up_proj", "mlp.act_fn", "self_attn.v_proj"

Tensor = torch.Tensor


@dataclass(frozen=True)
class SafeLayer:
    """The factors of a layer with those of its range in them, by its channels, and its largest magnitudes."""

    factors: dict[str, Tensor]
    range: LayerRange


def keep_in_range(layer: LayerActivations, factors: dict[str, Tensor], scaling: Scaling) -> SafeLayer:
    """Make a layer's factors such that it stays in range.

    Args:
        layer: what it gave on the calibration text.
        factors: those that it has for other reasons, by channels (`exporter.scaling.QKV`, …).
        scaling: the model's, for its shapes and what its activation lets through.

    Returns:
        Factors that are the same where nothing is out of range.

    Raises:
        UserError: something is out of range that no factor can bring back; the message names bf16.
    """
    given = dict(factors)
    before = _peaks(layer, given, scaling)
    limit = MOST / HEADROOM
    if scaling.degree is not None:
        of_squares = before[_SQUARED] / limit
        of_rows = before[_UP_GIVES] / limit  # below 0, where it is not squared, it may reach further
        exponent = torch.maximum(_exponent(of_squares ** (1 / scaling.degree)), _exponent(of_rows))
        _shrink(given, (UP, DOWN), scaling.spec.hidden, exponent, scaling.degree)
    _shrink(given, (QKV, CONTEXT), scaling.spec.hidden, _exponent(before[_VALUES] / limit), 1)
    for norm, channels in _NORMS.items():
        exponent = _exponent(_peaks(layer, given, scaling)[norm] / limit)
        if bool((exponent > 0).any()):
            given[channels] = given.get(channels, torch.ones_like(exponent)) * exponent.exp2()
    after = _peaks(layer, given, scaling)
    where, most = max(_largest(after).items(), key=lambda item: item[1])
    if most > MOST / LEAST_HEADROOM:
        raise UserError(
            f"layer {layer.layer} reaches {most:.0f} in {where} on the calibration text, and fp16 holds {MOST:.0f}; "
            "no change of the weights makes it smaller: export with --precision bf16, which has the range of fp32"
        )
    return SafeLayer(given, LayerRange(before=max(_largest(before).values()), after=most, where=where))


def _shrink(factors: dict[str, Tensor], channels: tuple[str, str], width: int, exponent: Tensor, degree: int) -> None:
    """Divide rows by powers of two, and let the columns of the same matrix grow by the most that a row shrinks."""
    read, made = channels
    if bool((exponent > 0).any()):
        factors[made] = factors.get(made, torch.ones_like(exponent)) * (degree * exponent).exp2()
        factors[read] = factors.get(read, torch.ones(width)) * exponent.max().exp2()


def _exponent(excess: Tensor) -> Tensor:
    """The least whole e from 0 on with 2^e at least the excess."""
    return excess.clamp(min=1).log2().ceil()


def _peaks(layer: LayerActivations, factors: dict[str, Tensor], scaling: Scaling) -> dict[str, Tensor]:
    """The largest magnitudes of every channel that is in 16 bit, by the module that gives it."""
    made = {_VALUES: (CONTEXT, 1), **{norm: (channels, 1) for norm, channels in _NORMS.items()}}
    made |= {_UP_GIVES: (DOWN, scaling.degree or 1), _SQUARED: (DOWN, 1)}
    found = dict(layer.peaks)
    for module, (channels, degree) in made.items():
        if channels in factors:
            found[module] = found[module] / factors[channels] ** (1 / degree)
    return found


def _largest(peaks: dict[str, Tensor]) -> dict[str, float]:
    return {module: float(peak.max()) for module, peak in peaks.items()}
