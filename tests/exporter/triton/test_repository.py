"""What `package --triton` writes, and what it leaves alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from forward_bundles import Toy
from gpu_machine import Machine

import exporter.triton
from exporter.triton.config import Serving
from exporter.triton.repository import Packaged, package
from runtime.bundle import Bundle
from runtime.errors import UserError


def files(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def test_a_model_is_its_description_its_code_and_the_whole_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    packaged = package(tiny_bundle, tmp_path / "deep" / "models", Serving())
    assert packaged.path == tmp_path / "deep" / "models" / "tiny-nemotron"
    inner = packaged.path / "1" / "bundle"
    assert files(packaged.path) == {"config.pbtxt", "1/model.py"} | {f"1/bundle/{name}" for name in files(tiny_bundle)}
    Bundle.open(inner).check_hashes()
    assert packaged.bytes == sum(record.bytes for record in Bundle.open(inner).manifest.files.values())
    source = Path(exporter.triton.__file__).with_name("model.py")
    assert (packaged.path / "1" / "model.py").read_bytes() == source.read_bytes()
    assert (inner / "model.onnx.data").stat().st_nlink == 1  # a copy: no link to a bundle that is replaced one day
    # A server that looks at its repository every few seconds loads whatever directory it finds.
    assert [path.name for path in packaged.path.parent.iterdir()] == ["tiny-nemotron"]
    assert [path.name for path in packaged.path.parent.parent.iterdir()] == ["models"]


def served(packaged: Packaged) -> tuple[str, dict[str, str], tuple[str, ...]]:
    text = (packaged.path / "config.pbtxt").read_text()
    (kind,) = re.findall(r"kind: (\w+)", text)
    return kind, dict(re.findall(r'key: "(\w+)" value { string_value: "([^"]*)" }', text)), packaged.extras


def test_a_bundle_without_an_engine_runs_where_it_is_told(
    tiny_bundle: Path, tensorrt_bundle: Path, tmp_path: Path
) -> None:
    unasked = package(tiny_bundle, tmp_path / "cpu", Serving())
    assert served(unasked) == ("KIND_CPU", {"slots": "8", "backend": "auto"}, ("cpu",))
    given = {"slots": 3, "max_length": 64, "device": "cuda", "threads": 2}
    asked = package(tensorrt_bundle, tmp_path / "gpu", Serving(**given))
    written = {name: str(value) for name, value in given.items()}
    assert served(asked) == ("KIND_GPU", {**written, "backend": "auto"}, ("gpu",))


def test_a_bundle_that_cuda_would_not_run_is_refused_here_and_not_by_the_server(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="has fp32 activations, and ONNX Runtime's grouped attention on CUDA"):
        package(tiny_bundle, tmp_path / "models", Serving(device="cuda"))
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("serving", "kind", "extras"),
    [
        (Serving(), "KIND_GPU", ("tensorrt",)),
        (Serving(backend="tensorrt"), "KIND_GPU", ("tensorrt",)),
        (Serving(device="cpu"), "KIND_CPU", ("cpu",)),
        (Serving(backend="onnxruntime"), "KIND_CPU", ("cpu",)),
    ],
)
def test_an_engine_comes_along_and_says_how_many_run_at_once(
    machine: Machine, tmp_path: Path, serving: Serving, kind: str, extras: tuple[str, ...]
) -> None:
    (engine,) = machine.bundle.manifest.engines
    packaged = package(machine.bundle.path, tmp_path / "models", serving)
    found, parameters, needed = served(packaged)
    assert (found, needed) == (kind, extras)
    assert engine.max_batch_size < 8
    assert int(parameters["slots"]) == (engine.max_batch_size if kind == "KIND_GPU" else 8)
    assert (packaged.path / "1" / "bundle" / engine.path).is_file()


def test_an_engine_that_is_asked_for_must_be_there(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no engine of tensorrt-rtx; build one: nemotron-export build"):
        package(tiny_bundle, tmp_path / "models", Serving(backend="tensorrt-rtx"))
    with pytest.raises(UserError, match="tensorrt runs on the GPU; leave out --device cpu"):
        package(tiny_bundle, tmp_path / "models", Serving(backend="tensorrt", device="cpu"))


def test_a_model_that_is_there_is_replaced_with_force_alone_and_nothing_else_is(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    package(tiny_bundle, tmp_path / "models", Serving(), name="a")
    with pytest.raises(UserError, match="models/a exists; choose another place, or replace the model of nemotron"):
        package(tiny_bundle, tmp_path / "models", Serving(), name="a")
    assert package(tiny_bundle, tmp_path / "models", Serving(slots=2), name="a", force=True).serving.slots == 2
    (tmp_path / "models" / "other" / "1").mkdir(parents=True)
    with pytest.raises(UserError, match="models/other is not a model of nemotron-export, so --force does not"):
        package(tiny_bundle, tmp_path / "models", Serving(), name="other", force=True)
    assert files(tmp_path / "models" / "other") == set()
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == {"models"}


@pytest.mark.parametrize("name", ["../out", "a/b", ".hidden", "", "a b", "-x", ".."])
def test_a_name_cannot_leave_the_repository(tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"--name .* cannot name a model; give --name with letters"):
        package(tiny_bundle, tmp_path / "models", Serving(), name=name)
    assert not (tmp_path / "models").exists()


def test_the_bundle_is_no_place_for_models_of_itself(tiny_bundle_copy: Path) -> None:
    for place in (tiny_bundle_copy, tiny_bundle_copy / "models", Path("/")):
        with pytest.raises(UserError, match="is no place for models; give a directory of its own"):
            package(tiny_bundle_copy, place, Serving())


def test_what_does_not_generate_text_is_refused(tmp_path: Path) -> None:
    path = Toy("text-classification").write(tmp_path / "toy", golden=True)
    with pytest.raises(UserError, match="is for text-classification, not text-generation"):
        package(path, tmp_path / "models", Serving())
    assert not (tmp_path / "models").exists()


def test_a_copy_that_fails_leaves_nothing(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(UserError, match="No space left"):
        package(tiny_bundle, tmp_path / "models", Serving())
    assert not (tmp_path / "models").exists()
    assert not list(tmp_path.glob(".models*"))
