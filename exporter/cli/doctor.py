"""`doctor`: what is installed here, what is missing, and the command that adds it."""

from __future__ import annotations

import platform
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from exporter import __version__
from exporter.cli._console import emit_json, print_facts
from exporter.cli._options import json_option
from exporter.cli._requirements import BASE, DISTRIBUTION, EITHER_ONNXRUNTIME, EXTRAS

RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
TENSORRT = ("tensorrt", "tensorrt-rtx", "cuda-python")  # shown, and never missed: not everyone wants them
_PURPOSE = {
    "base": "everything",
    "onnxruntime": "running bundles (generate, chat, selftest) and checking exports",
    "export": "export, verify, demo",
}


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Show what is installed, and what adds what is missing.

    \b
    nemotron-export doctor
    nemotron-export doctor --json
    """
    report = examine()
    if as_json:
        emit_json(report)
        return
    machine = report["machine"]
    print_facts(
        [
            (DISTRIBUTION, report["nemotron_export"]),
            ("python", f"{report['python']} ({sys.executable})"),
            ("machine", ", ".join(filter(None, (machine["cpu"], machine["gpu"])))),
            *((name, found or "-") for name, found in report["packages"].items()),
            ("providers", ", ".join(report["onnxruntime_providers"])),
        ]
    )
    for part in report["missing"]:
        names = ", ".join(part["packages"])
        click.echo(f"missing: {names}, needed for {part['needed_for']}; {part['install']}")
    for warning in report["warnings"]:
        click.echo(f"{click.style('warning', fg='yellow')}: {warning}")
    if not report["missing"] and not report["warnings"]:
        click.echo("nothing is missing")


def examine() -> dict[str, Any]:
    """The JSON object of the command."""
    names = sorted({*BASE, *EXTRAS["export"], *RUNTIMES, *TENSORRT})
    packages = {name: _version(name) for name in names}
    providers, warnings = _providers(packages)
    return {
        "schema": 1,
        "nemotron_export": __version__,
        "python": platform.python_version(),
        "machine": _machine(),
        "packages": packages,
        "onnxruntime_providers": providers,
        "missing": _missing(packages),
        "warnings": warnings,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _machine() -> dict[str, str | None]:
    from pathlib import Path

    from runtime.hardware import cpu_name, cuda_name

    gpu = cuda_name() if Path("/proc/driver/nvidia/version").exists() else None
    return {"system": platform.platform(), "cpu": cpu_name(), "gpu": gpu}


def _missing(packages: dict[str, str | None]) -> list[dict[str, Any]]:
    """The parts of which something is not installed, with the one command that adds each."""

    def absent(names: tuple[str, ...]) -> list[str]:
        return [name for name in names if packages[name] is None]

    no_runtime = not any(packages[name] for name in RUNTIMES)
    found = [
        ("base", absent(BASE), f"pip install {DISTRIBUTION}"),
        ("onnxruntime", ["onnxruntime"] if no_runtime else [], EITHER_ONNXRUNTIME),
        ("export", absent(EXTRAS["export"]), f"pip install '{DISTRIBUTION}[export]'"),
    ]
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
