import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from cache.casting import cast_array, check_cast
from cache.codecs import NONE
from cache.errors import StoreError
from cache.schema import LevelSchema, StoreSchema
from pipeline.extraction.buffer import ShardBuffer
from pipeline.extraction.narrow import cast_with_stats
from pipeline.extraction.transfer import DeviceToHost


@pytest.fixture
def maps():
    return torch.randn(16, 5, 6, 7, generator=torch.Generator().manual_seed(0)) * 10


def by_the_writer(values: torch.Tensor):
    with ThreadPoolExecutor(2) as pool:
        return cast_array(values.contiguous().numpy(), "level0/features", "float16", NONE, pool)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("odd", [None, float("nan"), float("inf")])
def test_it_is_what_the_writer_would_have_done(maps, layout, odd):
    if odd is not None:
        maps[3, 2, 1, 0] = odd
    maps = maps.contiguous(memory_format=layout)
    low, tally = cast_with_stats(maps, torch.float16)
    theirs = by_the_writer(maps)
    np.testing.assert_array_equal(low.numpy(), theirs.stored)
    error, size = check_cast(tally[:, :6].numpy(), "level0/features", "float16")
    assert error == pytest.approx(theirs.squared_error, rel=1e-4)
    assert size == pytest.approx(theirs.sum_of_squares, rel=1e-4)
    assert 0 < error < 1e-6 * size


@pytest.mark.parametrize("scale", [1e5, 1e-9])
def test_it_refuses_what_the_writer_refuses(maps, scale):
    maps *= scale
    _, tally = cast_with_stats(maps, torch.float16)
    with pytest.raises(StoreError) as ours:
        check_cast(tally[:, :6].numpy(), "level0/features", "float16")
    with pytest.raises(StoreError) as theirs:
        by_the_writer(maps)
    assert str(ours.value) == str(theirs.value)


def test_zeros_are_not_small_values():
    maps = torch.zeros(8, 3, 4, 4)
    maps[:, 0] = 1.0
    _, tally = cast_with_stats(maps, torch.float16)
    assert check_cast(tally[:, :6].numpy(), "level0/features", "float16") == (0.0, 8 * 16.0)


def test_a_sample_is_counted_alike_in_any_batch(maps):
    whole = cast_with_stats(maps, torch.float16)[1][8:, [0, 1, 4, 5]]
    np.testing.assert_array_equal(cast_with_stats(maps[8:], torch.float16)[1][:, [0, 1, 4, 5]].numpy(), whole.numpy())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_buffer_is_filled_batch_by_batch_and_used_again(maps, dtype):
    names = tuple(f"{index}" for index in range(16))
    layout = StoreSchema(names, ("train",) * 16, (LevelSchema(5, 6, 7, stride=4, layer="a"),), {}, dtype, shard_size=16)
    buffer = ShardBuffer(layout, DeviceToHost("cpu"))
    for factor in (1, 3):
        for rows in (slice(0, 10), slice(10, 16)):
            buffer.put(rows, "level0/features", factor * maps[rows])
        values, lost = buffer.take(16)
        np.testing.assert_array_equal(values["level0/features"], (factor * maps).numpy().astype(dtype))
        assert list(lost) == (["level0/features"] if dtype == "float16" else [])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_no_number_reaches_a_store(maps, dtype, odd):
    """A forward in float16 overflows to infinity on some later image, which the first look did not see."""
    names = tuple(f"{index}" for index in range(16))
    layout = StoreSchema(names, ("train",) * 16, (LevelSchema(5, 6, 7, stride=4, layer="a"),), {}, dtype, shard_size=16)
    buffer = ShardBuffer(layout, DeviceToHost("cpu"))
    maps[9, 1] = odd
    buffer.put(slice(0, 16), "level0/features", maps)
    with pytest.raises(StoreError, match="42 values of level0/features are NaN or infinite"):
        buffer.take(16)
    assert len(buffer.take(9)[0]["level0/features"]) == 9


