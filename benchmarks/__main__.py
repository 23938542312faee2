"""`make bench`: lists the measurements there are, and runs those that are quick and that this machine can run."""

from __future__ import annotations

import ast
import sys
from importlib import import_module
from pathlib import Path

QUICK = ("gpu_check",)


def main() -> int:
    """List, run; 1 where something is wrong, else 0: what cannot run here says why."""
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in module.body):
            print(f"python -m benchmarks.{path.stem:16} {(ast.get_docstring(module) or '').splitlines()[0]}")
    codes = []
    for name in QUICK:
        print(f"\n{name}", flush=True)
        codes.append(import_module(f"benchmarks.{name}").main([]))
    return int(1 in codes)


if __name__ == "__main__":
    sys.exit(main())
