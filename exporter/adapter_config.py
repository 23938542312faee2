"""`adapter_config.json` of a LoRA adapter: ranks and scalings, and a refusal of all that is more than B@A."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from exporter.text_files import read_object
from runtime.errors import UserError

CONFIG = "adapter_config.json"
T = TypeVar("T")

# What says where an adapter is from, how it was trained, or which modules have one: the weights' names tell that.
_IRRELEVANT = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
)
_READ = (
    "alpha_pattern",
    "bias",
    "init_lora_weights",
    "lora_alpha",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "use_rslora",
)
# Ways to begin that leave the checkpoint's weights as they are; others (pissa, olora, corda, loftq, …) change them.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterConfig:
    """What merging needs to know; the patterns' keys are regular expressions for the ends of module names."""

    r: int
    alpha: float
    rank_stabilised: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    modules_to_save: tuple[str, ...]

    @classmethod
    def read(cls, directory: Path) -> AdapterConfig:
        """Read and check the configuration in an adapter's directory.

        Raises:
            UserError: there is none, or it asks for something else than adding B@A, or holds a value that is none.
        """
        path = directory / CONFIG
        if not path.is_file():
            raise UserError(f"{directory} has no {CONFIG}; give the directory that peft saved an adapter to")
        raw = read_object(path)
        _check_known(raw, path)
        return cls(
            r=_number(raw, "r", 8, path, whole=True),
            alpha=_number(raw, "lora_alpha", 8, path),
            rank_stabilised=bool(raw.get("use_rslora")),
            rank_pattern=_pattern(raw, "rank_pattern", path, whole=True),
            alpha_pattern=_pattern(raw, "alpha_pattern", path),
            modules_to_save=_names(raw, path),
        )

    def rank(self, module: str) -> int:
        """The rank r of a module's adapter, such as of `model.layers.0.mlp.up_proj`."""
        return _matching(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """What B@A of a module is multiplied with: α/r, or α/√r of rank-stabilised LoRA (arXiv:2312.03732)."""
        rank = self.rank(module)
        alpha = _matching(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def _matching(pattern: Mapping[str, T], module: str, default: T) -> T:
    """The value of the first key that matches the end of a module's name, as peft chooses it."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _check_known(raw: dict[str, Any], path: Path) -> None:
    remedy = "merge it with peft and export the merged checkpoint"
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type {raw.get('peft_type')!r} cannot be merged here, only 'LORA'; {remedy}")
    if raw.get("bias", "none") != "none":
        raise UserError(f"{path}: bias is {raw['bias']!r} where 'none' alone can be merged here; {remedy}")
    start = raw.get("init_lora_weights")
    if not any(start is known or (isinstance(known, str) and start == known) for known in _STARTS):
        raise UserError(
            f"{path}: init_lora_weights {start!r} changes the checkpoint's own weights; convert it to plain LoRA "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for name, value in sorted(raw.items()):
        if value and name not in _IRRELEVANT and name not in _READ:  # a feature that is off is false, null or empty
            raise UserError(f"{path}: {name} ({str(value)[:40]}) cannot be merged here; {remedy}")


def _number(raw: dict[str, Any], name: str, default: int, path: Path, *, whole: bool = False) -> Any:
    value = raw.get(name, default)
    return _checked(value, name, path, whole=whole)


def _checked(value: object, name: str, path: Path, *, whole: bool) -> Any:
    kind: Any = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value) or (whole and value < 1):
        wanted = "an integer above 0" if whole else "a number"
        raise UserError(f"{path}: {name} should be {wanted}, found {value!r}; correct it")
    return value


def _pattern(raw: dict[str, Any], name: str, path: Path, *, whole: bool = False) -> dict[str, Any]:
    pattern = raw.get(name) or {}
    if not isinstance(pattern, dict):
        raise UserError(f"{path}: {name} should map module names to numbers, found {str(pattern)[:40]!r}; correct it")
    for key, value in pattern.items():
        _checked(value, f"{name}.{key}", path, whole=whole)
        try:
            re.compile(key)
        except re.error as error:
            raise UserError(f"{path}: {name} has {key!r}, which is no pattern ({error}); correct it") from error
    return pattern


def _names(raw: dict[str, Any], path: Path) -> tuple[str, ...]:
    names = raw.get("modules_to_save") or ()
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: modules_to_save should be a list of module names, found {names!r}; correct it")
    return tuple(names)
