"""A real Triton Inference Server on the loopback, from the wheel of nvidia-pytriton, for as long as a test needs it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from environments import ROOT, Failed, environment, run

STARTS_S = 90
# The server's Python. Triton 24.10, which the wheel has, reads no tensor under numpy 2 (python_backend's pull request
# 384), which our own requirements ask for: hence no dependencies are followed, and all are here.
SERVER = ("nvidia-pytriton==0.7.0", "numpy==1.26.4")
RUNTIME = ("flatbuffers", "jinja2", "markupsafe", "onnxruntime", "packaging", "tokenizers", "typing-extensions")
CLIENT = ("tritonclient==2.73.0", "grpcio", "ml_dtypes<=0.5.4", "python-rapidjson", "protobuf<7")


@dataclass(frozen=True)
class Server:
    """A running server: its two addresses, and the Python that has a client of it."""

    http: str
    grpc: str
    python: Path

    def post(self, path: str, body: bytes) -> tuple[int, str]:
        """Ask over HTTP; the status and what came back."""
        request = urllib.request.Request(f"http://{self.http}/{path}", body, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


def triton_environment(wheel: Path) -> Path:
    """Executables of an environment with the server, a client, and our runtime, which is put in anew."""
    runtime = [line for line in _pinned() if _name(line) in RUNTIME]
    bin_ = environment("triton", ["--no-deps", *SERVER, *CLIENT, *runtime], constraints=None)
    run([bin_ / "pip", "install", "-q", "--no-deps", "--force-reinstall", wheel])
    return bin_


@contextmanager
def serving(bin_: Path, models: Path, place: Path) -> Iterator[Server]:
    """The server with these models, until the end of the body.

    Raises:
        Failed: it is not ready in time, or has ended; with what it said.
    """
    http, grpc = (f"127.0.0.1:{port}" for port in _free_ports())
    pytriton = bin_.parent / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages" / "pytriton"
    addresses = [
        f"--{kind}-{part}={value}"
        for kind, address in (("http", http), ("grpc", grpc))
        for part, value in zip(("address", "port"), address.split(":"), strict=True)
    ]
    command = [
        *(pytriton / "tritonserver" / "bin" / "tritonserver", f"--model-repository={models}", *addresses),
        *(f"--backend-directory={_backends(pytriton, place / 'backends')}", "--allow-metrics=false"),
        *("--exit-timeout-secs=5", "--disable-auto-complete-config"),
    ]
    log = place / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=place, env=_surroundings(bin_, pytriton))
    try:
        _wait(process, http, log)
        yield Server(http, grpc, bin_ / "python")
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _surroundings(bin_: Path, pytriton: Path) -> dict[str, str]:
    """The stub finds its Python by PATH, and its libraries, Python's among them, by LD_LIBRARY_PATH."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    libraries = (pytriton.parent / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR"))
    return kept | {"PATH": f"{bin_}:{os.environ['PATH']}", "LD_LIBRARY_PATH": ":".join(map(str, libraries))}


def _backends(pytriton: Path, place: Path) -> Path:
    """A directory of backends in which the Python backend has the stub of our version of Python."""
    server = pytriton / "tritonserver"
    shutil.copytree(server / "backends" / "python", place / "python")
    stub = "triton_python_backend_stub"
    shutil.copy(server / "python_backend_stubs" / sysconfig.get_python_version() / stub, place / "python" / stub)
    return place


def _wait(process: subprocess.Popen[bytes], http: str, log: Path) -> None:
    end = time.monotonic() + STARTS_S
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://{http}/v2/health/ready", timeout=5):
                return
        except OSError:  # not listening yet, or not ready
            time.sleep(0.2)
    raise Failed(f"tritonserver is not ready (exit {process.poll()}, Python {sys.version}):\n{log.read_text()[-8000:]}")


def _free_ports() -> list[int]:
    with socket.socket() as one, socket.socket() as other:
        for holder in (one, other):
            holder.bind(("127.0.0.1", 0))
        return [holder.getsockname()[1] for holder in (one, other)]


def _pinned() -> list[str]:
    return [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]


def _name(requirement: str) -> str:
    return re.split("[=<>]", requirement)[0].lower().replace("_", "-")
