"""The one reader of configuration attributes: a Hugging Face configuration becomes a frozen `NemotronSpec`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.rope import ROPE_TYPES, check_rope
from exporter.tasks import ARCHITECTURES
from exporter.text_files import read_object
from runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import NemotronConfig

# transformers activations that carry learned tensors of their own; the Nemotron MLP has no place for them.
LEARNED_ACTIVATIONS = ("prelu", "xielu")

# What a model has at least one of, by the configuration's names.
COUNTS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class NemotronSpec:
    """What the export needs to know of a checkpoint's architecture.

    `rotary_dim` is the number of channels of a head that rotate; `config` is the normalised transformers
    configuration, used only to build transformers' own modules.
    """

    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_type: str
    vocab: int
    max_positions: int
    norm_eps: float
    activation: str
    tied: bool
    pad_token: int | None
    config: NemotronConfig = field(repr=False, compare=False)

    @property
    def scale(self) -> float:
        """What attention multiplies q·k with."""
        return float(self.head_dim**-0.5)


def read_spec(directory: Path) -> NemotronSpec:
    """Read and check `config.json` of a checkpoint directory.

    Raises:
        UserError: no or unreadable configuration, another architecture, or a value this exporter does not know.
    """
    return spec_from_config(read_config(directory), str(directory / "config.json"))


def read_config(directory: Path) -> dict[str, Any]:
    """The content of a checkpoint's `config.json`, as it is written.

    Raises:
        UserError: it is missing or no JSON object.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: {directory} is not a Hugging Face checkpoint")
    return read_object(path)


def spec_from_config(raw: dict[str, Any], origin: str) -> NemotronSpec:
    """Build the spec from the content of a `config.json`; `origin` names it in errors."""
    _check_known_values(raw, origin)
    _check_labels(raw, origin)
    config = _normalised(raw, origin)
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    assert config.head_dim is not None  # filled in by transformers
    assert config.num_key_value_heads is not None  # and by us
    _check_rope_numbers(rope, origin)
    # `proportional` rotates every channel, those beyond the factor by the angle 0.
    factor = 1.0 if rope["rope_type"] == "proportional" else rope.get("partial_rotary_factor", 1.0)
    rotated = int(config.head_dim * factor)
    spec = NemotronSpec(
        architecture=_architecture(raw, origin),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rotary_dim=2 * -(-rotated // 2),  # one frequency per pair of channels, as transformers counts them
        rope_type=rope["rope_type"],
        vocab=config.vocab_size,
        max_positions=config.max_position_embeddings,
        norm_eps=config.norm_eps,
        activation=config.hidden_act,
        tied=config.tie_word_embeddings,
        pad_token=config.pad_token_id,
        config=config,
    )
    _check_consistent(spec, origin)
    check_rope(spec, origin)
    return spec


def _check_known_values(raw: dict[str, Any], origin: str) -> None:
    from transformers.activations import ACT2FN

    model_type = raw.get("model_type")
    if model_type != "nemotron":
        raise UserError(f"{origin}: model_type is {model_type!r}; only 'nemotron' can be exported")
    activations = sorted(set(ACT2FN) - set(LEARNED_ACTIVATIONS))
    activation = raw.get("hidden_act", "relu2")
    if activation not in activations:
        raise UserError(f"{origin}: hidden_act {activation!r} is unknown; known: {', '.join(activations)}")
    for name in ("rope_parameters", "rope_scaling"):  # transformers lets the older name win
        rope = raw.get(name) or {}
        if not isinstance(rope, dict):
            raise UserError(f"{origin}: {name} is not a JSON object but {rope!r}; correct it")
        for rope_type in (rope.get("rope_type", "default"), rope.get("type", "default")):
            if rope_type not in ROPE_TYPES:
                known = ", ".join(ROPE_TYPES)
                raise UserError(f"{origin}: rope type {rope_type!r} cannot be exported; known: {known}")


def _architecture(raw: dict[str, Any], origin: str) -> str:
    names = raw.get("architectures") or ["NemotronForCausalLM"]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise UserError(f"{origin}: architectures should be a list of class names, found {names!r}; correct it")
    if names[0] not in ARCHITECTURES:
        raise UserError(f"{origin}: architecture {names[0]} cannot be exported; known: {', '.join(ARCHITECTURES)}")
    return names[0]


def _check_rope_numbers(rope: dict[str, Any], origin: str) -> None:
    for name in ("rope_theta", "partial_rotary_factor", "factor"):
        value = rope.get(name, 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"{origin}: {name} should be a number above 0, found {value!r}; correct it")


def _normalised(raw: dict[str, Any], origin: str) -> NemotronConfig:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import NemotronConfig

    values = dict(raw)
    if values.get("num_key_value_heads") is None:  # absent means one per query head, which transformers does not fill
        values["num_key_value_heads"] = values.get("num_attention_heads", NemotronConfig.num_attention_heads)
    try:
        return NemotronConfig.from_dict(values)
    except (StrictDataclassError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{origin}: transformers refuses the configuration: {reason}; correct it") from error


def _check_consistent(spec: NemotronSpec, origin: str) -> None:
    for name in COUNTS:
        if (count := getattr(spec.config, name)) < 1:
            raise UserError(f"{origin}: {name} is {count}, which must be at least 1; correct it")
    if not 0 <= spec.norm_eps < math.inf:
        raise UserError(f"{origin}: norm_eps is {spec.norm_eps}, which must be 0 or more; correct it")
    if spec.heads % spec.kv_heads:
        raise UserError(
            f"{origin}: {spec.heads} attention heads cannot share {spec.kv_heads} key/value heads evenly; correct it"
        )
    if not 1 <= spec.rotary_dim <= spec.head_dim:
        raise UserError(
            f"{origin}: {spec.rotary_dim} channels of a head would rotate, head_dim is {spec.head_dim}; "
            "correct partial_rotary_factor"
        )
    if spec.pad_token is not None and not 0 <= spec.pad_token < spec.vocab:
        raise UserError(
            f"{origin}: pad_token_id {spec.pad_token} is not within the model's vocabulary, 0…{spec.vocab - 1}; "
            "correct it, or set it to null"
        )


def _check_labels(raw: dict[str, Any], origin: str) -> None:
    """The names of labels, where there are any, are of labels 0 to n - 1 and of nothing else."""
    names, count = raw.get("id2label"), raw.get("num_labels")
    if names is None:
        return
    if not isinstance(names, dict) or {str(key) for key in names} != {str(label) for label in range(len(names))}:
        raise UserError(f"{origin}: id2label should map 0, 1, … to names, found {str(names)[:80]}; correct it")
    if count is not None and count != len(names):
        raise UserError(f"{origin}: id2label names {len(names)} labels, num_labels says {count}; correct one of them")
    inverse = raw.get("label2id")
    if inverse is not None and (not isinstance(inverse, dict) or len(inverse) != len(set(map(str, names.values())))):
        raise UserError(f"{origin}: label2id has other labels than id2label; correct one of them")
