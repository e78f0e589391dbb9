import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from cache.codecs import NONE, CastStats, cast_array, check_cast
from cache.errors import StoreError
from cache.schema import LevelSchema, StoreSchema
from pipeline.extraction import buffer
from pipeline.extraction.loader import DeviceCopies
from tests.errors import raises

LEVEL = "level0/features"
N_SAMPLES = 16
ROWS = slice(0, N_SAMPLES)
MEMORY_FORMATS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])


@pytest.fixture
def maps():
    return torch.randn(N_SAMPLES, 5, 6, 7, generator=torch.Generator().manual_seed(0)) * 10


def make_buffer(dtype="float16", copies=None, is_pooled=False):
    names, level = tuple(map(str, range(N_SAMPLES))), LevelSchema(5, 6, 7, stride=4, layer="a")
    levels, pooled = ((), {"mean": 5}) if is_pooled else ((level,), {})
    schema = StoreSchema(names, ("train",) * N_SAMPLES, levels, pooled, dtype, shard_size=N_SAMPLES)
    return buffer.ShardBuffer(schema, copies or DeviceCopies("cpu"))


def collect_level(shard_buffer):
    arrays, stats = shard_buffer.collect(N_SAMPLES)
    return arrays[LEVEL], stats[LEVEL]


@MEMORY_FORMATS
@pytest.mark.parametrize("nonfinite", [None, float("nan"), float("inf")])
@pytest.mark.parametrize("index", [np.s_[:], np.s_[:, :3], np.s_[::2, :, :4, ::2]])
def test_cast_with_stats_equals_the_writers_cast(maps, memory_format, nonfinite, index):
    if nonfinite is not None:
        maps[2, 2, 1, 0] = nonfinite
    maps[:, 0] = 0  # zeros do not count as subnormal
    maps = maps.contiguous(memory_format=memory_format)[index]
    low, stats = buffer.cast_with_stats(maps, torch.float16)
    with ThreadPoolExecutor(2) as pool:
        expected = cast_array(maps.contiguous().numpy(), LEVEL, "float16", NONE, pool)
    np.testing.assert_array_equal(low.numpy(), expected.stored)
    actual_error = check_cast(CastStats(*stats.numpy().T), LEVEL, "float16")
    assert actual_error == pytest.approx(check_cast(expected.stats, LEVEL, "float16"), rel=1e-4)
    assert 0 < actual_error["squared_error"] < 1e-6 * actual_error["sum_of_squares"]


@pytest.mark.parametrize(("scale", "mention"), [(1e5, "65504"), (1e-9, "100%")])
def test_cast_of_values_that_do_not_fit_leads_to_the_writers_refusals(maps, scale, mention):
    _, stats = buffer.cast_with_stats(maps * scale, torch.float16)
    with raises(StoreError, LEVEL, mention, key="extract.dtype", value="float16"):
        check_cast(CastStats(*stats.numpy().T), LEVEL, "float16")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_shard_buffer_is_filled_by_batches_and_reused(maps, dtype):
    shard_buffer = make_buffer(dtype)
    for factor in (1, 3):
        for rows in (slice(0, 10), slice(10, 16)):
            shard_buffer.put(rows, LEVEL, factor * maps[rows])
        values, stats = collect_level(shard_buffer)
        np.testing.assert_array_equal(values, (factor * maps).numpy().astype(dtype))
        assert (stats.squared_error.sum() > 0) == (dtype == "float16")


@pytest.mark.parametrize(("dtype", "nonfinite"), [("float16", float("inf")), ("float32", float("nan"))])
def test_shard_buffer_refuses_nonfinite_values(maps, dtype, nonfinite):
    """A forward pass in float16 may overflow to infinity on an image that the dry run did not include."""
    shard_buffer = make_buffer(dtype)
    maps[9, 1] = nonfinite
    shard_buffer.put(ROWS, LEVEL, maps)
    with raises(StoreError, 42, key=LEVEL, value=42):
        shard_buffer.collect(N_SAMPLES)
    assert len(shard_buffer.collect(9)[0][LEVEL]) == 9


@MEMORY_FORMATS
@pytest.mark.parametrize("block_values", [1, 3 * 210])
def test_shard_buffer_in_blocks_equals_one_cast(monkeypatch, maps, memory_format, block_values):
    monkeypatch.setattr(buffer, "_CPU_BLOCK_VALUES", block_values)
    maps[9:, 1:3] *= 1e-7  # too small for float16
    maps = maps.contiguous(memory_format=memory_format)
    shard_buffer = make_buffer()
    shard_buffer.put(ROWS, LEVEL, maps)
    low, stats = buffer.cast_with_stats(maps, torch.float16)
    values, actual = collect_level(shard_buffer)
    np.testing.assert_array_equal(values, low.numpy())
    np.testing.assert_allclose(np.stack(actual, axis=1), stats, rtol=1e-5)
    assert actual.n_subnormal.sum() > 0


class SlowDownload(DeviceCopies):
    """Allocates memory only once two threads ask for it."""

    barrier = threading.Barrier(2)

    def empty(self, shape, dtype):
        self.barrier.wait(timeout=60)
        return super().empty(shape, dtype)


def test_shard_buffer_is_filled_by_two_threads(maps):
    shard_buffer = make_buffer(copies=SlowDownload("cpu"))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda rows: shard_buffer.put(rows, LEVEL, maps[rows]), (slice(0, 8), slice(8, 16))))
    np.testing.assert_array_equal(collect_level(shard_buffer)[0], maps.half().numpy())


class FakeGpuTensor(torch.Tensor):
    """A CPU tensor that is treated like a GPU's."""

    is_cuda = True


def test_shard_buffer_casts_pooled_vectors_of_a_gpu_on_the_cpu():
    vectors = torch.randn(N_SAMPLES, 5, generator=torch.Generator().manual_seed(0))
    shard_buffer = make_buffer(is_pooled=True)
    shard_buffer.put(ROWS, "pooled/mean", vectors.bfloat16().as_subclass(FakeGpuTensor))
    arrays, stats = shard_buffer.collect(N_SAMPLES)
    np.testing.assert_array_equal(arrays["pooled/mean"], vectors.bfloat16().half().numpy())
    assert stats["pooled/mean"].sum_of_squares.sum() > 0
    vectors[3, 2] = float("nan")
    shard_buffer.put(ROWS, "pooled/mean", vectors.as_subclass(FakeGpuTensor))
    with raises(StoreError, key="pooled/mean", value=1):
        shard_buffer.collect(N_SAMPLES)
