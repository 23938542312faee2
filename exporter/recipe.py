"""What precision each matrix of a model gets: named presets, or a file of the same form.

A recipe is TOML::

    activations = "fp16"          # of everything that is not a weight matrix; default: the target's
    block = 32                    # weights that share a scale, of the export's own precision
    symmetric = false             # whether zero is the middle of the grid; else each block has a zero point
    method = "gptq"               # choose 4-bit codes by a calibration text; default: "nearest"
    scaling = true                # scale channels by what the calibration text makes of them; default: false

    [layers]                      # first match counts; the rest has the precision of the export
    "lm_head" = "int8"
    "model.layers.0" = "int8"     # everything in it
    "*.mlp.down_proj" = "int8"
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Any

from exporter.rounding import BLOCKS, BlockInt4, BlockNBits, ChannelFp8, Rounding
from runtime.errors import UserError

FLOATS = ("fp32", "fp16", "bf16")
DEFAULT = "plain"
METHODS = ("nearest", "gptq")
_KEYS = {"activations": str, "block": int, "symmetric": bool, "method": str, "scaling": bool, "layers": dict}


@dataclass(frozen=True)
class Recipe:
    """What a recipe's file says; None where it leaves the choice to the target.

    Attributes:
        name: of the preset, or of the file.
        method: how codes are chosen, one of `METHODS`.
        scaling: whether channels are scaled, by what goes through them, before matrices are rounded.
        layers: pattern of a module's name → precision, in the file's order.
    """

    name: str = DEFAULT
    activations: str | None = None
    block: int | None = None
    symmetric: bool | None = None
    method: str = METHODS[0]
    scaling: bool = False
    layers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Precision:
    """A precision of a target, with a recipe's choices made.

    Attributes:
        name: as on the command line.
        activations: one of `FLOATS`, of activations, cache, and weights that are not rounded.
        recipe: where the choices come from.
        weights: how matrices are rounded; None where they have the activations' dtype.
        others: how the matrices of a pattern are, in the recipe's order.
        embedding: whether the embedding is rounded too.
        fp16_safe: whether fp16 activations are kept in range.
        kv_cache: what the cache is rounded to; None where it is as activations are.
    """

    name: str = "fp32"
    activations: str = "fp32"
    recipe: Recipe = Recipe()
    weights: Rounding | None = None
    others: tuple[tuple[str, Rounding | None], ...] = ()
    embedding: bool = False
    fp16_safe: bool = True
    kv_cache: str | None = None

    @property
    def exact(self) -> bool:
        """Whether everything is in fp32."""
        return self.name == "fp32" and self.kv_cache is None

    @property
    def scaling(self) -> bool:
        """Whether channels are scaled by what goes through them."""
        return self.recipe.scaling

    @property
    def gptq(self) -> bool:
        """Whether 4-bit codes are chosen by what they multiply."""
        return self.recipe.method == "gptq"

    @property
    def ranged(self) -> bool:
        """Whether layers are kept in fp16's range."""
        return self.fp16_safe and self.activations == "fp16"

    @property
    def calibrated(self) -> tuple[str, ...]:
        """What a calibration text is needed for."""
        needs = {
            "scaling": self.scaling,
            "gptq": self.gptq,
            "fp16 range": self.ranged,
            "kv cache": self.kv_cache is not None,
        }
        return tuple(name for name, needed in needs.items() if needed)

    @property
    def quantized(self) -> bool:
        """Whether any matrix may be rounded to a grid of few bits."""
        return self.weights is not None or any(rounding is not None for _, rounding in self.others)

    def rounding(self, tensor: str) -> Rounding | None:
        """How a matrix of this name (`model.layers.0.mlp.up_proj.weight`) is rounded; None: as activations are."""
        return next((rounding for pattern, rounding in self.others if _matches(pattern, tensor)), self.weights)

    def check_layers(self, tensors: Iterable[str]) -> None:
        """Refuse a recipe that names what the model does not have.

        Raises:
            UserError: names the pattern, and what there is.
        """
        known = sorted(tensors)
        for pattern, _ in self.others:
            if not any(_matches(pattern, tensor) for tensor in known):
                shown = ", ".join(name.removesuffix(".weight") for name in known[:3] + known[-1:])
                raise UserError(
                    f"recipe {self.recipe.name} names {pattern!r}, which is no matrix of this model; "
                    f"there are {shown} and more like them"
                )


