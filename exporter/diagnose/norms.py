"""Hypotheses about a LayerNorm1P: epsilon, the one that is added to its weight, its form, and whose weights it has."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from exporter.diagnose import taps
from exporter.diagnose.cause import (
    EPSILON,
    LAYER_ORDER,
    NORMALISATION,
    PLUS_ONE,
    WEIGHT,
    Hypothesis,
    Place,
    others,
)

Tensor = torch.Tensor

_MODULES = {taps.NORM: "input_layernorm", taps.MLP_NORM: "post_attention_layernorm"}
_SOURCES = {taps.NORM: taps.INPUT, taps.MLP_NORM: taps.MIDDLE}
USUAL = (0.0, 1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)


def of_norm(place: Place, tap: str) -> Iterator[Hypothesis]:
    """What a norm may have become."""
    module, epsilon = _MODULES[tap], place.spec.norm_eps
    x, ours = place.ours[_SOURCES[tap]], place.ours[tap]
    weight, bias = (place.parameter(f"{module}.{name}") for name in ("weight", "bias"))
    if weight is None or bias is None:
        return

    def guess(cause: str, text: str, predicted: Tensor) -> Hypothesis:
        return Hypothesis(cause, text, {tap: predicted})

    for other in _epsilons(x, ours, 1 + weight, bias):
        if other != epsilon:
            text = f"epsilon is {other:.4g} where norm_eps is {epsilon:.4g}"
            yield guess(EPSILON, text, normed(x, 1 + weight, bias, other))
    text = "+1 is not folded into its weight: the stored weight multiplies as it is"
    yield guess(PLUS_ONE, text, normed(x, weight, bias, epsilon))
    yield guess(PLUS_ONE, "+1 is added twice to its weight", normed(x, 2 + weight, bias, epsilon))
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    yield guess(NORMALISATION, "the mean is not subtracted, as in RMSNorm", x * scale * (1 + weight) + bias)
    yield guess(NORMALISATION, "its bias is missing", normed(x, 1 + weight, 0 * bias, epsilon))
    yield guess(NORMALISATION, "it is not applied: its output is its input", x)
    yield from _other_weights(place, tap)


def normed(x: Tensor, scale: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """(x − mean) / √(variance + ε) · scale + bias."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:], scale, bias, epsilon)


def _epsilons(x: Tensor, ours: Tensor, scale: Tensor, bias: Tensor) -> list[float]:
    """Usual values, and the one that follows from the row of the least variance, to two digits.

    There s = 1 / √(variance + ε) is what centred · scale is multiplied with.
    """
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1)
    row = int(variance.argmin())
    along = centred[row] * scale
    factor = float((ours[row] - bias) @ along / (along @ along))
    solved = factor**-2 - float(variance[row]) if factor else 0.0
    return [*USUAL, float(f"{solved:.1e}")] if 0 < solved < torch.inf else list(USUAL)


def _other_weights(place: Place, tap: str) -> Iterator[Hypothesis]:
    """The weights of another norm: of another layer, or of this layer's other one."""
    x, epsilon = place.ours[_SOURCES[tap]], place.spec.norm_eps
    own = _MODULES[tap]
    for layer in [*others(place), place.layer]:
        for module in _MODULES.values():
            if layer == place.layer and (module == own or layer == place.spec.layers):
                continue
            names = [f"{module}.weight", f"{module}.bias"]
            weight, bias = (found.double() for found in place.parameters.layer(layer, names).values())
            predicted = {tap: normed(x, 1 + weight, bias, epsilon)}
            if layer == place.layer:
                yield Hypothesis(WEIGHT, f"it has the weights of {module}", predicted)
            elif module == own:
                queries = _queries(place, layer)
                whole = "computes with the weights" if queries else "has the norm's weights"
                yield Hypothesis(LAYER_ORDER, f"it {whole} of layer {layer}", {**predicted, **queries})


def _queries(place: Place, layer: int) -> dict[str, Tensor]:
    """What the bundle's queries are if they are made with another layer's matrix, where they are."""
    if taps.NORM not in place.ours or taps.Q not in place.ours or place.layer == place.spec.layers:
        return {}
    matrix = place.parameters.layer(layer, ["self_attn.q_proj.weight"])["self_attn.q_proj.weight"].double()
    predicted = place.ours[taps.NORM] @ matrix.T
    near = (place.ours[taps.Q] - predicted).abs().max() <= 10 * place.limits[taps.Q]
    return {taps.Q: predicted} if bool(near) else {}
