"""The Session of an evaluated graph or network, so that what checks a backend checks these too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Protocol, Self

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from exporter import __version__
from exporter.engine_options import NATIVE, PLUGIN, BuildOptions, check_options, local_capability
from exporter.evaluate.network import compile_network
from exporter.evaluate.onnx_graph import compile_graph, load_graph
from exporter.evaluate.program import Program
from exporter.evaluate.tensors import as_torch
from exporter.network import parse
from exporter.plugin_attention import change_of, use_split_attention
from plugins.tensorrt_network import LOWER_RIGHT
from runtime.bundle import Bundle, CacheGeometry
from runtime.contract import LOGITS, past_names, present_names
from runtime.errors import UserError
from runtime.hardware import cpu_name
from runtime.manifest import MODEL
from runtime.session import Floats, Ints, Session
from runtime.steps import Limits, Step, check_allocation, contract_of
from runtime.tensorrt_api import FLAVORS, import_tensorrt

WITH_OPS = {NATIVE: "", PLUGIN: " with the attention kernels' ops"}  # what is evaluated, as results name it
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


class Cache(Protocol):
    """Keys and values [slots, kv_heads, capacity, head_dim] of `layers` layers, as the graph has them."""

    layers: int

    def read(self, layer: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """A layer's keys and values."""
        ...

    def write(self, layer: int, key: NDArray[Any], value: NDArray[Any]) -> None:
        """Fill one layer's keys and values."""
        ...


class CachedSession(Session, Protocol):
    """A session whose cache can be read and written: keys and values [slots, kv_heads, capacity, head_dim]."""

    @property
    def cache(self) -> Cache:
        """The cache that steps update in place."""
        ...


class EvaluatedCache:
    """Per layer one key and one value tensor [slots, kv_heads, capacity, head_dim], in the graph's dtype."""

    def __init__(self, geometry: CacheGeometry, slots: int, capacity: int, only: int | None = None) -> None:
        """Allocate it for every layer, or for one of them only."""
        self.shape = (slots, geometry.kv_heads, capacity, geometry.head_dim)
        self.layers = geometry.layers
        self.tensors = {
            name: torch.zeros(self.shape, dtype=_DTYPES[geometry.dtype])
            for layer in (range(self.layers) if only is None else [only])
            for name in past_names(layer)
        }

    def update(self, layer: int, rows: slice, outputs: Mapping[str, torch.Tensor]) -> None:
        """Take over what a graph gave for some rows of a layer."""
        for past, present in zip(past_names(layer), present_names(layer), strict=True):
            self.tensors[past][rows] = outputs[present]

    def read(self, layer: int) -> tuple[Floats, Floats]:
        """A layer's keys and values [slots, kv_heads, capacity, head_dim] in fp32, which holds every number exactly."""
        key, value = (self.tensors[name].float().numpy() for name in past_names(layer))
        return key, value

    def write(self, layer: int, key: NDArray[Any], value: NDArray[Any]) -> None:
        """Fill one layer's keys and values, each [slots, kv_heads, capacity, head_dim], rounded as the cache is."""
        for name, given in zip(past_names(layer), (key, value), strict=True):
            if given.shape != self.shape:
                raise ValueError(f"expected {self.shape}, found {given.shape}")
            self.tensors[name].copy_(as_torch(np.ascontiguousarray(given)))


class EvaluatedSession:
    """See `runtime.session.Session` for what the members mean.

    Attributes:
        non_finite: every edge that was not finite in a step of this session or of one reopened from it, in the order
            of the steps: what follows from the first of them is its consequence.
    """

    def __init__(self, bundle: Bundle, programs: Callable[[int], Program], backend: str, version: str) -> None:
        """Nothing is read yet: the first step asks for the program.

        Args:
            bundle: what is evaluated.
            programs: the program for a capacity; a network's capacity is static.
            backend: what is evaluated, in words.
            version: of what made it.
        """
        self.backend, self.version, self.device = backend, version, cpu_name()
        self.choice = ""
        self.max_slots: int | None = None
        self.max_capacity = bundle.manifest.max_length
        self.vocab_size = bundle.vocab_size
        self.non_finite: list[str] = []
        self._bundle = bundle
        self._programs = programs
        self._contract = contract_of(bundle)
        self._allocate(1, 1)

    def reopen(self, *, slots: int, capacity: int) -> Self:
        """The same graph with a cache of its own."""
        other = copy.copy(self)
        other.__dict__.pop("_program", None)
        other._allocate(slots, capacity)
        return other

    def step(self, tokens: Ints, lengths: Ints, past_lengths: Ints, slots: Ints | None = None, keep: int = 1) -> Floats:
        """Append tokens and return logits, float32 [batch, keep, vocab]; see `Session.step`."""
        limits = Limits(self.slots, self.capacity, self.vocab_size, self._bundle.manifest.max_length)
        step = limits.checked(tokens, lengths, past_lengths, slots, keep)
        runs = [self._run(step.rows(rows)) for rows in self._contract.split(step, self.capacity)]
        return np.concatenate(runs)

    def copy_prefix(self, source: int, target: int, length: int) -> int:
        """Copy the first tokens of a slot; see `Session.copy_prefix`."""
        for tensor in self.cache.tensors.values():
            tensor[target, :, :length] = tensor[source, :, :length]
        return length

    def exchange(self, one: int, other: int, length: int) -> bool:
        """Let two slots have each other's first tokens; see `Session.exchange`."""
        for tensor in self.cache.tensors.values():
            tensor[[one, other], :, :length] = tensor[[other, one], :, :length]
        return True

    def _run(self, step: Step) -> Floats:
        """Run rows of consecutive slots."""
        rows = slice(int(step.slots[0]), int(step.slots[0]) + len(step.slots))
        feeds = {name: as_torch(array) for name, array in self._contract.feeds(step).items()}
        result = self._program.run(feeds | {name: cache[rows] for name, cache in self.cache.tensors.items()})
        self.non_finite += result.non_finite
        for layer in range(self.cache.layers):
            self.cache.update(layer, rows, result.outputs)
        logits: Floats = result.outputs[LOGITS].float().numpy()
        return logits

    @cached_property
    def _program(self) -> Program:
        return self._programs(self.capacity)

    def _allocate(self, slots: int, capacity: int) -> None:
        check_allocation(slots, capacity, self._bundle.manifest.max_length, self._bundle.path)
        self.slots, self.capacity = slots, capacity
        self.cache = EvaluatedCache(self._bundle.cache_geometry, slots, capacity)


