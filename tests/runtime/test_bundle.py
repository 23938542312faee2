import json
from pathlib import Path

import pytest
from corruptions import redescribe

from runtime.bundle import Bundle, CacheGeometry, describe_files
from runtime.errors import CheckFailed, UserError
from runtime.manifest import MODEL, FileRecord


def test_a_whole_bundle_opens_and_says_what_it_holds(bundle_dir: Path) -> None:
    bundle = Bundle.open(bundle_dir)
    assert bundle.cache_geometry == CacheGeometry(layers=2, kv_heads=2, head_dim=32, dtype="float32")
    assert bundle.vocab_size == 320
    assert bundle.manifest.max_length == 96
    assert bundle.config["model_type"] == "nemotron"
    assert bundle.file("model.onnx") == bundle_dir / "model.onnx"
    bundle.check_hashes()


def test_what_is_no_bundle_is_named_with_the_remedy(tmp_path: Path, bundle_dir: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere does not exist; .*nemotron-export export"):
        Bundle.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"model.onnx is not a directory"):
        Bundle.open(bundle_dir / "model.onnx")
    with pytest.raises(UserError, match=r"is not a bundle, it has no manifest.json"):
        Bundle.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is a checkpoint, not a bundle"):
        Bundle.open(tmp_path)


def test_a_missing_file_is_named(bundle_copy: Path) -> None:
    (bundle_copy / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer.json is missing; copy the bundle again"):
        Bundle.open(bundle_copy)


def test_a_truncated_file_is_named_with_both_sizes(bundle_copy: Path) -> None:
    model = bundle_copy / "model.onnx"
    size = model.stat().st_size
    model.write_bytes(model.read_bytes()[:-7])
    with pytest.raises(UserError, match=rf"model.onnx has {size - 7} bytes, its manifest says {size}"):
        Bundle.open(bundle_copy)


def test_a_changed_byte_is_found_by_the_hashes(bundle_copy: Path) -> None:
    model = bundle_copy / "model.onnx"
    content = bytearray(model.read_bytes())
    content[-100] ^= 1
    model.write_bytes(content)
    bundle = Bundle.open(bundle_copy)
    with pytest.raises(CheckFailed, match=r"model.onnx differ from the manifest's sha256"):
        bundle.check_hashes()


def test_a_file_the_manifest_does_not_name_is_not_used(bundle_copy: Path) -> None:
    (bundle_copy / "extra.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no extra.json"):
        Bundle.open(bundle_copy).file("extra.json")


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 2}, 5, {2}),
        ({"eos_token_id": [2, 3]}, 5, {2, 3}),
        ({"eos_token_id": None}, 5, set()),
        ({}, 5, {5}),
        ({}, [5, 6], {5, 6}),
        (None, 5, {5}),
        ({}, None, set()),
    ],
)
def test_a_text_ends_where_the_checkpoint_says(
    *,
    bundle_copy: Path,
    generation: dict[str, object] | None,
    config: object,
    expected: set[int],
) -> None:
    (bundle_copy / "config.json").write_text(json.dumps({"eos_token_id": config}))
    if generation is None:
        (bundle_copy / "generation_config.json").unlink()
    else:
        (bundle_copy / "generation_config.json").write_text(json.dumps(generation))
    redescribe(bundle_copy)
    assert Bundle.open(bundle_copy).eos_token_ids == expected


def test_files_are_described_by_relative_name_without_the_manifest(bundle_copy: Path) -> None:
    (bundle_copy / "engines").mkdir()
    (bundle_copy / "engines" / "model.plan").write_bytes(b"abc")
    files = describe_files(bundle_copy)
    assert "manifest.json" not in files
    record = files["engines/model.plan"]
    assert record.bytes == 3
    assert record.sha256.startswith("ba7816bf")  # sha256 of "abc", FIPS 180-2


def test_files_that_are_known_are_not_read_again(bundle_copy: Path) -> None:
    known = {MODEL: FileRecord(sha256="0" * 64, bytes=1)}
    assert describe_files(bundle_copy, known=known | {"gone": known[MODEL]}) == describe_files(bundle_copy) | known
