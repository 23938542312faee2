import json
from pathlib import Path

import pytest

from runtime.errors import UserError
from runtime.manifest import Manifest
from runtime.measured import Comparison


def edit(directory: Path, **changes: object) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_a_newer_version_wrote_survives_a_round_trip(bundle_copy: Path) -> None:
    data = json.loads((bundle_copy / "manifest.json").read_text())
    data["energy"] = {"joules": 1}
    data["source"]["revision"] = "main"
    data["graph"]["inputs"][0]["layout"] = "rows"
    edit(bundle_copy, **data)
    Manifest.load(bundle_copy).save(bundle_copy)
    assert json.loads((bundle_copy / "manifest.json").read_text()) == data


@pytest.mark.parametrize("schema", [0, 2, "1", None])
def test_an_unknown_schema_is_refused(bundle_copy: Path, schema: object) -> None:
    edit(bundle_copy, schema=schema)
    with pytest.raises(UserError, match=r"schema .* this version reads 1; upgrade"):
        Manifest.load(bundle_copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_length": "512"}, r"max_length should be an integer, found '512'"),
        ({"max_length": True}, r"max_length should be an integer, found 'True'"),
        ({"max_length": 0}, r"max_length should be at least 1"),
        ({"passes": {}}, r"passes should be a list"),
        ({"graph": {"inputs": []}}, r"graph lacks 'outputs'"),
        ({"graph": {"inputs": [{"name": "x", "dtype": "i", "shape": [1.5]}], "outputs": []}}, r"shape\[0\]"),
        ({"files": {"model.onnx": 3}}, r"files\['model.onnx'\] should be an object"),
        ({"lowering": 3}, r"lowering should be"),
    ],
)  # fmt: skip
def test_a_field_of_the_wrong_type_is_named(bundle_copy: Path, change: dict[str, object], message: str) -> None:
    edit(bundle_copy, **change)
    with pytest.raises(UserError, match=message):
        Manifest.load(bundle_copy)


def test_text_that_is_not_json_is_refused(bundle_copy: Path) -> None:
    (bundle_copy / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest.json is not JSON .* export the bundle again"):
        Manifest.load(bundle_copy)


@pytest.mark.parametrize("name", ["../model.onnx", "/etc/passwd", "a/../../b", "", ".", "..\\model.onnx"])
def test_a_file_name_that_leaves_the_bundle_is_refused(bundle_copy: Path, name: str) -> None:
    edit(bundle_copy, files={name: {"sha256": "0", "bytes": 1}})
    with pytest.raises(UserError, match="leads out of the bundle"):
        Manifest.load(bundle_copy)


def test_a_link_that_leaves_the_bundle_is_refused(bundle_copy: Path, tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere.onnx"
    (bundle_copy / "model.onnx").rename(outside)
    (bundle_copy / "model.onnx").symlink_to(outside)
    with pytest.raises(UserError, match=r"'model.onnx', which leads out of the bundle"):
        Manifest.load(bundle_copy)


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Manifest.load(bundle_copy)
    before = (bundle_copy / "manifest.json").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left on device; free space"):
        manifest.save(bundle_copy)
    assert (bundle_copy / "manifest.json").read_bytes() == before
    assert not list(bundle_copy.glob("*.partial"))


def test_a_value_that_is_no_number_is_written_as_null() -> None:
    comparison = Comparison(name="logits", case="c", metric="max_abs", value=None, limit=1e-4, passed=False)
    written = json.dumps(comparison.to_json(), allow_nan=False)
    assert json.loads(written)["value"] is None
    assert Comparison.from_json(json.loads(written), "here") == comparison
