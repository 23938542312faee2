"""`selftest`: a bundle against its own golden cases, on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from exporter.cli._console import emit_json, note, print_comparisons
from exporter.cli._options import PATH, backend_options, json_option


@click.command()
@click.argument("bundle", type=PATH)
@backend_options
@json_option
def selftest(bundle: Path, backend: str, device: str | None, threads: int | None, as_json: bool) -> None:
    """Check that BUNDLE is whole and right on this machine.

    Compares every file's hash, then replays the golden cases that the parity gate stored. Needs no torch and
    no checkpoint. Exit code 1 where something differs.

    \b
    nemotron-export selftest ./bundle
    nemotron-export selftest ./bundle --device cuda --json
    """
    from runtime.errors import CheckFailed
    from runtime.golden import selftest as check

    result = check(bundle, backend=backend, device=device, threads=threads)
    if result.choice and not as_json:
        note(result.choice)
    if as_json:
        emit_json(result.to_json())
    else:
        print_comparisons(result.comparisons)
    if not result.passed:
        failed = [comparison for comparison in result.comparisons if not comparison.passed]
        what = ", ".join(f"{comparison.name} ({comparison.case})" for comparison in failed[:4])
        raise CheckFailed(
            f"{bundle} failed {len(failed)} of {len(result.comparisons)} comparisons on "
            f"{result.evaluated_by}: {what}{', …' if len(failed) > 4 else ''}; copy or export the bundle again"
        )
    if not as_json:
        click.echo(f"passed: {bundle} on {result.evaluated_by}")
