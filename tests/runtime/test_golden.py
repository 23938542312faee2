import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from corruptions import redescribe
from onnx import numpy_helper

from runtime import load
from runtime.bundle import Bundle
from runtime.errors import CheckFailed, UserError
from runtime.golden import Golden, GoldenStep, prove, replay, selftest
from runtime.ort_session import OrtSession


def break_weights(directory: Path, value: float) -> None:
    model = onnx.load(directory / "model.onnx")
    norm = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == norm.input[1])
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) + np.float32(value), scale.name))
    onnx.save(model, directory / "model.onnx")


def test_cases_survive_the_file_they_are_stored_in(bundle_dir: Path, tmp_path: Path) -> None:
    golden = Golden.load(bundle_dir / "golden.npz")
    assert [step.case for step in golden.steps] == ["prefill", "decode"]
    golden.save(tmp_path / "again.npz")
    again = Golden.load(tmp_path / "again.npz")
    assert (again.slots, again.capacity, again.limit) == (2, 16, 1e-4)
    for before, after in zip(golden.steps, again.steps, strict=True):
        for name, value in vars(before).items():
            np.testing.assert_array_equal(value, getattr(after, name))


def test_a_whole_bundle_passes_its_selftest(bundle_dir: Path) -> None:
    result = selftest(bundle_dir)
    assert result.passed
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert data["evaluated_by"].startswith("onnxruntime-cpu 1.")
    assert {c["case"] for c in data["comparisons"]} == {"files", "prefill", "decode"}
    assert all(set(c) == {"name", "case", "metric", "value", "limit", "passed"} for c in data["comparisons"])


def test_a_wrong_model_fails_its_selftest_and_does_not_load(bundle_copy: Path) -> None:
    break_weights(bundle_copy, -1.0)  # the +1 of LayerNorm1P, forgotten in one layer
    redescribe(bundle_copy)
    result = selftest(bundle_copy)
    assert not result.passed
    assert {c.case for c in result.comparisons if not c.passed} == {"prefill", "decode"}
    for _ in range(2):  # a failure is not remembered as a pass
        with pytest.raises(CheckFailed, match=r"is not the exported model: logits of 'prefill' differ by"):
            load(bundle_copy)


def test_a_model_that_gives_no_numbers_fails(bundle_copy: Path) -> None:
    break_weights(bundle_copy, np.nan)
    redescribe(bundle_copy)
    failed = [c for c in selftest(bundle_copy).comparisons if not c.passed]
    assert failed
    assert all(c.value is None for c in failed)
    with pytest.raises(CheckFailed):
        load(bundle_copy)


def test_a_changed_file_fails_the_selftest_by_name(bundle_copy: Path) -> None:
    config = bundle_copy / "config.json"
    config.write_text(config.read_text().replace("nemotron", "nemotrom"))
    result = selftest(bundle_copy)
    assert [c.name for c in result.comparisons if not c.passed] == ["config.json"]


class Constant:
    """A session that answers every step with the same logits."""

    backend, version, device = "constant", "1", "none"
    slots, capacity, vocab_size, max_slots, max_capacity, choice = 1, 8, 6, None, 8, ""

    def __init__(self, logits: list[float]) -> None:
        self._logits = np.array([[logits]], np.float32)

    def step(self, *_: Any) -> Any:
        return self._logits

    def reopen(self, **_: int) -> "Constant":
        return self


RIGHT = [5.0, 4.0, 3.0, 0.0, 0.0, 0.0]


def golden_of(logits: list[float]) -> Golden:
    one = np.array([1])
    step = GoldenStep.record(
        "prefill", tokens=one[None], lengths=one, past_lengths=one - 1, slots=one - 1,
        logits=np.array([[logits]], np.float32), top=3,
    )  # fmt: skip
    return Golden(slots=1, capacity=8, limit=1e-3, steps=[step])


@pytest.mark.parametrize(
    ("logits", "value"),
    [
        (RIGHT, 0.0),
        ([5.0, 4.0, 3.5, 0.0, 0.0, 0.0], 0.5),
        ([5.0, 4.0, 3.0, 0.0, 7.0, 0.0], 4.0),  # a token that was not among the likely ones
        ([5.0, 4.0, 3.0, 0.0, float("nan"), 0.0], None),
        ([5.0, 4.0, 3.0, 0.0, float("-inf"), 0.0], None),
    ],
)
def test_any_wrong_logit_that_matters_is_seen(logits: list[float], value: float | None) -> None:
    (comparison,) = replay(Constant(logits), golden_of(RIGHT))  # type: ignore[arg-type]
    assert comparison.value == value
    assert comparison.passed == (value == 0.0)


def test_a_pass_is_remembered_for_these_files_on_this_device_with_this_version(
    bundle_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replays: list[int] = []
    monkeypatch.setattr("runtime.golden.replay", lambda session, golden: replays.append(1) or [])
    bundle = Bundle.open(bundle_dir)
    session = OrtSession(bundle, slots=1, capacity=1)
    for _ in range(2):
        prove(bundle, session)
    assert len(replays) == 1
    for name in ("version", "device", "backend"):
        monkeypatch.setattr(session, name, "another")
        prove(bundle, session)
        prove(bundle, session)
    assert len(replays) == 4


def test_other_files_prove_themselves_anew(
    bundle_dir: Path, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(bundle_dir)
    break_weights(bundle_copy, 0.01)
    redescribe(bundle_copy)
    with pytest.raises(CheckFailed):
        load(bundle_copy)


def test_a_cache_directory_that_cannot_be_written_is_no_obstacle(
    bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    load(bundle_dir)
    assert selftest(bundle_dir).passed


def test_a_bundle_exported_without_the_gate_loads_but_has_no_selftest(bundle_copy: Path) -> None:
    (bundle_copy / "golden.npz").unlink()
    redescribe(bundle_copy)
    load(bundle_copy)
    with pytest.raises(UserError, match=r"has no golden\.npz; export the bundle again"):
        selftest(bundle_copy)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nothing", b"text"])
def test_a_damaged_case_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "golden.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"golden\.npz is damaged"):
        Golden.load(path)


def test_a_case_file_that_holds_pickles_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "golden.npz"
    np.savez(path, schema=np.array({"a": 1}, dtype=object))
    with pytest.raises(UserError, match="is damaged; copy or export"):
        Golden.load(path)


def test_a_file_that_changed_fails_the_selftest_without_being_run(bundle_copy: Path) -> None:
    """Of the same size, so that opening the bundle sees nothing; the graph is no longer one that loads."""
    model = bundle_copy / "model.onnx"
    content = bytearray(model.read_bytes())
    content[100:300] = bytes(200)
    model.write_bytes(content)
    result = selftest(bundle_copy)
    assert not result.passed
    assert [comparison.name for comparison in result.comparisons if not comparison.passed] == ["model.onnx"]
