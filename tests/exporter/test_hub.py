"""A hub id stands for its snapshot; what is neither directory nor id is refused without asking anyone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pickles
import pytest
from hub_cache import COMMIT, cache_snapshot
from huggingface_hub import constants, errors
from refusals import assert_tells

from exporter.checkpoint import Checkpoint
from exporter.export import ExportOptions, export
from exporter.hub import check_name, locate
from runtime.errors import UserError

ROOT = Path(__file__).parents[2]
ID = "somebody/small-nemotron"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a machine without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """A hub that gives an empty directory, and what it was asked for."""
    requests: list[dict[str, Any]] = []

    def download(identifier: str, **request: Any) -> str:
        requests.append({"id": identifier, **request})
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return requests


def refusal(checkpoint: Path | str, revision: str | None = None) -> UserError:
    with pytest.raises(UserError) as refused:
        locate(checkpoint, revision)
    return refused.value


def test_a_cached_snapshot_is_found_offline_and_read_through_its_links(cache: Path, small_checkpoint: Path) -> None:
    snapshot = cache_snapshot(cache, ID, small_checkpoint)
    checkpoint = Checkpoint.open(ID)
    assert checkpoint.path == snapshot
    original = Checkpoint.open(small_checkpoint)
    for name in original.tensors:
        assert checkpoint.read(name).equal(original.read(name))
    assert checkpoint.fingerprint() == original.fingerprint()


def test_a_snapshot_is_called_after_its_repository_and_not_its_commit(cache: Path, small_checkpoint: Path) -> None:
    snapshot = cache_snapshot(cache, ID, small_checkpoint)
    assert Checkpoint.open(ID).name == "small-nemotron"
    assert Checkpoint.open(snapshot).name == "small-nemotron"
    assert Checkpoint.open(cache_snapshot(cache, "alone", small_checkpoint)).name == "alone"


@pytest.mark.parametrize("named", [ID, Path(ID)], ids=["text", "path"])
def test_a_bundle_of_a_hub_id_carries_the_repository_s_name(
    cache: Path, small_checkpoint: Path, tmp_path: Path, quick: None, monkeypatch, named: Path | str
) -> None:
    cache_snapshot(cache, ID, small_checkpoint, ref="v2")
    monkeypatch.chdir(tmp_path)
    result = export(named, None, ExportOptions(verify=False, revision="v2"))
    assert result.bundle == Path("artifacts/small-nemotron-onnxruntime-fp32")
    assert result.manifest.source.name == "small-nemotron"
    assert result.manifest.source.adapter is None


def test_a_revision_chooses_the_snapshot(cache: Path, small_checkpoint: Path, tiny_checkpoint: Path) -> None:
    other = "f" * 40
    cache_snapshot(cache, ID, small_checkpoint)
    cache_snapshot(cache, ID, tiny_checkpoint, commit=other, ref="v2")
    assert locate(ID).name == COMMIT
    assert locate(ID, "v2").name == locate(ID, other).name == other


def test_an_id_that_is_not_cached_is_named_with_the_download(cache: Path) -> None:
    assert_tells(refusal(ID), ID, "is not a directory", f"`hf download {ID}`")


def test_a_revision_that_is_not_cached_is_named_too(cache: Path, small_checkpoint: Path) -> None:
    cache_snapshot(cache, ID, small_checkpoint)
    assert_tells(refusal(ID, "v3"), ID, "revision v3", "hf download")


def test_a_hub_that_cannot_be_reached_is_no_obstacle_to_a_cached_snapshot(
    cache: Path, small_checkpoint: Path, monkeypatch
) -> None:
    snapshot = cache_snapshot(cache, ID, small_checkpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert locate(ID) == snapshot
    assert_tells(refusal("somebody/else"), "somebody/else", "the hub cannot be reached", "hf download")


def test_a_revision_of_a_directory_is_refused_rather_than_ignored(small_checkpoint: Path) -> None:
    assert_tells(refusal(small_checkpoint, "main"), small_checkpoint, "main", "drop --revision")


@pytest.mark.parametrize("path", ["/nowhere", "./small", "../small", "~/small", "a/b/c", "small/", "has space", "a--b"])
def test_what_cannot_be_an_id_is_refused_without_asking_the_hub(asked: list[Any], path: str) -> None:
    for look in (locate, check_name):
        with pytest.raises(UserError) as refused:
            look(path)
        assert_tells(refused.value, path, "is not a directory", "hf download")
    assert not asked


def test_a_file_is_no_id_whatever_its_name(asked: list[Any], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("weights").write_text("")
    assert_tells(refusal("weights"), "weights", "is not a directory")
    assert not asked


def test_a_directory_comes_before_an_id_of_the_same_name(asked: list[Any], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(ID).mkdir(parents=True)
    assert locate(ID) == Path(ID)
    assert not asked


def test_nothing_but_configuration_tokenizer_and_weights_is_downloaded(asked: list[Any], tmp_path: Path) -> None:
    from huggingface_hub.utils import filter_repo_objects

    (tmp_path / "model.safetensors").write_text("")
    locate(ID, "v2")
    (request,) = asked
    assert (request["id"], request["revision"]) == (ID, "v2")
    wanted = {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
        "special_tokens_map.json", "chat_template.jinja", "model.safetensors", "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
    }  # fmt: skip
    others = {
        "pytorch_model.bin",
        "modeling_x.py",
        "README.md",
        "nemo/model.safetensors",
        "model.nemo",
        "onnx/config.json",
    }
    patterns = {name: request[name] for name in ("allow_patterns", "ignore_patterns")}
    assert set(filter_repo_objects(sorted(wanted | others), **patterns)) == wanted


def test_pickles_are_downloaded_only_where_there_are_no_safetensors(asked: list[Any]) -> None:
    locate(ID)
    first, second = (set(request["allow_patterns"]) for request in asked)
    assert second - first == {"pytorch_model*.bin", "pytorch_model.bin.index.json"}


def test_a_cached_snapshot_of_pickles_is_read(cache: Path, small_copy: Path) -> None:
    pickles.repickle(small_copy, 2)
    cache_snapshot(cache, ID, small_copy)
    checkpoint = Checkpoint.open(ID)
    assert not checkpoint.safetensors
    assert checkpoint.read("model.norm.weight").shape == (64,)


def _answer(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://hub"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.RepositoryNotFoundError("404\nlines", response=_answer(404)), ("no such repository", "hf auth login")),
        (errors.GatedRepoError("403\nlines", response=_answer(403)), ("gated", "hf auth login")),
        (
            errors.RevisionNotFoundError("404\nlines", response=_answer(404)),
            ("no revision v2", "branch, tag or commit"),
        ),
        (errors.HfHubHTTPError("500 Server\nlines", response=_answer(500)), ("(500 Server)", "try again")),
        (httpx2.ProxyError("407 Proxy"), ("(407 Proxy)", "try again")),
        (httpx2.ReadTimeout(""), ("ReadTimeout", "try again")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_hub_refuses_is_told_in_a_line(monkeypatch, error: Exception, words: tuple[str, ...]) -> None:
    def download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert_tells(refusal(ID, "v2"), ID, *words)


@pytest.mark.parametrize(
    "offline", [{"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}]
)
def test_a_mistyped_id_is_refused_before_torch_is_loaded(tmp_path: Path, offline: dict[str, str]) -> None:
    script = "import sys; from exporter.cli import run; sys.exit(run(sys.argv[1:]) + 7 * ('torch' in sys.modules))"
    outcome = _run(script, tmp_path, offline, "export", ID)
    assert (outcome.returncode, outcome.stdout) == (2, "")
    assert outcome.stderr.splitlines()[-1].startswith(f"error: {ID} is not a directory")


def test_the_command_line_takes_an_id_and_a_revision(tmp_path: Path, small_checkpoint: Path) -> None:
    cache_snapshot(tmp_path / "hub", ID, small_checkpoint, ref="v2")
    script = (
        "import sys, types; from pathlib import Path; fake = types.ModuleType('exporter.export');"
        "fake.ExportOptions = dict\n"
        "def export(path, *_, **__): print(path, file=sys.stderr); raise SystemExit(7)\n"
        "fake.export = export; sys.modules['exporter.export'] = fake; from exporter.cli import run; run(sys.argv[1:])"
    )
    outcome = _run(script, tmp_path, {"HF_HUB_OFFLINE": "1"}, "export", ID, "--revision", "v2")
    assert outcome.returncode == 7
    assert outcome.stderr.strip().endswith(f"models--somebody--small-nemotron/snapshots/{COMMIT}")


def _run(script: str, home: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "HF_HUB_CACHE": str(home / "hub"), "HF_HOME": str(home), **environment}
    command: list[Any] = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables, timeout=120, check=False)
