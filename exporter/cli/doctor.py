"""`doctor`: what is installed here, what is missing, and the command that adds it."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

from exporter import __version__
from exporter.cli._console import emit_json, print_facts, print_table
from exporter.cli._options import PATH, json_option
from exporter.cli._requirements import BASE, DISTRIBUTION, EITHER_ONNXRUNTIME, EXTRAS
from runtime.errors import UserError
from runtime.tensorrt_api import FLAVORS, import_tensorrt

ARTIFACTS = Path("artifacts")  # where exports go by default
CUDA_PROVIDER = "CUDAExecutionProvider"
RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
TENSORRT = ("tensorrt", "tensorrt-rtx", "cuda-python", "triton")  # shown, and never missed: not everyone wants them
_PURPOSE = {
    "base": "everything",
    "onnxruntime": "running bundles (generate, chat, selftest) and checking exports",
    "export": "export, verify, demo",
    "gpu": "ONNX Runtime on the GPU (instead of onnxruntime)",
    "tensorrt": "building and running engines of tensorrt",
    "rtx": "building and running engines of tensorrt-rtx",
}


@click.command()
@click.argument("directory", type=PATH, required=False)
@json_option
def doctor(directory: Path | None, as_json: bool) -> None:
    """Show what is installed, what adds what is missing, and what the bundles in DIRECTORY can run on here.

    Nothing is loaded. DIRECTORY is ./artifacts by default, where there is one.

    \b
    nemotron-export doctor
    nemotron-export doctor /srv/bundles
    nemotron-export doctor --json
    """
    from exporter.cli._bundles_here import examine_bundle, find_bundles

    place = directory or (ARTIFACTS if ARTIFACTS.is_dir() else None)
    paths = find_bundles(place) if place is not None else []
    report = examine() | {"bundles": [examine_bundle(path) for path in paths]}
    if as_json:
        emit_json(report)
        return
    _print_installation(report)
    _print_bundles(report["bundles"], place, asked=directory is not None)
    for part in report["missing"]:
        names = ", ".join(part["packages"])
        click.echo(f"missing: {names}, needed for {part['needed_for']}; {part['install']}")
    for warning in report["warnings"]:
        click.echo(f"{click.style('warning', fg='yellow')}: {warning}")
    if not report["missing"] and not report["warnings"]:
        click.echo("nothing is missing")


def _print_installation(report: dict[str, Any]) -> None:
    machine, cuda = report["machine"], report["cuda"]
    gpus = [f"{gpu['name']}, compute capability {gpu['compute_capability']}" for gpu in cuda["gpus"]]
    print_facts(
        [
            (DISTRIBUTION, report["nemotron_export"]),
            ("python", f"{report['python']} ({sys.executable})"),
            ("machine", ", ".join(filter(None, (machine["cpu"], machine["gpu"])))),
            ("gpu", "; ".join(gpus) or "none is visible"),
            ("driver", f"{cuda['driver'] or 'unknown'}, runs CUDA {cuda['cuda']}" if cuda["cuda"] else "-"),
            ("cuda toolkit", cuda["toolkit"] or "-"),
            *((name, found or "-") for name, found in report["packages"].items()),
            ("providers", ", ".join(report["onnxruntime_providers"])),
        ]
    )
    click.echo(click.style("tensorrt flavors", bold=True))
    print_table([(one["flavor"], one["why"] or f"{one['version']}, can be imported") for one in report["tensorrt"]])


def _print_bundles(bundles: list[dict[str, Any]], place: Path | None, *, asked: bool) -> None:
    if not bundles:
        if asked:
            click.echo(f"{place} holds no bundles; nemotron-export export CHECKPOINT BUNDLE writes one")
        return
    click.echo(click.style(f"bundles in {place}", bold=True))
    for bundle in bundles:
        if "error" in bundle:
            click.echo(f"  {bundle['path']}: cannot be opened: {bundle['error']}")
            continue
        click.echo(f"  {bundle['path']}: {bundle['task']}, {bundle['target']}, {bundle['precision']}")
        own = f"{bundle['path']} "
        verdicts = [(run["backend"], "yes" if run["runs"] else f"no: {run['why'].removeprefix(own)}")
                    for run in bundle["runs"]]  # fmt: skip
        print_table(verdicts, indent="    ")


def examine() -> dict[str, Any]:
    """The JSON object of the command, without "bundles"."""
    names = sorted({*BASE, *EXTRAS["export"], *RUNTIMES, *TENSORRT})
    packages = {name: _version(name) for name in names}
    providers, warnings = _providers(packages)
    cuda = _cuda()
    return {
        "schema": 1,
        "nemotron_export": __version__,
        "python": platform.python_version(),
        "machine": _machine(),
        "cuda": cuda,
        "packages": packages,
        "onnxruntime_providers": providers,
        "tensorrt": [_flavor(name, packages) for name in FLAVORS],
        "missing": _missing(packages, gpu=bool(cuda["gpus"]) and CUDA_PROVIDER not in providers),
        "warnings": warnings,
    }


def _cuda() -> dict[str, Any]:
    """The driver's version, the newest CUDA that it runs, the toolkit's version, and the GPUs that are visible."""
    from runtime.driver import find_driver
    from runtime.hardware import driver_version

    driver = find_driver()
    gpus = driver.gpus if driver else ()
    return {
        "driver": driver_version(),
        "cuda": driver.cuda if driver else None,
        "toolkit": _toolkit(),
        "gpus": [{"name": gpu.name, "compute_capability": gpu.capability} for gpu in gpus],
    }


def _toolkit() -> str | None:
    """The version that CUDA's toolkit keeps beside itself; None where none is found."""
    places = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    for file in (Path(place) / "version.json" for place in places if place):
        if file.is_file():
            found = re.search(r'"cuda"\s*:\s*\{[^}]*"version"\s*:\s*"([\d.]+)"', file.read_text(errors="replace"))
            return found[1] if found else None
    return None


