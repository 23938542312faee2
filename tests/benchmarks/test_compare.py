"""The comparison with peers: its ratios, its table and the protocol that contenders speak, on numbers made up here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from benchmarks import compare, compare_report, compare_rounds, reach
from benchmarks.compare_report import roofline
from benchmarks.contenders.base import made
from benchmarks.contenders.onnx_bytes import step_bytes
from benchmarks.reach import Figure, judge, worse_quartile
from exporter.bench.process import Contender

ROOT = Path(__file__).parents[2]
# Its tokens are those of the prompt and how many were asked for.
COUNTING = """
import sys
from exporter.bench.serve import serve

class Counting:
    packages, weight_bytes, cache_bytes = (), None, None
    def __init__(self):
        print("a library says hello")
        self.states = {}
    def prompt(self, state, prompts, capacity):
        self.states[state] = prompts.sum(1) + capacity
        return self.states[state].tolist()
    def step(self, state):
        self.states[state] = self.states[state] + 1
        return self.states[state].tolist()

serve(Counting)
"""


def contender(*command: str, peer: str = "peer", precision: str = "int4") -> Contender:
    return Contender(peer, precision, command, 1_000, 10, {"peer": "1.0"})


def test_the_quartile_that_counts_is_the_one_that_is_worse_for_us() -> None:
    ratios = [1.0, 1.1, 1.2, 1.3, 9.0]
    assert worse_quartile(ratios, more_is_better=True) == pytest.approx(1.1)
    assert worse_quartile(ratios, more_is_better=False) == pytest.approx(1.3)


def test_ratios_are_of_one_round_and_not_of_medians() -> None:
    figure = Figure("decode", ("us int4",), "them Q4_0", 1.5)
    samples = {"us int4": {"decode": [10.0, 20.0, 40.0]}, "them Q4_0": {"decode": [5.0, 40.0, 10.0]}}
    verdict = judge(figure, samples)
    assert verdict.ratios == [2.0, 0.5, 4.0]
    assert verdict.value == pytest.approx(1.25)
    assert verdict.met is False
    assert judge(Figure("decode", ("us int4",), "them Q4_0", 1.25), samples).met is True


def test_seconds_are_to_be_few_and_the_better_of_two_bundles_counts_in_each_round() -> None:
    figure = Figure("first_token", ("us int4", "us int8"), "them", 1.1)
    samples = {
        "us int4": {"first_token": [3.0, 1.0]},
        "us int8": {"first_token": [2.0, 2.0]},
        "them": {"first_token": [2.0, 1.0]},
    }
    assert judge(figure, samples) == (figure, [1.0, 1.0], 1.0)
    assert judge(figure, samples | {"us int8": {}}).ratios == [1.5, 1.0]
    assert judge(figure, samples | {"us int8": {}}).met is False


def test_a_number_is_compared_with_its_own_limit_or_another_of_its_contender() -> None:
    samples = {"us": {"resident": [310e6], "disk": [300e6]}}
    assert judge(Figure("resident", ("us",), None, 300e6), samples).met is False
    assert judge(Figure("resident", ("us",), "us", 1.15, "disk"), samples).met is True


def test_a_figure_of_something_that_did_not_run_is_neither_met_nor_missed() -> None:
    verdict = judge(Figure("decode", ("us",), "them", 1.0), {"us": {"decode": [1.0]}})
    assert (verdict.value, verdict.met) == (None, None)


@pytest.mark.parametrize("preset", reach.FIGURES)
def test_every_figure_is_of_contenders_that_the_comparison_has(preset: str) -> None:
    from benchmarks.compare import PEERS
    from benchmarks.compare_rounds import FAR_ON, IN_BATCH

    known = {f"{peer} {name}" for peer, names in PEERS[preset].items() for name in names}
    for figure in reach.FIGURES[preset]:
        contenders = {*figure.ours, *filter(None, [figure.theirs])}
        assert contenders <= known
        assert figure.measure != "batch" or {name.partition(" ")[2] for name in contenders} <= IN_BATCH
        assert figure.measure != "long" or contenders <= FAR_ON


def test_the_roofline_reads_weights_once_for_all_rows_and_each_rows_cache() -> None:
    one = contender()
    assert one.step_bytes(rows=1, context=100) == 2_000
    assert one.step_bytes(rows=8, context=100) == 9_000
    assert roofline(18_000.0, one.step_bytes(8, 100), rows=8) == 16.0


def test_an_embedding_and_rotary_tables_count_a_row_and_a_shared_matrix_once(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return helper.make_tensor(name, TensorProto.FLOAT, shape, np.zeros(shape, np.float32).tobytes(), raw=True)

    attention = ["h", "", "", "k", "v", "n", "t", "cos", "sin"]
    nodes = [
        helper.make_node("Gather", ["embedding", "ids"], ["h"]),
        helper.make_node("MatMul", ["h", "matrix"], ["a"]),
        helper.make_node("MatMul", ["a", "matrix"], ["b"]),
        helper.make_node("GroupQueryAttention", attention, ["c"], domain="com.microsoft"),
    ]
    weights = [weight("embedding", 50, 8), weight("matrix", 8, 8), weight("cos", 100, 4), weight("sin", 100, 4)]
    graph = helper.make_graph(nodes, "g", [], [], initializer=weights)
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    assert step_bytes(tmp_path / "model.onnx") == 4 * (8 + 8 * 8 + 4 + 4)


def test_what_was_cut_off_is_made_anew(tmp_path: Path) -> None:
    def cut_off(path: Path) -> None:
        path.write_text("half")
        raise SystemExit(1)

    with pytest.raises(SystemExit):
        made(tmp_path / "model", cut_off)
    assert not (tmp_path / "model").exists()
    assert made(tmp_path / "model", lambda path: path.write_text("whole")).read_text() == "whole"
    assert made(tmp_path / "model", cut_off).read_text() == "whole"


def report() -> dict[str, Any]:
    numbers = {
        "decode": [90.0, 110.0, 100.0],
        "first_token": [0.5, 0.5, 0.5],
        "step_bytes": [1e8],
        "resident": [2e8],
        "peak": [3e8],
        "start": [1.5],
    }
    row = compare_report.row_of(numbers, 2e10, {"decode": (1, 10**8), "batch": (8, 10**9)})
    verdict = judge(Figure("decode", ("us int4",), "them Q4_0", 1.0), {"us int4": numbers, "them Q4_0": numbers})
    missing = judge(Figure("decode", ("us int4",), "other int4", 1.0), {"us int4": numbers})
    return {
        "preset": "242m",
        "rounds": 3,
        "machine": {"cpu": "a cpu", "cores": 2, "read_gb_s": 20.0},
        "not_run": {"openvino": "no converter"},
        "contenders": {"us int4": row | {"agreement": 0.75}, "them Q4_0": row | {"agreement": None}},
        "figures": [verdict.to_json(), missing.to_json()],
    }


def test_the_table_has_shares_of_the_roofline_figures_and_what_did_not_run() -> None:
    lines = compare_report.table(report()).splitlines()
    assert lines[2].split() == ["us", "int4", "100.0", "50%", "0.50", "–", "–", "100", "200", "300", "1.5", "75%"]
    assert lines[3].split()[-1] == "–"
    assert "openvino: not run: no converter" in lines
    assert lines[-2:] == [
        "met           decode us int4 ≥ 1 × them Q4_0: 1.00",
        "not measured  decode us int4 ≥ 1 × other int4",
    ]
    json.dumps(report())


def test_the_picture_names_peers_and_draws_the_roofline(tmp_path: Path) -> None:
    compare_report.draw(report(), tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert all(text in drawn for text in ("us", "them", "Q4_0", "reading at 20.0 GB/s"))


def test_a_plot_that_cannot_be_drawn_is_refused_before_anything_is_set_up(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.compare",
        "--plot",
        tmp_path / "plot.txt",
        "--directory",
        tmp_path / "d",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "give a file that ends in .svg or .png" in done.stderr
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(("bound", "code"), [(1e-9, 0), (1e9, 1)])
def test_a_missed_figure_is_exit_code_1_and_everything_is_in_the_json(
    bound: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = (("nemotron-export", "int4"), ("llama.cpp", "Q4_0"), ("transformers", "fp32"))
    counting = [(contender(sys.executable, "-c", COUNTING, peer=peer, precision=bits), 2_000) for peer, bits in names]
    (tmp_path / "242m").mkdir()
    figures = tuple(
        Figure(measure, ("nemotron-export int4",), "llama.cpp Q4_0", bound) for measure in ("batch", "long")
    )
    monkeypatch.setattr(compare, "set_up", lambda *_: (counting, {"openvino": "no converter"}))
    monkeypatch.setattr(compare.Bandwidth, "measure", lambda _: 2e10)
    monkeypatch.setitem(compare.FIGURES, "242m", figures)
    given = ["--rounds", "4", "--directory", str(tmp_path), "--results", str(tmp_path / "r.json")]
    assert compare.main(given) == code
    written = json.loads((tmp_path / "r.json").read_text())
    assert [figure["met"] for figure in written["figures"]] == [not code] * 2
    assert [len(figure["all"]) for figure in written["figures"]] == [4, 4]
    rounds = {
        name: {key: len(found) for key, found in row["rounds"].items()} for name, row in written["contenders"].items()
    }
    assert rounds["llama.cpp Q4_0"] == {"first_token": 4, "decode": 4, "batch": 4, "long": 4}
    assert rounds["transformers fp32"] == {}  # one turn: no figure is about it
    assert {row["agreement"] for row in written["contenders"].values()} == {1.0}
    assert written["not_run"] == {"openvino": "no converter"}
    assert (tmp_path / "r.svg").is_file()
    assert ("MISSED" in capsys.readouterr().out) is bool(code)


@pytest.mark.parametrize("rounds", [1, 7, 64])
def test_a_row_that_goes_on_through_all_rounds_ends_where_the_model_does(rounds: int) -> None:
    works = compare_rounds.going_on(contender(peer="llama.cpp", precision="Q4_0"), rounds)
    assert works["long"].capacity(rounds + 1) == 4096
    assert works["batch"].capacity(rounds + 1) <= 4096


def test_prompts_of_a_batch_differ_and_one_by_itself_is_a_row_of_them(tmp_path: Path) -> None:
    prompts = compare_rounds.Prompts(tmp_path)
    batch = np.fromfile(prompts.file(compare_rounds.BATCH), np.int32).reshape(8, 512)
    assert len({row.tobytes() for row in batch}) == 8
    assert batch.max() < 2048
    alone = np.fromfile(prompts.file(compare_rounds.AGREE, 1), np.int32)[: compare_rounds.AGREE.prompt]
    assert alone.tolist() == batch.ravel()[128:256].tolist()