def precision_of(target: str, name: str, recipe: Recipe) -> Precision:
    """A target's precision, with a recipe's choices.

    Args:
        target: `onnxruntime` or `tensorrt`.
        name: one of the target's precisions.
        recipe: see `read_recipe`.

    Raises:
        UserError: a choice that the target cannot run.
    """
    known = tuple(FORMS[target])
    if name not in known:
        hint = "; TensorRT dequantises int8 weights wholesale: take fp8 or int4" if name == "int8" else ""
        raise UserError(f"target {target} has no precision {name!r}; known: {', '.join(known)}{hint}")
    if name in FLOATS and recipe != Recipe():
        raise UserError(f"recipe {recipe.name} is of rounded weights; --precision {name} takes none")
    activations = recipe.activations or (name if name in FLOATS else _ACTIVATIONS[target])
    for what, value in (("activations", activations), *recipe.layers):
        allowed = [choice for choice in known if what != "activations" or choice in FLOATS]
        if value not in allowed:
            raise UserError(
                f"recipe {recipe.name} has {value!r} for {what}, which target {target} does not; "
                f"known: {', '.join(allowed)}"
            )
        if what != "activations" and value in FLOATS and value != activations:
            raise UserError(
                f"recipe {recipe.name} has {value} for {what} where activations are {activations}; "
                f"a matrix that is not rounded has the activations' precision: write {activations}"
            )
    if target == "tensorrt" and activations == "fp32" and name not in FLOATS:
        raise UserError(f"recipe {recipe.name} has fp32 activations; TensorRT takes rounded weights with fp16 or bf16")
    make = FORMS[target]
    return Precision(
        name=name,
        activations=activations,
        recipe=recipe,
        weights=make[name](recipe),
        others=tuple((pattern, make[value](recipe if value == name else Recipe())) for pattern, value in recipe.layers),
        embedding=target == "onnxruntime",
    )


def read_recipe(choice: str | None) -> Recipe:
    """A preset by its name, or a TOML file by its path; None for the default preset.

    Raises:
        UserError: neither, or the file is not of the form above.
    """
    presets = {entry.name.removesuffix(".toml"): entry for entry in (files("exporter") / "recipes").iterdir()
               if entry.name.endswith(".toml")}  # fmt: skip
    name = choice or DEFAULT
    path = Path(name)
    if name in presets:
        text = presets[name].read_text(encoding="utf-8")
    elif path.suffix == ".toml":
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read recipe {path}: {error}; give a TOML file") from error
        name = path.stem
    else:
        raise UserError(f"unknown recipe {name!r}; known: {', '.join(sorted(presets))}, or a .toml file")
    try:
        return _parsed(name, tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"recipe {path} is not TOML ({error}); correct it") from error


def _parsed(name: str, data: dict[str, Any]) -> Recipe:
    for key, value in data.items():
        if key not in _KEYS:
            raise UserError(f"recipe {name} has {key!r}; known: {', '.join(_KEYS)}")
        if type(value) is not _KEYS[key]:
            raise UserError(f"recipe {name}: {key} should be {_KEYS[key].__name__}, found {value!r}; correct it")
    if data.get("method", METHODS[0]) not in METHODS:
        raise UserError(f"recipe {name} has method {data['method']!r}; known: {', '.join(METHODS)}")
    if "block" in data and data["block"] not in BLOCKS:
        raise UserError(f"recipe {name} has blocks of {data['block']}; known: {', '.join(map(str, BLOCKS))}")
    layers = data.pop("layers", {})
    for pattern, value in layers.items():
        if not isinstance(value, str):
            raise UserError(f"recipe {name}: the precision of {pattern!r} should be text, found {value!r}; correct it")
    return Recipe(name=name, layers=tuple(layers.items()), **data)


def _matches(pattern: str, tensor: str) -> bool:
    """Whether a pattern names the tensor, its module, or one that holds it."""
    parts = tensor.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def _nbits(bits: int, block: int, symmetric: bool) -> Any:
    def make(recipe: Recipe) -> Rounding:
        even = symmetric if recipe.symmetric is None else recipe.symmetric
        return BlockNBits(bits, recipe.block or block, even)

    return make


def _int4_for_tensorrt(recipe: Recipe) -> Rounding:
    if recipe.symmetric is False or recipe.block not in (None, 64, 128):
        raise UserError(f"recipe {recipe.name}: TensorRT takes int4 in symmetric blocks of 64 or 128; correct it")
    return BlockInt4(recipe.block or 128)


def _fp8(_: Recipe) -> Rounding:
    return ChannelFp8()


def _whole(_: Recipe) -> None:
    return None


_ACTIVATIONS = {"onnxruntime": "fp32", "tensorrt": "fp16"}
# Target → precision → how its matrices are rounded.
FORMS: dict[str, dict[str, Any]] = {
    "onnxruntime": {
        **dict.fromkeys(FLOATS, _whole),
        "int8": _nbits(8, 128, True),
        "int4": _nbits(4, 32, False),
    },
    "tensorrt": {**dict.fromkeys(FLOATS, _whole), "fp8": _fp8, "int4": _int4_for_tensorrt},
}
