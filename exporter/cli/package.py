"""`package`: a bundle in the form in which a server takes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli._console import emit_json, print_facts, size, stages, writing
from exporter.cli._options import PATH, backend_options, json_option

if TYPE_CHECKING:
    from exporter.triton.repository import Packaged


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--triton", type=PATH, required=True, metavar="DIR", help="Model repository of Triton Inference Server.")
@click.option("--name", metavar="TEXT", help="Name of the model.  [default: the checkpoint's]")
@click.option(
    "--slots",
    type=click.IntRange(min=1),
    help="Requests that run at once; others wait.  [default: 8, or what the engines have]",
)
@click.option(
    "--max-length",
    type=click.IntRange(min=1),
    help="Tokens of a request, prompt included.  [default and maximum: the bundle's, or the engine's]",
)
@backend_options
@click.option("--force", is_flag=True, help="Replace the model of this name.")
@json_option
def package(*, bundle: Path, triton: Path, name: str | None, force: bool, as_json: bool, **serving: Any) -> None:
    """Copy BUNDLE, engines included, into a model repository that Triton Inference Server loads.

    The model runs in Triton's Python backend, whose Python needs nemotron-export[cpu] or [gpu]. How it is run can
    be changed later, in config.pbtxt. Needs no torch.

    \b
    nemotron-export package ./bundle --triton ./models
    nemotron-export package ./bundle --triton ./models --name assistant --device cuda --slots 16
    """
    from exporter.triton.config import Serving
    from exporter.triton.repository import package as write

    with writing(triton), stages() as progress:
        packaged = write(bundle, triton, Serving(**serving), name=name, force=force, progress=progress)
    if as_json:
        emit_json(_json(packaged))
        return
    print_facts(
        [
            ("model", packaged.name),
            ("path", packaged.path),
            ("copied", size(packaged.bytes)),
            ("runs on", f"{packaged.kind.removeprefix('KIND_')}, {packaged.serving.slots} requests at once"),
        ]
    )
    click.echo(f"next: tritonserver --model-repository {triton}")
    click.echo(f"      where the server's Python has nemotron-export[{','.join(packaged.extras)}]")


def _json(packaged: Packaged) -> dict[str, Any]:
    return {
        "schema": 1,
        "model": packaged.name,
        "path": str(packaged.path),
        "bytes": packaged.bytes,
        "instance": packaged.kind,
        "parameters": packaged.serving.parameters,
        "extras": packaged.extras,
    }
