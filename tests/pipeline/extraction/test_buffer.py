import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from cache.codecs import NONE, CastStat, cast_array, check_cast
from cache.errors import StoreError
from cache.schema import LevelSchema, StoreSchema
from pipeline.extraction import buffer
from pipeline.extraction.buffer import ShardBuffer, cast_with_stats
from pipeline.extraction.loader import DeviceCopies
from tests.errors import raises

LEVEL = "level0/features"
LEVEL_SCHEMA = LevelSchema(5, 6, 7, stride=4, layer="a")
N_SAMPLES = 16
ROWS = slice(0, N_SAMPLES)
N_STATS = len(CastStat)
# Statistics that are counts; the others are sums of squares, which depend on rounding.
COUNTS = [CastStat.N_TOO_LARGE, CastStat.MAX_TOO_LARGE, CastStat.N_SUBNORMAL, CastStat.N_NONZERO, N_STATS]
SQUARES = [CastStat.SQUARED_ERROR, CastStat.SUM_OF_SQUARES]
MEMORY_FORMATS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])


@pytest.fixture
def maps():
    return torch.randn(N_SAMPLES, 5, 6, 7, generator=torch.Generator().manual_seed(0)) * 10


def make_schema(dtype="float16", levels=(LEVEL_SCHEMA,), pooled=None):
    names = tuple(str(index) for index in range(N_SAMPLES))
    return StoreSchema(names, ("train",) * N_SAMPLES, levels, pooled or {}, dtype, shard_size=N_SAMPLES)


def make_buffer(dtype="float16"):
    return ShardBuffer(make_schema(dtype), DeviceCopies("cpu"))


def cast_by_writer(values: torch.Tensor):
    with ThreadPoolExecutor(2) as pool:
        return cast_array(values.contiguous().numpy(), LEVEL, "float16", NONE, pool)


def check_stats(stats: torch.Tensor):
    return check_cast(stats[:, :N_STATS].numpy(), LEVEL, "float16")


@MEMORY_FORMATS
@pytest.mark.parametrize("nonfinite", [None, float("nan"), float("inf")])
def test_cast_with_stats_equals_the_writers_cast(maps, memory_format, nonfinite):
    if nonfinite is not None:
        maps[3, 2, 1, 0] = nonfinite
    maps = maps.contiguous(memory_format=memory_format)
    low, stats = cast_with_stats(maps, torch.float16)
    expected = cast_by_writer(maps)
    np.testing.assert_array_equal(low.numpy(), expected.stored)
    squared_error, sum_of_squares = check_stats(stats)
    assert squared_error == pytest.approx(expected.squared_error, rel=1e-4)
    assert sum_of_squares == pytest.approx(expected.sum_of_squares, rel=1e-4)
    assert 0 < squared_error < 1e-6 * sum_of_squares


@pytest.mark.parametrize("scale", [1e5, 1e-9])
def test_cast_with_stats_leads_to_the_writers_refusals(maps, scale):
    maps *= scale
    _, stats = cast_with_stats(maps, torch.float16)
    with pytest.raises(StoreError) as actual:
        check_stats(stats)
    with pytest.raises(StoreError) as expected:
        cast_by_writer(maps)
    assert str(actual.value) == str(expected.value)


def test_cast_with_stats_does_not_count_zeros_as_subnormal():
    maps = torch.zeros(8, 3, 4, 4)
    maps[:, 0] = 1.0
    _, stats = cast_with_stats(maps, torch.float16)
    assert check_stats(stats) == (0.0, 8 * 16.0)


def test_cast_with_stats_of_a_sample_does_not_depend_on_the_batch(maps):
    columns = [CastStat.N_TOO_LARGE, CastStat.MAX_TOO_LARGE, *SQUARES]
    expected = cast_with_stats(maps, torch.float16)[1][8:, columns]
    np.testing.assert_array_equal(cast_with_stats(maps[8:], torch.float16)[1][:, columns].numpy(), expected.numpy())