@pytest.mark.parametrize("cut", [np.s_[:, :3], np.s_[:, :, :4, :4], np.s_[::2], np.s_[:, :, :, ::2]])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_loss_of_maps_that_are_cut_out_of_larger_ones(maps, cut, layout):
    part = maps.contiguous(memory_format=layout)[cut]
    error, size = cast_with_stats(part, torch.float16)[1].numpy()[:, 4:6].sum(axis=0)
    whole, whole_size = cast_with_stats(part.contiguous(), torch.float16)[1].numpy()[:, 4:6].sum(axis=0)
    assert (error, size) == (pytest.approx(whole, rel=1e-5), pytest.approx(whole_size, rel=1e-5))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("block", [1, 3 * 210, 2**18])
def test_a_processor_takes_a_few_samples_at_a_time_and_finds_the_same(monkeypatch, maps, layout, block):
    monkeypatch.setattr("pipeline.extraction.buffer._BLOCK", block)
    maps[9:, 1:3] *= 1e-7  # too small for float16, and seen only where the samples looked at are the same
    names = tuple(f"{index}" for index in range(16))
    described = StoreSchema(
        names, ("train",) * 16, (LevelSchema(5, 6, 7, stride=4, layer="a"),), {}, "float16", shard_size=16
    )
    buffer = ShardBuffer(described, DeviceToHost("cpu"))
    buffer.put(slice(0, 16), "level0/features", maps.contiguous(memory_format=layout))
    low, tally = cast_with_stats(maps.contiguous(memory_format=layout), torch.float16)
    np.testing.assert_array_equal(buffer.take(16)[0]["level0/features"], low.numpy())
    np.testing.assert_array_equal(buffer._tallies["level0/features"][:, [0, 1, 2, 3, 6]], tally[:, [0, 1, 2, 3, 6]])
    np.testing.assert_allclose(buffer._tallies["level0/features"][:, 4:6], tally[:, 4:6], rtol=1e-5)
    buffer.put(slice(0, 16), "level0/features", maps * 1e-9)
    with pytest.raises(StoreError, match=r"Most values of level0/features \(100%\) are too small"):
        buffer.take(16)


def test_two_threads_fill_one_buffer(maps):
    class Slow(DeviceToHost):
        """Memory that takes its time, so that both threads find none."""

        def empty(self, shape, dtype):
            made = super().empty(shape, dtype)
            meet.wait(timeout=60)
            return made

    meet = threading.Barrier(2)
    names = tuple(f"{index}" for index in range(16))
    layout = StoreSchema(
        names, ("train",) * 16, (LevelSchema(5, 6, 7, stride=4, layer="a"),), {}, "float16", shard_size=16
    )
    buffer = ShardBuffer(layout, Slow("cpu"))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda rows: buffer.put(rows, "level0/features", maps[rows]), (slice(0, 8), slice(8, 16))))
    np.testing.assert_array_equal(buffer.take(16)[0]["level0/features"], maps.half().numpy())


class OnGpu(torch.Tensor):
    """A processor's tensor that is treated as a GPU's."""

    is_cuda = True


@pytest.mark.parametrize("odd", [None, float("nan"), float("inf")])
def test_vectors_of_a_gpu_are_left_to_the_writer_but_for_what_is_no_number(odd):
    vectors = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    if odd is not None:
        vectors[3, 2] = odd
    names = tuple(f"{index}" for index in range(16))
    buffer = ShardBuffer(
        StoreSchema(names, ("train",) * 16, (), {"mean": 5}, "float16", shard_size=16), DeviceToHost("cpu")
    )
    buffer.put(slice(0, 16), "pooled/mean", vectors.bfloat16().as_subclass(OnGpu))
    if odd is not None:
        with pytest.raises(StoreError, match="1 values of pooled/mean are NaN or infinite"):
            buffer.take(16)
        return
    arrays, lost = buffer.take(16)
    assert arrays["pooled/mean"].dtype == np.float32
    np.testing.assert_array_equal(arrays["pooled/mean"], vectors.bfloat16().float().numpy())
    assert lost == {}
