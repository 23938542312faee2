"""What is wrong with a peer is said in a line, with the remedy, before anything is measured."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from exporter.bench.peers import contenders, known, parse_against, parse_pythons, remarks
from runtime.bundle import Bundle
from runtime.errors import UserError
from runtime.manifest import Manifest, Source


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


def prepared(bundle: Bundle, *against: str, checkpoint: Path | None = None, **pythons: str):
    return contenders(bundle, parse_against(against), pythons=pythons, checkpoint=checkpoint, threads=2)


def test_names_are_given_in_one_option_or_several() -> None:
    assert parse_against(["transformers, onnxruntime-genai", "openvino=a/b"]) == {
        "transformers": None,
        "onnxruntime-genai": None,
        "openvino": Path("a/b"),
    }
    assert parse_against([]) == {}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("vllm", "'vllm' is not a peer that is known; known are transformers, onnxruntime-genai, openvino=DIRECTORY"),
        ("transformers,transformers", "names transformers twice"),
        ("openvino", "runs a model of its own; name its directory: --against openvino=DIRECTORY"),
        ("transformers=here", "transformers takes no model of its own; write --against transformers"),
        ("transformers,", "'' is not a peer that is known"),
    ],
)
def test_what_is_no_peer_is_refused_with_what_would_be(text: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        parse_against([text])
    assert len(known()) == 3


def test_one_that_is_not_installed_is_named_with_the_command_that_gets_it(bundle: Bundle) -> None:
    with pytest.raises(UserError) as refused:
        prepared(bundle, "onnxruntime-genai")
    assert str(refused.value) == (
        f"onnxruntime-genai is not installed: {sys.executable} has no onnxruntime_genai; pip install "
        "onnxruntime-genai there, or name a Python that has it: --peer-python onnxruntime-genai=PYTHON"
    )


def test_a_directory_called_like_a_peer_is_not_that_peer(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime_genai").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="has no onnxruntime_genai"):
        prepared(bundle, "onnxruntime-genai")


@pytest.mark.parametrize("program", ["/nowhere/python", "/bin/true", "/bin/echo", "/"])
def test_a_python_that_is_none_is_named(bundle: Bundle, program: str) -> None:
    with pytest.raises(UserError, match=f"--peer-python transformers={program} "):
        prepared(bundle, "transformers", transformers=program)


@pytest.mark.parametrize(
    ("text", "told"), [("python", "write a peer and its Python"), ("openvino=x", "openvino is not among --against")]
)
def test_a_python_of_nobody_is_refused(text: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        parse_pythons([text], ["transformers"])


def test_a_relative_python_stays_what_it_is_where_the_peer_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = parse_pythons(["openvino=venv/bin/python", "transformers=python3"], ["openvino", "transformers"])
    assert found == {"openvino": str(tmp_path / "venv/bin/python"), "transformers": "python3"}


def test_transformers_needs_the_checkpoint_that_the_bundle_was_made_from(
    bundle: Bundle, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="add --checkpoint DIRECTORY"):
        prepared(bundle, "transformers")
    with pytest.raises(UserError, match="nowhere is not a directory"):
        prepared(bundle, "transformers", checkpoint=tmp_path / "nowhere")
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5, "transformers_version": "4.50"}))
    with pytest.raises(
        UserError, match=r"other is not what .* was made from, tiny-nemotron: num_hidden_layers of conf"
    ):
        prepared(bundle, "transformers", checkpoint=other)
    (other / "config.json").write_text(json.dumps({**config, "transformers_version": "4.50"}))
    (contender,) = prepared(bundle, "transformers", checkpoint=other)
    assert contender.name == "transformers fp32"
    assert contender.command[-3:] == (str(other.resolve()), "float32", "2")
    assert remarks(bundle, other) == [
        f"{other} is called other, the bundle was made from tiny-nemotron: of one shape, maybe not of one training"
    ]
    assert remarks(bundle, tiny_checkpoint) == remarks(bundle, None) == []
    with pytest.raises(UserError, match="--checkpoint is what transformers runs"):
        prepared(bundle, checkpoint=tiny_checkpoint)


def test_an_adapter_that_transformers_does_not_have_is_told(tiny_bundle_copy: Path, tiny_checkpoint: Path) -> None:
    manifest = Manifest.load(tiny_bundle_copy)
    replace(manifest, source=Source(name="tiny-nemotron", fingerprint="0", adapter="tone")).save(tiny_bundle_copy)
    assert remarks(Bundle.open(tiny_bundle_copy), tiny_checkpoint) == [
        "the bundle has the adapter tone merged in, what transformers runs has not"
    ]


@pytest.fixture
def everything_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.bench.peers._check_installed", lambda *_: None)


@pytest.mark.usefixtures("everything_is_installed")
def test_genai_runs_the_bundles_directory_and_reads_what_ours_reads(bundle: Bundle) -> None:
    (contender,) = prepared(bundle, "onnxruntime-genai")
    assert contender.command[-2:] == (str(bundle.path.resolve()), "2")
    assert contender.step_bytes(2, 10) == bundle.manifest.step_bytes + 20 * bundle.cache_geometry.bytes_per_token


@pytest.mark.usefixtures("everything_is_installed")
def test_genai_is_refused_what_it_cannot_run(tensorrt_bundle: Path) -> None:
    with pytest.raises(
        UserError, match=r"has no genai_config.json, by which onnxruntime-genai runs it; export it with"
    ):
        prepared(Bundle.open(tensorrt_bundle), "onnxruntime-genai")


@pytest.mark.usefixtures("everything_is_installed")
def test_openvino_runs_a_model_of_the_same_vocabulary(bundle: Bundle, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no openvino_model.xml; give the directory that optimum-cli export wrote"):
        prepared(bundle, f"openvino={tmp_path}")
    (tmp_path / "openvino_model.xml").touch()
    shutil.copy(tiny_checkpoint / "config.json", tmp_path)
    assert prepared(bundle, f"openvino={tmp_path}")[0].name == "openvino"
    (tmp_path / "config.json").write_text('{"vocab_size": 7}')
    with pytest.raises(UserError, match=r"a vocabulary of 7, .* one of 2048"):
        prepared(bundle, f"openvino={tmp_path}")
