import numpy as np
import onnxruntime
import pytest

from runtime.bundle import CacheGeometry
from runtime.errors import UserError
from runtime.kv_cache import KVCache

GEOMETRY = CacheGeometry(layers=2, kv_heads=3, head_dim=4, dtype="float32")


@pytest.fixture(params=["cpu", "cuda"])
def cache(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> KVCache:
    """On the CPU, and as on a GPU with the device's memory played by the CPU's."""
    allocate = onnxruntime.OrtValue.ortvalue_from_shape_and_type

    def on_cpu(shape: tuple[int, ...], dtype: type, device: str, index: int) -> onnxruntime.OrtValue:
        assert (device, index) == ("cuda", 0)
        return allocate(shape, dtype, "cpu", 0)

    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_shape_and_type", on_cpu)
    return KVCache(GEOMETRY, slots=2, capacity=5, device=request.param)


def test_a_cache_starts_empty_and_gives_back_what_was_written(cache: KVCache) -> None:
    assert not any(part.any() for layer in range(2) for part in cache.read(layer))
    random = np.random.default_rng(0)
    content = [[random.normal(size=(2, 3, 5, 4)).astype(np.float32) for _ in range(2)] for _ in range(2)]
    for layer in range(2):
        cache.write(layer, *content[layer])
    for layer in range(2):
        np.testing.assert_array_equal(cache.read(layer), content[layer])


def test_a_slot_lies_in_one_piece(cache: KVCache) -> None:
    key, value = cache.addresses(1, 0)
    assert cache.addresses(1, 1) == (key + 3 * 5 * 4 * 4, value + 3 * 5 * 4 * 4)  # heads, tokens, dims, bytes
    assert cache.addresses(0, 0) != cache.addresses(1, 0)


def test_half_precision_takes_half_the_memory() -> None:
    cache = KVCache(CacheGeometry(1, 3, 4, "float16"), slots=1, capacity=5)
    assert cache.read(0)[0].nbytes == 3 * 5 * 4 * 2


def test_bfloat16_names_the_precisions_that_run() -> None:
    with pytest.raises(UserError, match=r"bfloat16 does not run on ONNX Runtime; .* fp16 or fp32"):
        KVCache(CacheGeometry(1, 3, 4, "bfloat16"), slots=1, capacity=5)


def test_a_cache_beyond_the_memory_says_how_large_it_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("numpy.zeros", refuse)
    with pytest.raises(UserError, match=r"no memory for a cache of 1024 × 1048576 tokens \(192.0 GiB\)"):
        KVCache(GEOMETRY, slots=1024, capacity=2**20)


def test_content_of_another_shape_is_refused() -> None:
    cache = KVCache(GEOMETRY, slots=1, capacity=5)
    with pytest.raises(ValueError, match=r"expected \(1, 3, 5, 4\)"):
        cache.write(0, np.zeros((1, 3, 4, 4)), np.zeros((1, 3, 5, 4)))


def test_slots_that_are_exchanged_have_each_others_tokens(cache: KVCache) -> None:
    before = np.random.default_rng(0).normal(size=(2, 2, 3, 5, 4)).astype(np.float32)
    cache.write(1, *before)
    expected = before.copy()
    if cache.exchange(0, 1, 3):  # not on a GPU
        expected[:, :, :, :3] = before[:, ::-1, :, :3]
    np.testing.assert_array_equal(cache.read(1), expected)


def test_slots_of_the_cpu_are_exchanged() -> None:
    assert KVCache(GEOMETRY, slots=2, capacity=5).exchange(0, 1, 3)
