import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from corruptions import redescribe
from forward_bundles import HIDDEN, Toy
from onnx import numpy_helper

from runtime.bundle import Bundle
from runtime.errors import CheckFailed, UserError
from runtime.forward import ForwardSession, open_forward
from runtime.golden import Golden, prove_forward, selftest
from runtime.golden_forward import ForwardCase, GoldenForward, replay_forward

TASKS = ("feature-extraction", "text-classification", "token-classification", "question-answering")


def break_weights(directory: Path, name: str, value: float) -> None:
    model = onnx.load(directory / "model.onnx")
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    array = numpy_helper.to_array(tensor) + np.float32(value)
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(model, directory / "model.onnx")
    redescribe(directory)


def test_cases_survive_the_file_they_are_stored_in(tmp_path: Path) -> None:
    golden = Toy("feature-extraction", extras=True).golden()
    for limit in (1e-4, {"last_hidden_state": 1e-4, "hidden_states.0": 2e-5, "attentions.0": 1e-6}):
        replace(golden, limit=limit).save(tmp_path / "golden.npz")
        again = GoldenForward.load(tmp_path / "golden.npz")
        assert again.limit == limit
        for before, after in zip(golden.cases, again.cases, strict=True):
            assert (before.case, list(before.outputs)) == (after.case, list(after.outputs))
            np.testing.assert_array_equal(before.input_ids, after.input_ids)
            np.testing.assert_array_equal(before.attention_mask, after.attention_mask)
            for name, value in before.outputs.items():
                np.testing.assert_array_equal(value, after.outputs[name])


@pytest.mark.parametrize("task", TASKS)
def test_a_whole_bundle_passes_whatever_stands_where_there_is_padding(task: str, tmp_path: Path) -> None:
    result = selftest(Toy(task).write(tmp_path / "toy", golden=True))
    assert result.passed
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert data["evaluated_by"].startswith("onnxruntime-cpu 1.")
    assert {c["case"] for c in data["comparisons"]} == {"files", "right-padded", "left-padded"}


@pytest.mark.parametrize("task", TASKS)
def test_a_wrong_head_fails_and_is_never_remembered_as_right(task: str, tmp_path: Path) -> None:
    path = Toy(task).write(tmp_path / "toy", golden=True)
    break_weights(path, "w0" if task == "feature-extraction" else "w2", 0.01)
    assert {c.case for c in selftest(path).comparisons if not c.passed} == {"right-padded", "left-padded"}
    bundle = Bundle.open(path)
    for _ in range(2):
        with pytest.raises(CheckFailed, match=r"is not the exported model: .* of 'right-padded' differ by"):
            prove_forward(bundle, open_forward(bundle))


def test_a_model_that_gives_no_numbers_fails(tmp_path: Path) -> None:
    path = Toy("token-classification").write(tmp_path / "toy", golden=True)
    break_weights(path, "w2", np.nan)
    failed = [c for c in selftest(path).comparisons if not c.passed]
    assert [c.value for c in failed] == [None, None]


def test_hidden_states_and_attentions_are_compared_where_tokens_are_real(tmp_path: Path) -> None:
    toy = Toy("feature-extraction", extras=True)
    path = toy.write(tmp_path / "toy", golden=True)
    result = selftest(path)
    assert result.passed
    assert {c.name for c in result.comparisons if c.case != "files"} == {
        "last_hidden_state", "hidden_states.0", "attentions.0"
    }  # fmt: skip
    golden = toy.golden()
    wrong = golden.cases[0].outputs["attentions.0"].copy()
    wrong[1, 0, 2, 1] = 0.5  # the last real query and a real key of the short row
    case = replace(golden.cases[0], outputs={"attentions.0": wrong})
    (row,) = replay_forward(open_forward(Bundle.open(path)), replace(golden, cases=[case]))
    assert (row.value, row.passed) == (0.5, False)


def test_each_output_may_have_a_limit_of_its_own(tmp_path: Path) -> None:
    toy = Toy("question-answering")
    session = open_forward(Bundle.open(toy.write(tmp_path / "toy")))
    limits = {"start_logits": 1e-4, "end_logits": 0.0}
    passed = {row.name: row.passed for row in replay_forward(session, replace(toy.golden(), limit=limits))}
    assert passed["start_logits"]
    assert {row.limit for row in replay_forward(session, replace(toy.golden(), limit=limits))} == {1e-4, 0.0}


def test_a_pass_is_remembered_for_this_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(Toy("question-answering").write(tmp_path / "toy", golden=True))
    session: ForwardSession = open_forward(bundle)
    prove_forward(bundle, session)
    monkeypatch.setattr("runtime.golden.replay_forward", None)
    prove_forward(bundle, session)
    monkeypatch.setattr(session, "device", "another")
    with pytest.raises(TypeError):
        prove_forward(bundle, session)


def test_an_output_that_is_not_there_or_of_another_shape_is_named(tmp_path: Path) -> None:
    session = open_forward(Bundle.open(Toy("feature-extraction").write(tmp_path / "toy")))
    ids = mask = np.ones((1, 2), np.int64)
    for name, shape in (("logits", (1, 2)), ("last_hidden_state", (1, 2, HIDDEN + 1))):
        case = ForwardCase("plain", ids, mask, {name: np.zeros(shape, np.float32)})
        with pytest.raises(CheckFailed, match=rf"{name} of 'plain' should be .*; copy or export"):
            replay_forward(session, GoldenForward(1e-4, [case]))


def test_cases_of_the_other_kind_are_named(bundle_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"golden\.npz holds cases of kind 'steps', not 'forward'; export"):
        GoldenForward.load(bundle_dir / "golden.npz")
    Toy("question-answering").golden().save(tmp_path / "golden.npz")
    with pytest.raises(UserError, match=r"golden\.npz holds cases of kind 'forward', not 'steps'; export"):
        Golden.load(tmp_path / "golden.npz")
    (tmp_path / "golden.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(UserError, match=r"golden\.npz is damaged"):
        GoldenForward.load(tmp_path / "golden.npz")