def evaluate_graph(bundle: Bundle, attention: str = NATIVE) -> EvaluatedSession:
    """A session of the bundle's ONNX graph, which is one program whatever the capacity.

    Args:
        bundle: of text generation with a cache.
        attention: `PLUGIN` for the graph that an engine with the attention kernels is built of.

    Raises:
        UserError: the graph has no form with the kernels' ops.
    """
    program = compile_graph(graph_of(bundle, attention))
    name = f"nemotron-export evaluation of the ONNX graph{WITH_OPS[attention]}"
    return EvaluatedSession(bundle, lambda _: program, name, __version__)


def graph_of(bundle: Bundle, attention: str = NATIVE) -> ir.Model:
    """The bundle's graph, with the attention kernels' ops for `PLUGIN`; weights stay in their files.

    Raises:
        UserError: the graph has no form with the kernels' ops.
    """
    model = ir.load(bundle.file(MODEL))
    if attention == PLUGIN:
        use_split_attention(model, bundle)
    return model


def evaluate_network(
    bundle: Bundle, flavor: str | None = None, causality: str = LOWER_RIGHT, attention: str = NATIVE
) -> EvaluatedSession:
    """A session of what TensorRT's parser makes of the bundle's graph, mended as `build` mends it; no GPU is needed.

    Each capacity is a network of its own, parsed when its first step comes.

    Args:
        bundle: one of target `tensorrt`.
        flavor: whose parser (default: the one that is installed, `tensorrt` first).
        causality: as in `build`.
        attention: as in `build`; `PLUGIN` needs a GPU, for which kernels are registered.

    Raises:
        UserError: the bundle is of another target, or no TensorRT is installed.
    """
    name, version, programs = network_programs(bundle, flavor, causality, attention)
    return EvaluatedSession(bundle, programs, name, version)


def network_programs(
    bundle: Bundle, flavor: str | None = None, causality: str = LOWER_RIGHT, attention: str = NATIVE
) -> tuple[str, str, Callable[[int], Program]]:
    """What is evaluated of a bundle's network and its version, and the program for a capacity; see `evaluate_network`.

    Raises:
        UserError: the bundle is of another target, or no TensorRT is installed.
    """
    check_for_network(bundle)
    flavor, trt = installed("tensorrt" if attention == PLUGIN and flavor is None else flavor)
    options = BuildOptions(flavor, attention=attention)
    check_options(options)
    change = change_of(trt, options, local_capability(), bundle)
    weights = load_graph(bundle.file(MODEL)).constants

    def program(capacity: int) -> Program:
        parsed = parse(trt, bundle, capacity, change)
        parsed.mend(causality)
        return compile_network(trt, parsed.network, weights, owner=parsed, plugins=parsed.plugins)

    return f"nemotron-export evaluation of the {flavor} network{WITH_OPS[attention]}", trt.__version__, program


def check_for_network(bundle: Bundle) -> None:
    """Refuse a bundle whose graph is not TensorRT's to parse.

    Raises:
        UserError: it is of another target.
    """
    if bundle.manifest.target != "tensorrt":
        raise UserError(f"{bundle.path} is for {bundle.manifest.target}; export it with --target tensorrt")


def installed(flavor: str | None = None) -> tuple[str, Any]:
    """A flavor's name and module: the one asked for, else the first that can be imported.

    Raises:
        UserError: there is none.
    """
    if flavor is not None:
        return flavor, import_tensorrt(flavor)
    reasons = []
    for name in FLAVORS:
        try:
            return name, import_tensorrt(name)
        except UserError as error:
            reasons.append(str(error))
    raise UserError(f"no TensorRT parses networks here: {'; '.join(reasons)}")
