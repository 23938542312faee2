import subprocess
import sys
from pathlib import Path

from forward_bundles import Toy

FOREIGN = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "exporter")


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_generating_needs_neither_torch_nor_transformers(bundle_dir: Path) -> None:
    """What the deployment machine has installed: everything else is made to fail on import."""
    code = f"""
import sys
for name in {FOREIGN}: sys.modules[name] = None
from runtime import load
model = load({str(bundle_dir)!r})
chat = model.encode_chat([{{"role": "user", "content": "Mars?"}}])
print(len(model.generate(["Mars", chat], max_new_tokens=3, temperature=1.0).sequences))
"""
    assert python(code).strip() == "2"


def test_predicting_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    calls = {
        "feature-extraction": "embed('mars')",
        "text-classification": "classify('mars')",
        "token-classification": "tag('mars')",
        "question-answering": "answer('mars', 'mars')",
    }
    paths = [str(Toy(task).write(tmp_path / task, golden=True)) for task in calls]
    code = f"""
import sys
for name in {FOREIGN}: sys.modules[name] = None
from runtime import load
for path, call in zip({paths}, {list(calls.values())}): print(len(eval("load(path)." + call)))
"""
    assert python(code).split() == ["1"] * 4


def test_pipelines_need_neither_torch_nor_transformers(bundle_dir: Path, tmp_path: Path) -> None:
    calls = {
        str(bundle_dir): "('Mars', max_new_tokens=3)",
        str(Toy("feature-extraction").write(tmp_path / "features")): "('mars')",
        str(Toy("text-classification").write(tmp_path / "classes")): "('mars')",
        str(Toy("token-classification").write(tmp_path / "tags")): "(['mars'], aggregation_strategy='first')",
        str(Toy("question-answering").write(tmp_path / "answers")): "([{'question': 'mars', 'context': 'mars'}] * 2)",
    }
    code = f"""
import sys
for name in {FOREIGN}: sys.modules[name] = None
from runtime import pipeline
for path, call in {calls}.items(): print(len(eval("pipeline(path)" + call)))
"""
    assert python(code).split() == ["1", "1", "1", "1", "2"]


def test_importing_the_runtime_is_quick() -> None:
    code = """
import time, sys
import numpy, onnxruntime
started = time.perf_counter()
import runtime, runtime.bundle, runtime.generate, runtime.golden, runtime.session, runtime.text_generation
print(time.perf_counter() - started)
print("jinja2" in sys.modules, "tokenizers" in sys.modules)
"""
    seconds, heavy = min((python(code).splitlines() for _ in range(3)), key=lambda lines: float(lines[0]))
    assert float(seconds) < 0.3
    assert heavy == "False False"
