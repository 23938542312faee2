"""`build --attention plugin`: the engine's graph with the kernels' ops, and the kernels registered with TensorRT.

Imports neither torch nor transformers: it runs on the deployment machine. Triton is needed while an engine is built,
and not where it runs: the kernels are in the engine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from typing import Any

import onnx

from exporter.engine_options import NATIVE, PLUGIN, BuildOptions
from exporter.network import Change
from runtime.bundle import Bundle
from runtime.contract import INPUT_IDS, WRITE_INDICES
from runtime.errors import UserError

Marks = Callable[[Mapping[str, Any], str], Mapping[str, Any]]

NATIVE_INSTEAD = "build with --attention native"
INSTALL = "pip install 'nemotron-export[kernels]'"


def change_of(trt: Any, options: BuildOptions, capability: str | None, bundle: Bundle) -> Change | None:
    """What `exporter.network.parse` does to the graph for the attention that is asked for; None for TensorRT's own.

    Args:
        trt: TensorRT's module.
        options: what is built.
        capability: of the GPU to build for, as "8.9"; None where there is none.
        bundle: whose graph it is.

    Raises:
        UserError: the kernels are for another flavor, GPU or TensorRT, or what compiles them is missing.
    """
    if options.attention == NATIVE:
        return None
    if capability is None:
        raise UserError(f"no NVIDIA GPU is found here, for which attention kernels are compiled; {NATIVE_INSTEAD}")
    return partial(KernelPlugins(trt, options, capability).rewritten, bundle=bundle)


class KernelPlugins:
    """The kernels for one GPU's capability: refuses what they cannot do before anything is parsed."""

    def __init__(self, trt: Any, options: BuildOptions, capability: str) -> None:
        """Import what compiles and registers them.

        Args:
            trt: TensorRT's module.
            options: what is built.
            capability: of the GPU to build for, as "8.9".

        Raises:
            UserError: Triton or `tensorrt.plugin` is missing, or there are no kernels for the GPU.
        """
        assert options.attention == PLUGIN
        self._trt, self._sm = trt, _target(capability)
        self._registration = _import("plugins.kernels.registration", "the attention kernels")
        try:
            with _stdout_on_stderr():
                self._trtp = import_module(f"{trt.__name__}.plugin")
        except ImportError as error:
            raise UserError(
                f"{options.flavor} {trt.__version__} has no {trt.__name__}.plugin ({error}), through which the "
                f"attention kernels are built in; upgrade it, or {NATIVE_INSTEAD}"
            ) from error
        for name in ("register", "autotune", "aot_impl"):
            if not hasattr(self._trtp, name):
                raise UserError(
                    f"{trt.__name__}.plugin of {options.flavor} {trt.__version__} has no {name}, through which the "
                    f"attention kernels are built in; upgrade it, or {NATIVE_INSTEAD}"
                )

    def rewritten(self, model: onnx.ModelProto, bundle: Bundle) -> onnx.ModelProto:
        """The graph with every attention's ops, each of which names a plugin that is registered now.

        Raises:
            UserError: an attention's form, shape or type is not the kernels'.
        """
        from plugins.kernels.compile import UnexpectedPtx
        from plugins.kernels.shape import AttentionShape, UnsupportedByKernels, check_supported

        def marks(attributes: Mapping[str, Any], dtype: str) -> dict[str, Any]:
            shape = AttentionShape(**attributes)
            try:
                check_supported(shape, dtype, divmod(self._sm, 10))
            except UnsupportedByKernels as error:
                raise UserError(f"{bundle.path}: {error}; {NATIVE_INSTEAD}") from error
            try:
                namespace = self._registration.register(self._trt, self._trtp, shape, dtype, self._sm)
            except UnexpectedPtx as error:
                raise UserError(
                    f"Triton {import_module('triton').__version__} makes other kernels than are known here ({error}); "
                    f"install 3.7.1, or {NATIVE_INSTEAD}"
                ) from error
            return {"plugin_namespace": namespace, "plugin_version": self._registration.VERSION, "aot": 1}

        ir = _import("onnx_ir", "the attention kernels")
        made = ir.serde.deserialize_model(model)
        use_split_attention(made, bundle, marks)
        rewritten: onnx.ModelProto = ir.serde.serialize_model(made)
        return rewritten


def use_split_attention(model: Any, bundle: Bundle, marks: Marks = lambda *_: {}) -> None:
    """Replace the standard attention of a bundle's graph by SplitAttention and MergeAttention, in place.

    Args:
        model: the graph, an `onnx_ir.Model`; weights may lie in files.
        bundle: whose it is.
        marks: called with the ops' attributes and dtype, numpy's name; gives attributes more, by which TensorRT finds
            its plugins.

    Raises:
        UserError: an attention is of another form, or there is not one in each layer.
    """
    rewrite = _import("plugins.split_lowering", "the attention kernels")
    if not bundle.has_cache or bundle.manifest.target != "tensorrt":
        raise UserError(f"{bundle.path} has no cache for TensorRT, which the kernels read; {NATIVE_INSTEAD}")
    inputs = {value.name: value for value in model.graph.inputs}
    try:
        found = rewrite.find_attentions(model.graph, inputs[INPUT_IDS], inputs[WRITE_INDICES])
    except rewrite.CannotLower as error:
        raise UserError(f"{bundle.path}: {error}; {NATIVE_INSTEAD}") from error
    kinds = {(*each.attributes.items(), each.dtype) for each in found}
    layers = bundle.cache_geometry.layers
    if len(found) != layers or len(kinds) != 1:
        raise UserError(
            f"{bundle.path} has {len(found)} attentions of {len(kinds)} shapes in {layers} layers, "
            f"and the kernels are for one in each layer, all alike; {NATIVE_INSTEAD}"
        )
    rewrite.put_split_attention(model.graph, found, marks(found[0].attributes, found[0].dtype.numpy().name))


@contextmanager
def _stdout_on_stderr() -> Iterator[None]:
    """What C++ prints goes to stderr: TensorRT's module of plugins warns on stdout, which is for a command's result."""
    kept = None
    with suppress(OSError):  # one of them is closed
        kept = os.dup(1)
        os.dup2(2, 1)
    try:
        yield
    finally:
        if kept is not None:
            os.dup2(kept, 1)
            os.close(kept)


def _target(capability: str) -> int:
    shape = _import("plugins.kernels.shape", "the attention kernels")
    own = int(capability.replace(".", ""))
    if own not in shape.TARGETS:
        known = ", ".join(f"{sm // 10}.{sm % 10}" for sm in shape.TARGETS)
        raise UserError(
            f"compute capability {capability} has no attention kernels; there are kernels for {known}; {NATIVE_INSTEAD}"
        )
    return own


def _import(name: str, what: str) -> Any:
    """A module that needs the extra `kernels`."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("triton", "onnx_ir"):
            raise
        raise UserError(f"{what} need {error.name}, which is not installed; {INSTALL}, or {NATIVE_INSTEAD}") from error