def _flavor(name: str, packages: dict[str, str | None]) -> dict[str, Any]:
    """Whether a TensorRT can be imported, as sessions and builds do it, and else why not and what adds it."""
    try:
        module = import_tensorrt(name)
    except UserError as error:
        return {"flavor": name, "version": packages[name], "usable": False, "why": str(error)}
    return {"flavor": name, "version": str(module.__version__), "usable": True, "why": None}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _machine() -> dict[str, str | None]:
    from runtime.hardware import cpu_name, cuda_name

    gpu = cuda_name() if Path("/proc/driver/nvidia/version").exists() else None
    return {"system": platform.platform(), "cpu": cpu_name(), "gpu": gpu}


def _missing(packages: dict[str, str | None], *, gpu: bool) -> list[dict[str, Any]]:
    """The parts of which something is not installed, with the one command that adds each.

    Args:
        packages: the versions of those that are installed.
        gpu: whether there is a GPU that the installed onnxruntime has no provider for.
    """

    def absent(names: Iterable[str]) -> list[str]:
        return [name for name in names if packages[name] is None]

    no_runtime = not any(packages[name] for name in RUNTIMES)
    found = [
        ("base", absent(BASE), f"pip install {DISTRIBUTION}"),
        ("onnxruntime", ["onnxruntime"] if no_runtime else [], EITHER_ONNXRUNTIME),
        ("export", absent(EXTRAS["export"]), f"pip install '{DISTRIBUTION}[export]'"),
    ]
    if gpu and packages["onnxruntime"] and not packages["onnxruntime-gpu"]:
        swap = f"pip uninstall -y onnxruntime && pip install '{DISTRIBUTION}[gpu]'"
        found.append(("gpu", ["onnxruntime-gpu"], swap))
    for name, flavor in FLAVORS.items():
        if packages[name]:  # who has it wants the rest of its extra
            found.append(
                (flavor.extra, absent(other for other in EXTRAS[flavor.extra] if other in packages), flavor.install)
            )
    return [
        {"part": part, "packages": names, "needed_for": _PURPOSE[part], "install": install}
        for part, names, install in found
        if names
    ]


def _providers(packages: dict[str, str | None]) -> tuple[list[str], list[str]]:
    """Execution providers of the onnxruntime that Python imports, and what is wrong with it."""
    warnings = []
    if all(packages[name] for name in RUNTIMES):
        warnings.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; pip uninstall -y "
            "onnxruntime onnxruntime-gpu, then install one: " + EITHER_ONNXRUNTIME
        )
    if not any(packages[name] for name in RUNTIMES):
        return [], warnings
    try:
        onnxruntime = import_module("onnxruntime")
        return list(onnxruntime.get_available_providers()), warnings
    except (ImportError, AttributeError) as error:  # half of one over half of the other
        reason = " ".join(str(error).split())
        return [], [*warnings, f"onnxruntime cannot be imported ({reason}); install it again"]
