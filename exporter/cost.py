"""What an export and its bundle take, in bytes, by the shapes of the weights alone; loads no torch.

Sizes of files are what is written, but for a few thousandths. Peaks of memory are what was measured, rounded up; the
`least` one is what no export can do without.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

from exporter.parameters import EMBEDDING, HEAD, LAYERS, is_matrix
from exporter.recipe import Precision
from exporter.scaling import DOWN, QKV, UP
from exporter.tasks import ARCHITECTURES, GENERATION

Shape = tuple[int, ...]

ALIGNMENT = 4096  # of each initializer: a page, so that a runtime can map it
INLINE = 1024  # constants up to this size stay in the graph

# A process with torch, transformers and onnxruntime, and the trace; and what every such process has at the least.
BASE, LEAST_BASE = 700_000_000, 350_000_000
SLICES = 500_000_000  # of matrices on their way into the bundle, at the most
WHOLE_GATE = 16  # bytes a parameter: the graph, and transformers in fp32 and in fp64
LAYERED_GATE, LAYERED_GATE_BASE = 2.2, 600_000_000  # times the largest layer in fp32, and beside it
RUNTIME = 150_000_000  # a process with onnxruntime that runs a bundle, beside weights and cache

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
_BITS = {"UINT8": 8, "INT4": 4, "FLOAT8E4M3FN": 8}  # of the parts of rounded matrices
_GRAPH, _GRAPH_INITIALIZER = 6_000, 320  # bytes of model.onnx, and for each initializer with the nodes about it
_RECORDS = 25_000  # manifest, golden cases, and genai_config.json

# What calibration takes, times a layer in fp32 and its activations (benchmarks/results/calibration-memory.json): the
# search for factors works on copies, and GPTQ has a second stream.
_CALIBRATION = {"range": 1.5, "scaling": 2.5, "gptq": 3.5}


@dataclass(frozen=True)
class Model:
    """What sizes follow from.

    Attributes:
        shapes: of the weights of a task's model, by their names in it; a tied head is not among them.
        tied: whether there is such a head: the graph has the embedding's matrix twice.
        table: numbers of one rotary table, max_length · rotary_dim / 2.
        embeds: whether embeddings go in, and a file with the fp32 table goes along.
    """

    shapes: Mapping[str, Shape]
    tied: bool = False
    table: int = 0
    embeds: bool = False

    @property
    def parameters(self) -> int:
        """Numbers in all weights."""
        return sum(map(prod, self.shapes.values()))

    @property
    def largest(self) -> int:
        """Numbers in the largest weight."""
        return max(map(prod, self.shapes.values()))

    @property
    def layers(self) -> int:
        """Numbers in the weights of all decoder layers."""
        return sum(prod(shape) for name, shape in self.shapes.items() if name.startswith(LAYERS))

    @property
    def layer(self) -> int:
        """Numbers in the weights of the largest decoder layer."""
        layers: dict[str, int] = {}
        for name, shape in self.shapes.items():
            if name.startswith(LAYERS):
                index = name.removeprefix(LAYERS).partition(".")[0]
                layers[index] = layers.get(index, 0) + prod(shape)
        return max(layers.values(), default=0)

    @property
    def cached(self) -> list[int]:
        """Of each layer, the numbers of a token's key."""
        return [shape[0] for name, shape in self.shapes.items() if name.endswith(".k_proj.weight")]

    @property
    def calibrated(self) -> int:
        """Numbers that calibration keeps of a token: what a layer's products read, key and value, the residual."""
        widths = {name: shape for name, shape in self.shapes.items() if name.startswith(f"{LAYERS}0.")}
        query, down = (widths.get(f"{LAYERS}0.{name}.weight", (0, 0)) for name in (QKV, DOWN))
        return 3 * query[1] + query[0] + down[1] + 2 * sum(self.cached[:1])


def model_of(shapes: Mapping[str, Shape], task: str | None, config: Mapping[str, object]) -> Model:
    """A checkpoint's model for a task, without rotary tables.

    Args:
        shapes: of the checkpoint's weights, by `exporter.parameters.shapes_in`.
        task: what it is exported for (default: what its architecture implies).
        config: its `config.json`.
    """
    own = next(iter(config.get("architectures") or ()), None)  # type: ignore[call-overload]  # raw JSON
    generation = (task or (ARCHITECTURES[own].name if own in ARCHITECTURES else GENERATION)) == GENERATION
    tied = bool(config.get("tie_word_embeddings"))
    kept = {name: shape for name, shape in shapes.items() if name != HEAD or (generation and not tied)}
    if tied and HEAD in shapes:
        kept.setdefault(EMBEDDING, shapes[HEAD])  # stored once, under either name
    return Model(kept, tied=tied and generation)


def activation_bytes(precision: Precision) -> int:
    """Bytes of a number that is not of a rounded matrix."""
    return _BYTES[precision.activations]


