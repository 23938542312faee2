"""The peers that `bench --against` knows: what each needs, whether that is there, and how it is started."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from exporter.bench.process import Contender, driver_command
from exporter.text_files import read_object
from runtime.bundle import Bundle
from runtime.errors import UserError
from runtime.manifest import CONFIG, GENAI_CONFIG

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_OPENVINO_MODEL = "openvino_model.xml"
_INCIDENTAL = {"_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache"}  # of a configuration
# Which of the modules named a Python does not find; the working directory, first on its path, does not count.
_PROBE = """
import importlib.util, json, sys
del sys.path[0]
print(json.dumps([name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]))
"""


@dataclass(frozen=True)
class Asked:
    """What the user said of one peer.

    Attributes:
        bundle: that it runs beside.
        python: of the environment that has the peer.
        threads: that it may use.
        checkpoint: the bundle's source, where one was named.
        model: the directory behind `=`.
    """

    bundle: Bundle
    python: str
    threads: int
    checkpoint: Path | None = None
    model: Path | None = None


@dataclass(frozen=True)
class Peer:
    """A peer that is known.

    Attributes:
        modules: that its Python must find.
        install: the command that gets them.
        prepare: checks what the peer is to run, and says how; raises UserError.
        own_model: whether it runs a model of its own, named behind `=`.
    """

    modules: tuple[str, ...]
    install: str
    prepare: Callable[[Asked], Contender]
    own_model: bool = False


def _transformers(asked: Asked) -> Contender:
    precision = asked.bundle.manifest.activations
    if asked.checkpoint is None:
        raise UserError("transformers runs the checkpoint that the bundle was made from; add --checkpoint DIRECTORY")
    if not asked.checkpoint.is_dir():
        raise UserError(f"{asked.checkpoint} is not a directory; give the checkpoint's as --checkpoint")
    theirs, ours = read_object(asked.checkpoint / CONFIG), asked.bundle.config
    differing = sorted(name for name in {*theirs, *ours} - _INCIDENTAL if theirs.get(name) != ours.get(name))
    if differing:
        raise UserError(
            f"{asked.checkpoint} is not what {asked.bundle.path} was made from, {asked.bundle.manifest.source.name}: "
            f"{', '.join(differing)} of {CONFIG} differ; give that one's directory as --checkpoint"
        )
    place = asked.checkpoint.resolve()
    command = driver_command(asked.python, "transformers", place, _DTYPES[precision], asked.threads)
    return Contender("transformers", precision, command)


def _genai(asked: Asked) -> Contender:
    bundle = asked.bundle
    if not bundle.has(GENAI_CONFIG):
        raise UserError(
            f"{bundle.path} has no {GENAI_CONFIG}, by which onnxruntime-genai runs it; export it with --target "
            "onnxruntime and a cache, or leave that peer out"
        )
    command = driver_command(asked.python, "genai", bundle.path.resolve(), asked.threads)
    cache = bundle.cache_geometry.bytes_per_token  # the graph is the same one
    return Contender("onnxruntime-genai", bundle.manifest.precision, command, bundle.manifest.step_bytes, cache)


def _openvino(asked: Asked) -> Contender:
    assert asked.model is not None
    if not (asked.model / _OPENVINO_MODEL).is_file():
        raise UserError(f"{asked.model} has no {_OPENVINO_MODEL}; give the directory that optimum-cli export wrote")
    config = read_object(asked.model / CONFIG)
    if config.get("vocab_size") != asked.bundle.vocab_size:
        raise UserError(
            f"{asked.model} has a vocabulary of {config.get('vocab_size')}, {asked.bundle.path} one of "
            f"{asked.bundle.vocab_size}; give a model of the same checkpoint"
        )
    return Contender("openvino", "", driver_command(asked.python, "openvino", asked.model.resolve(), asked.threads))


PEERS: dict[str, Peer] = {
    "transformers": Peer(("transformers", "torch"), "pip install 'nemotron-export[export,cpu]'", _transformers),
    "onnxruntime-genai": Peer(("onnxruntime_genai",), "pip install onnxruntime-genai", _genai),
    "openvino": Peer(("openvino",), "pip install openvino", _openvino, own_model=True),
}


def parse_against(texts: Iterable[str]) -> dict[str, Path | None]:
    """Names of peers, each with the model behind its `=`, of `--against transformers,openvino=DIRECTORY`.

    Raises:
        UserError: one is unknown, named twice, lacks its model, or takes none.
    """
    found: dict[str, Path | None] = {}
    for item in (item.strip() for text in texts for item in text.split(",")):
        name, given, model = item.partition("=")
        if name not in PEERS:
            raise UserError(f"--against: {name!r} is not a peer that is known; known are {', '.join(known())}")
        if name in found:
            raise UserError(f"--against names {name} twice; once is enough")
        if PEERS[name].own_model and not model:
            raise UserError(f"{name} runs a model of its own; name its directory: --against {name}=DIRECTORY")
        if given and not PEERS[name].own_model:
            raise UserError(f"--against {item}: {name} takes no model of its own; write --against {name}")
        found[name] = Path(model) if model else None
    return found


def parse_pythons(texts: Iterable[str], against: Iterable[str]) -> dict[str, str]:
    """Programs by peer, of `--peer-python onnxruntime-genai=./genai/bin/python`.

    Raises:
        UserError: it is not of that form, or of a peer that takes no part.
    """
    found = {}
    for text in texts:
        name, _, program = text.partition("=")
        if not program:
            raise UserError(f"--peer-python {text}: write a peer and its Python, as openvino=./openvino/bin/python")
        if name not in against:
            raise UserError(f"--peer-python {text}: {name} is not among --against; add it there")
        # Names without a directory are looked up, others are of this directory: a process may be started in another.
        found[name] = str(Path(program).absolute()) if len(Path(program).parts) > 1 else program
    return found


def known() -> list[str]:
    """The peers, as they are written."""
    return [f"{name}=DIRECTORY" if peer.own_model else name for name, peer in PEERS.items()]


def contenders(
    bundle: Bundle,
    against: Mapping[str, Path | None],
    *,
    pythons: Mapping[str, str],
    checkpoint: Path | None,
    threads: int,
) -> list[Contender]:
    """The peers named, once it is known that each is installed and has what it is to run.

    Raises:
        UserError: one is not, or has not.
    """
    if checkpoint is not None and "transformers" not in against:
        raise UserError("--checkpoint is what transformers runs; add --against transformers, or drop it")
    for name in against:
        _check_installed(name, pythons.get(name))
    return [
        PEERS[name].prepare(Asked(bundle, pythons.get(name, sys.executable), threads, checkpoint, model))
        for name, model in against.items()
    ]


def _check_installed(name: str, python: str | None) -> None:
    peer, program = PEERS[name], python or sys.executable
    try:
        done = subprocess.run(  # noqa: S603
            [program, "-c", _PROBE, *peer.modules], capture_output=True, text=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"--peer-python {name}={program} does not start ({error}); give a Python's program") from error
    missing = _missing(done)
    if missing is None:
        raise UserError(f"--peer-python {name}={program} is not a Python that runs; give one")
    if missing:
        elsewhere = "name a Python that has it" if python is None else "name another"
        raise UserError(
            f"{name} is not installed: {program} has no {' and no '.join(missing)}; {peer.install} there, or "
            f"{elsewhere}: --peer-python {name}=PYTHON"
        )


def _missing(done: subprocess.CompletedProcess[str]) -> list[str] | None:
    try:
        found = json.loads(done.stdout) if done.returncode == 0 else None
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, list) else None


def remarks(bundle: Bundle, checkpoint: Path | None) -> list[str]:
    """What a reader should know of a checkpoint that has the bundle's shape, and may be another all the same."""
    from exporter.hub import repository_name

    if checkpoint is None:
        return []
    source, found = bundle.manifest.source, []
    place = checkpoint.resolve()
    name = repository_name(place) or place.name
    if name != source.name:
        found.append(
            f"{checkpoint} is called {name}, the bundle was made from {source.name}: of one shape, maybe not of one "
            "training"
        )
    if source.adapter:
        found.append(f"the bundle has the adapter {source.adapter} merged in, what transformers runs has not")
    return found
