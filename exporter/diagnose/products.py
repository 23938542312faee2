"""Hypotheses about a product with a matrix: other heads, another layer's matrix, a bias, a weight, a row of weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from exporter.diagnose import taps
from exporter.diagnose.cause import CONSTANT, HEADS, LAYER_ORDER, OVERFLOW, WEIGHT, Hypothesis, Place, others
from exporter.diagnose.rotation import heads_of

Tensor = torch.Tensor

# Tap → the module that makes it, and the tap that it reads.
MODULES = {
    taps.Q: ("self_attn.q_proj", taps.NORM),
    taps.K: ("self_attn.k_proj", taps.NORM),
    taps.V: ("self_attn.v_proj", taps.NORM),
    taps.ATTENDED: ("self_attn.o_proj", taps.CONTEXT),
    taps.UP: ("mlp.up_proj", taps.MLP_NORM),
    taps.DOWN: ("mlp.down_proj", taps.HIDDEN),
}
FEW = 8  # channels that may be wrong by a weight's fault


def of_product(place: Place, tap: str) -> Iterator[Hypothesis]:
    """What a product may have become."""
    module, source = MODULES[tap]
    x, ours = place.ours.get(source), place.ours[tap]
    if x is None:
        return
    matrix, bias = place.parameter(f"{module}.weight"), place.parameter(f"{module}.bias")
    assert matrix is not None
    exact = x @ matrix.T + (0 if bias is None else bias)
    if tap in {taps.Q, taps.K, taps.V}:
        yield from _permuted(ours, exact, tap, module, place.spec.head_dim)
    for layer in others(place):
        given = place.parameters.layer(layer, [f"{module}.weight"])[f"{module}.weight"].double()
        predicted = x @ given.T + (0 if bias is None else bias)
        yield Hypothesis(LAYER_ORDER, f"{module} has the matrix of layer {layer}", {tap: predicted})
    if bias is not None:
        yield Hypothesis(WEIGHT, f"the bias of {module} is missing", {tap: exact - bias})
    if matrix.shape[0] == matrix.shape[1]:
        yield Hypothesis(WEIGHT, f"the matrix of {module} is transposed", {tap: x @ matrix})
    yield from constant_factor(ours, exact, tap)
    yield from _few_rows(place, tap, exact)


def constant_factor(ours: Tensor, exact: Tensor, tap: str) -> Iterator[Hypothesis]:
    """All of it multiplied by one number."""
    factor = float((ours * exact).sum() / exact.square().sum())
    if abs(factor) < torch.inf:
        yield Hypothesis(CONSTANT, f"it is {factor:.6g} times what it should be", {tap: factor * exact})


def _permuted(ours: Tensor, exact: Tensor, tap: str, module: str, width: int) -> Iterator[Hypothesis]:
    """Heads in another order: for each of the bundle's the nearest."""
    given, wanted = (heads_of(x, width).transpose(0, 1).flatten(1) for x in (ours, exact))
    if not bool(given.isfinite().all()):
        return
    order = torch.cdist(given, wanted).argmin(1).tolist()
    if sorted(order) == list(range(len(order))) and order != sorted(order):
        predicted = heads_of(exact, width)[:, order].flatten(1)
        yield Hypothesis(HEADS, f"the heads of {module} stand in the order {order}", {tap: predicted})


def _few_rows(place: Place, tap: str, exact: Tensor) -> Iterator[Hypothesis]:
    """Channels that alone are wrong: by one weight each, whose amount follows, or by more."""
    (module, source), ours = MODULES[tap], place.ours[tap]
    apart = ours - exact
    wrong = (~(apart.abs() <= place.limits[tap])).any(0).nonzero().flatten().tolist()
    if not 0 < len(wrong) <= FEW:
        return
    predicted = exact.clone()
    told = []
    for row in wrong:
        solved = _one_weight(place.ours[source], apart[:, row])
        predicted[:, row] += torch.nan if solved is None else solved[1] * place.ours[source][:, solved[0]]
        told.append(_told(place, module, row, solved))
    overflows = not all(bool(place.ours[later].isfinite().all()) for later in (tap, taps.HIDDEN, taps.OUTPUT))
    text = "; ".join(told)
    if overflows:
        text += f"; what follows passes {place.largest:.4g} and is not finite"
    yield Hypothesis(OVERFLOW if overflows else WEIGHT, text, {tap: predicted})


def _one_weight(x: Tensor, apart: Tensor) -> tuple[int, float] | None:
    """The column whose weight alone explains a channel's difference [tokens], and by how much it is off."""
    if not bool(apart.isfinite().all()) or len(apart) < 2:
        return None
    along = (x * apart[:, None]).sum(0)
    cosines = along / (x.norm(dim=0) * apart.norm()).clamp_min(1e-300)
    column = int(cosines.abs().argmax())
    if 1 - float(cosines[column].abs()) > 1e-6:
        return None
    return column, float(along[column] / x[:, column].square().sum())


def _told(place: Place, module: str, row: int, solved: tuple[int, float] | None) -> str:
    if solved is None:
        return f"row {row} of {module}.weight is wrong, and no other"
    stored = float(place.stored[f"{module}.weight"][row, solved[0]])
    return f"{module}.weight[{row}, {solved[0]}] is {stored + solved[1]:.4g} where the checkpoint has {stored:.4g}"