def data_bytes(model: Model, precision: Precision) -> int:
    """The weights as they lie in `model.onnx.data`, each on a page of its own.

    Raises:
        UserError: the target cannot round a matrix of such a shape.
    """
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in _initializers(model, precision))


def bundle_bytes(model: Model, precision: Precision, companions: int = 0) -> int:
    """All files of a bundle.

    Args:
        model: for a task, with its rotary tables.
        precision: with the recipe's choices.
        companions: bytes of tokenizer, template and configurations.

    Raises:
        UserError: as `data_bytes`.
    """
    sizes = list(_initializers(model, precision))
    total = data_bytes(model, precision) + _GRAPH + _GRAPH_INITIALIZER * len(sizes) + _RECORDS + companions
    if model.embeds:
        total += 4 * prod(model.shapes[EMBEDDING])
    if precision.kv_cache is not None:
        total += 2 * 4 * sum(model.cached)
    if precision.scaling:
        read = tuple(f"{channels}.weight" for channels in (QKV, UP, DOWN))
        total += 4 * (sum(model.cached) + sum(shape[1] for name, shape in model.shapes.items() if name.endswith(read)))
    return total


def scratch_bytes(model: Model, precision: Precision) -> int:
    """What waits on the destination's disk while weights are written: matrices whose codes were chosen by a text."""
    if not precision.gptq:
        return 0
    whole = replace(precision, activations="fp32")  # of scales
    chosen = {name: shape for name, shape in model.shapes.items() if name != EMBEDDING and _is_int4(name, precision)}
    return sum(sum(_matrix(shape, whole, name)) for name, shape in chosen.items())


def cache_bytes_per_token(model: Model, precision: Precision) -> int:
    """Keys and values of one token of one row."""
    return 2 * sum(model.cached) * _BYTES[precision.kv_cache or precision.activations]


def whole_gate_bytes(parameters: int) -> int:
    """What a process takes whose parity gate holds the whole model."""
    return BASE + WHOLE_GATE * parameters


def layered_gate_bytes(model: Model) -> int:
    """What a process takes, at the most, whose gate goes layer by layer."""
    return int(LAYERED_GATE * 4 * model.layer) + LAYERED_GATE_BASE


def export_peak_bytes(model: Model, precision: Precision, calibration_tokens: int = 0, gate: int = 0) -> int:
    """The peak of an export's resident memory.

    Args:
        model: of any task.
        precision: with the recipe's choices.
        calibration_tokens: that are run where the precision is calibrated.
        gate: what the process takes at the parity gate, 0 without it.
    """
    weights = min(SLICES, 12 * model.largest)  # read, in fp32, and in its new form
    calibration = 0
    if precision.calibrated:
        held = 4 * (model.layer + calibration_tokens * model.calibrated)
        calibration = int(
            _CALIBRATION["gptq" if precision.gptq else "scaling" if precision.scaling else "range"] * held
        )
    return max(BASE + weights, BASE + calibration, gate)


def least_peak_bytes(model: Model, precision: Precision, *, gate: bool) -> int:
    """What an export cannot do without: a process and, where the model runs, a layer in fp32."""
    return LEAST_BASE + (4 * model.layer if gate or precision.calibrated else 0)


def fitting_tokens(model: Model, precision: Precision, memory: int) -> int:
    """Tokens of all rows whose cache fits into memory beside the weights where a bundle runs; 0 for none."""
    free = memory - RUNTIME - data_bytes(model, precision)
    return max(0, free // cache_bytes_per_token(model, precision))


def _initializers(model: Model, precision: Precision) -> Iterator[int]:
    """Bytes of each initializer that lies in the data file."""
    width = activation_bytes(precision)
    for name, shape in model.shapes.items():
        if name == EMBEDDING and model.embeds:
            continue
        yield from _weight(name, shape, precision)
    if model.tied:
        yield from _weight(HEAD, model.shapes[EMBEDDING], precision)
    constants = [model.table * width] * 2
    if precision.kv_cache is not None:
        constants += [4 * count for count in model.cached for _ in range(2)]
    yield from (size for size in constants if size > INLINE)


def _weight(name: str, shape: Shape, precision: Precision) -> Iterator[int]:
    if "norm." in name:  # LayerNorm stays in fp32
        yield 4 * prod(shape)
    elif not is_matrix(name) or (name == EMBEDDING and not precision.embedding):
        yield activation_bytes(precision) * prod(shape)
    else:
        yield from _matrix(shape, precision, name)


def _matrix(shape: Shape, precision: Precision, name: str) -> Iterator[int]:
    """The parts of a matrix [out, in], or all of it."""
    rounding = precision.rounding(name)
    if rounding is None:
        yield activation_bytes(precision) * prod(shape)
        return
    for dtype, dims in rounding.parts(shape).values():
        yield activation_bytes(precision) * prod(dims) if dtype is None else -(-prod(dims) * _BITS[dtype] // 8)


def _is_int4(name: str, precision: Precision) -> bool:
    rounding = precision.rounding(name) if is_matrix(name) else None
    return rounding is not None and rounding.precision == "int4"
