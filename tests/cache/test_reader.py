"""One store: subsets, alignment, and requests that cannot be met."""

import dataclasses
import pickle

import numpy as np
import pytest
from small_store import everything, layout, write

from cache.errors import StoreError
from cache.reader import FeatureStore, check_aligned
from cache.schema import StoreSchema

INDEX = np.array([149, 0, 64, 63, 7, 149])


def test_rows_land_in_the_memory_given(tmp_path):
    write(tmp_path)
    features = FeatureStore(tmp_path / "store.zarr")
    fused = np.zeros((6, 12, 8, 8), "float16")
    assert features.read("level0/features", INDEX, out=fused[:, 4:9]) is not None
    np.testing.assert_array_equal(fused[:, 4:9], everything(layout(), "level0/features").astype("float16")[INDEX])
    assert not fused[:, :4].any()
    assert not fused[:, 9:].any()


def test_memory_that_does_not_fit_is_refused(tmp_path):
    write(tmp_path)
    features = FeatureStore(tmp_path / "store.zarr")
    for shape, dtype in (((6, 5, 8, 8), "float32"), ((6, 6, 8, 8), "float16"), ((5, 5, 8, 8), "float16")):
        with pytest.raises(StoreError, match=r"gives \(6, 5, 8, 8\) float16, each row contiguous; the memory given"):
            features.read("level0/features", INDEX, out=np.empty(shape, dtype))
    with pytest.raises(StoreError, match="each row contiguous"):
        features.read("level0/features", INDEX, out=np.empty((6, 8, 8, 5), "float16").transpose(0, 3, 1, 2))


def test_levels_are_in_the_order_of_their_numbers(tmp_path):
    level = layout().levels[1]
    write(tmp_path, dataclasses.replace(layout(), levels=(level,) * 12, pooled={}))
    assert FeatureStore(tmp_path / "store.zarr").levels == [f"level{number}" for number in range(12)]


def test_bad_requests_say_what_there_is(tmp_path):
    write(tmp_path, layout(views=("identity", "flip_x")))
    features = FeatureStore(tmp_path / "store.zarr")
    for index in ([150], [-1]):
        with pytest.raises(StoreError, match="has samples 0 to 149"):
            features.read("level0/features", index)
    with pytest.raises(StoreError, match="no array 'level7/features'; it has level0/features, level1"):
        features.read("level7/features", [0])
    with pytest.raises(StoreError, match=r"no view 'rot90'; it has \['identity', 'flip_x'\]"):
        features.read("level0/features", [0], view="rot90")
    with pytest.raises(StoreError, match=r"no split 'val'; it has \['test', 'train'\]"):
        features.rows("val")
    with pytest.raises(StoreError, match="no feature store at"):
        FeatureStore(tmp_path / "nothing.zarr")
    with pytest.raises(StoreError, match="no level 'level7'; it has level0, level1"):
        features.statistics("level7")
    with pytest.raises(StoreError, match="A mask becomes one by np.flatnonzero"):
        features.read("level0/features", features.split == "train")
    with pytest.raises(StoreError, match="A fraction of 0 was asked for"):
        features.rows("train", 0)


def test_another_contract_is_refused(tmp_path):
    write(tmp_path)
    metadata = tmp_path / "store.zarr/zarr.json"
    metadata.write_text(metadata.read_text().replace('"contract": "2"', '"contract": "3"'))
    with pytest.raises(StoreError, match="follows contract 3; this reader knows 2"):
        FeatureStore(tmp_path / "store.zarr")


def test_subsets_are_nested_and_depend_on_names_alone(tmp_path):
    write(tmp_path)
    features = FeatureStore(tmp_path / "store.zarr")
    train = features.rows("train")
    assert (features.split[train] == "train").all()
    tenth, half = features.rows("train", 0.1), features.rows("train", 0.5)
    assert (len(tenth), len(half), len(train)) == (10, 50, 100)
    assert set(tenth) < set(half) < set(train)
    assert set(features.rows("train", 0.1, seed=1)) != set(tenth)
    reordered = layout()
    names = list(reordered.sample)
    names[1], names[2] = names[2], names[1]
    write(tmp_path / "b", StoreSchema(**{**reordered.__dict__, "sample": tuple(names)}))
    other = FeatureStore(tmp_path / "b/store.zarr")
    assert set(other.sample[other.rows("train", 0.5)]) == set(features.sample[half])


def test_misaligned_stores_are_refused(tmp_path):
    write(tmp_path / "a")
    swapped = layout()
    names = list(swapped.sample)
    names[4], names[5] = names[5], names[4]
    write(tmp_path / "b", StoreSchema(**{**swapped.__dict__, "sample": tuple(names)}))
    write(tmp_path / "c", layout(samples=149))
    a, b, c = (FeatureStore(tmp_path / name / "store.zarr") for name in "abc")
    check_aligned([a, a])
    with pytest.raises(StoreError, match="differ in 'sample' at row 4: 's004' and 's005'"):
        check_aligned([a, b])
    with pytest.raises(StoreError, match="has 150 samples, .* has 149"):
        check_aligned([a, c])


@pytest.mark.parametrize("array", ["sample", "split"])
def test_a_missing_file_of_names_is_no_other_order(tmp_path, array):
    write(tmp_path)
    (chunk,) = (tmp_path / "store.zarr" / array / "c").iterdir()
    chunk.unlink()
    with pytest.raises(StoreError, match=f"lacks a file of its array '{array}'"):
        FeatureStore(tmp_path / "store.zarr")


def test_a_store_survives_pickling(tmp_path):
    write(tmp_path)
    features = pickle.loads(pickle.dumps(FeatureStore(tmp_path / "store.zarr")))
    assert features.read("level1/features", [3]).shape == (1, 7, 4, 4)