@pytest.mark.parametrize("index", [np.s_[:, :3], np.s_[:, :, :4, :4], np.s_[::2], np.s_[:, :, :, ::2]])
@MEMORY_FORMATS
def test_cast_with_stats_of_strided_maps_equals_contiguous_ones(maps, index, memory_format):
    part = maps.contiguous(memory_format=memory_format)[index]
    actual = cast_with_stats(part, torch.float16)[1].numpy()[:, SQUARES].sum(axis=0)
    expected = cast_with_stats(part.contiguous(), torch.float16)[1].numpy()[:, SQUARES].sum(axis=0)
    assert actual == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_shard_buffer_is_filled_by_batches_and_reused(maps, dtype):
    shard_buffer = make_buffer(dtype)
    for factor in (1, 3):
        for rows in (slice(0, 10), slice(10, 16)):
            shard_buffer.put(rows, LEVEL, factor * maps[rows])
        arrays, cast_errors = shard_buffer.collect(N_SAMPLES)
        np.testing.assert_array_equal(arrays[LEVEL], (factor * maps).numpy().astype(dtype))
        assert list(cast_errors) == ([LEVEL] if dtype == "float16" else [])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("nonfinite", [float("nan"), float("inf")])
def test_shard_buffer_refuses_nonfinite_values(maps, dtype, nonfinite):
    """A forward pass in float16 may overflow to infinity on an image that the dry run did not include."""
    shard_buffer = make_buffer(dtype)
    maps[9, 1] = nonfinite
    shard_buffer.put(ROWS, LEVEL, maps)
    with raises(StoreError, 42, key=LEVEL, value=42):
        shard_buffer.collect(N_SAMPLES)
    assert len(shard_buffer.collect(9)[0][LEVEL]) == 9


@MEMORY_FORMATS
@pytest.mark.parametrize("block_values", [1, 3 * 210, 2**18])
def test_shard_buffer_in_blocks_equals_one_cast(monkeypatch, maps, memory_format, block_values):
    monkeypatch.setattr(buffer, "_CPU_BLOCK_VALUES", block_values)
    maps[9:, 1:3] *= 1e-7  # too small for float16; counted equally only if the same samples are counted
    maps = maps.contiguous(memory_format=memory_format)
    shard_buffer = make_buffer()
    shard_buffer.put(ROWS, LEVEL, maps)
    low, stats = cast_with_stats(maps, torch.float16)
    np.testing.assert_array_equal(shard_buffer.collect(N_SAMPLES)[0][LEVEL], low.numpy())
    actual = shard_buffer._stats[LEVEL]
    np.testing.assert_array_equal(actual[:, COUNTS], stats[:, COUNTS])
    np.testing.assert_allclose(actual[:, SQUARES], stats[:, SQUARES], rtol=1e-5)
    shard_buffer.put(ROWS, LEVEL, maps * 1e-9)
    with raises(StoreError, LEVEL, "100%", key="extract.dtype"):
        shard_buffer.collect(N_SAMPLES)


class SlowDownload(DeviceCopies):
    """Allocates memory only once two threads ask for it."""

    def __init__(self, device):
        super().__init__(device)
        self._barrier = threading.Barrier(2)

    def empty(self, shape, dtype):
        memory = super().empty(shape, dtype)
        self._barrier.wait(timeout=60)
        return memory


def test_shard_buffer_is_filled_by_two_threads(maps):
    shard_buffer = ShardBuffer(make_schema(), SlowDownload("cpu"))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda rows: shard_buffer.put(rows, LEVEL, maps[rows]), (slice(0, 8), slice(8, 16))))
    np.testing.assert_array_equal(shard_buffer.collect(N_SAMPLES)[0][LEVEL], maps.half().numpy())


class FakeGpuTensor(torch.Tensor):
    """A CPU tensor that is treated like a GPU's."""

    is_cuda = True


@pytest.mark.parametrize("nonfinite", [None, float("nan"), float("inf")])
def test_shard_buffer_leaves_pooled_vectors_of_a_gpu_in_float32(nonfinite):
    vectors = torch.randn(N_SAMPLES, 5, generator=torch.Generator().manual_seed(0))
    if nonfinite is not None:
        vectors[3, 2] = nonfinite
    schema = make_schema(levels=(), pooled={"mean": 5})
    shard_buffer = ShardBuffer(schema, DeviceCopies("cpu"))
    shard_buffer.put(ROWS, "pooled/mean", vectors.bfloat16().as_subclass(FakeGpuTensor))
    if nonfinite is not None:
        with raises(StoreError, key="pooled/mean", value=1):
            shard_buffer.collect(N_SAMPLES)
        return
    arrays, cast_errors = shard_buffer.collect(N_SAMPLES)
    assert arrays["pooled/mean"].dtype == np.float32
    np.testing.assert_array_equal(arrays["pooled/mean"], vectors.bfloat16().float().numpy())
    assert cast_errors == {}
