"""`package`: what it prints."""

from __future__ import annotations

import json
from pathlib import Path


def test_it_says_where_the_model_is_and_what_the_server_needs(cli, tiny_bundle: Path, tmp_path: Path) -> None:
    done = cli("package", tiny_bundle, "--triton", tmp_path / "models", "--name", "moon", "--slots", 4)
    assert done.code == 0
    assert "runs on  CPU, 4 requests at once" in done.out
    assert f"next: tritonserver --model-repository {tmp_path / 'models'}" in done.out
    assert "nemotron-export[cpu]" in done.out
    again = cli("package", tiny_bundle, "--triton", tmp_path / "models", "--name", "moon")
    assert again.code == 2
    assert again.err.startswith(f"error: {tmp_path / 'models' / 'moon'} exists; ")
    assert again.err.count("\n") == 1


def test_its_json_names_the_model_its_parameters_and_the_extras(cli, tensorrt_bundle: Path, tmp_path: Path) -> None:
    done = cli("package", tensorrt_bundle, "--triton", tmp_path, "--device", "cuda", "--max-length", 128, "--json")
    told = json.loads(done.out)
    assert told.pop("bytes") == sum(
        file.stat().st_size for file in tensorrt_bundle.iterdir() if file.name != "manifest.json"
    )
    assert told == {
        "schema": 1,
        "model": "tiny-nemotron",
        "path": str(tmp_path / "tiny-nemotron"),
        "instance": "KIND_GPU",
        "parameters": {"slots": "8", "max_length": "128", "backend": "auto", "device": "cuda"},
        "extras": ["gpu"],
    }


def test_without_a_repository_it_says_which_option_is_missing(cli, tiny_bundle: Path) -> None:
    done = cli("package", tiny_bundle)
    assert done.code == 2
    assert "--triton" in done.err
