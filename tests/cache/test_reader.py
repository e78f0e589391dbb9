"""One store: subsets, alignment, and requests that cannot be met."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from small_store import small_schema, write_store

from cache.errors import StoreError
from cache.reader import FeatureStore, check_aligned
from cache.schema import CONTRACT
from tests.errors import raises


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """An open store, which no test changes."""
    folder = tmp_path_factory.mktemp("store")
    write_store(folder)
    return FeatureStore(folder / "store.zarr")


@pytest.fixture(scope="module")
def features_with_views(tmp_path_factory):
    folder = tmp_path_factory.mktemp("views")
    write_store(folder, small_schema(views=("identity", "flip_x")))
    return FeatureStore(folder / "store.zarr")


def test_levels_are_in_the_order_of_their_numbers(tmp_path):
    schema = small_schema(samples=2)
    write_store(tmp_path, replace(schema, levels=(schema.levels[1],) * 12, pooled={}))
    features = FeatureStore(tmp_path / "store.zarr")
    assert features.levels == [f"level{number}" for number in range(12)]
    assert features.level_arrays == [f"level{number}/features" for number in range(12)]


@pytest.mark.parametrize(
    ("request_name", "arguments", "fields"),
    [
        ("read", ("level0/features", [150]), {"key": "index", "value": (150, 150)}),
        ("read", ("level0/features", [-1]), {"key": "index", "value": (-1, -1)}),
        ("read", ("level0/features", np.ones(150, bool)), {"key": "index", "value": "bool"}),
        (
            "read",
            ("level7/features", [0]),
            {
                "key": "name",
                "value": "level7/features",
                "allowed": ["level0/features", "level1/features", "pooled/mean_level0", "pooled/mean_level1"],
            },
        ),
        (
            "read",
            ("level0/features", [0], "rot90"),
            {"key": "view", "value": "rot90", "allowed": ["identity", "flip_x"]},
        ),
        ("rows", ("val",), {"key": "split", "value": "val", "allowed": ["test", "train"]}),
        ("rows", ("train", 0), {"key": "fraction", "value": 0}),
        ("statistics", ("level7",), {"key": "level", "value": "level7", "allowed": ["level0", "level1"]}),
    ],
    ids=["beyond the end", "negative", "mask", "array", "view", "split", "fraction", "level"],
)
def test_bad_requests_state_what_there_is(features_with_views, request_name, arguments, fields):
    features = features_with_views
    with raises(StoreError, *fields.get("allowed", ()), path=features.location, **fields):
        getattr(features, request_name)(*arguments)


def test_open_of_a_missing_store_is_refused(tmp_path):
    with raises(StoreError, path=tmp_path / "missing.zarr"):
        FeatureStore(tmp_path / "missing.zarr")


@pytest.mark.parametrize("contract", ["2", "4"])
def test_open_of_another_contract_is_refused(tmp_path, contract):
    """The old contract as well as a future one."""
    write_store(tmp_path)
    metadata = tmp_path / "store.zarr/zarr.json"
    metadata.write_text(metadata.read_text().replace(f'"contract": "{CONTRACT}"', f'"contract": "{contract}"'))
    with raises(StoreError, contract, key="contract", value=contract, allowed=["3"], path=tmp_path / "store.zarr"):
        FeatureStore(tmp_path / "store.zarr")


def test_rows_of_fractions_are_nested_and_depend_on_names_only(features, tmp_path):
    train = features.rows("train")
    assert (features.split[train] == "train").all()
    tenth, half = features.rows("train", 0.1), features.rows("train", 0.5)
    assert (len(tenth), len(half), len(train)) == (10, 50, 100)
    assert set(tenth) < set(half) < set(train)
    assert set(features.rows("train", 0.1, seed=1)) != set(tenth)
    schema = small_schema()
    write_store(tmp_path / "b", replace(schema, sample=("s000", "s002", "s001", *schema.sample[3:])))
    reordered = FeatureStore(tmp_path / "b/store.zarr")
    assert set(reordered.sample[reordered.rows("train", 0.5)]) == set(features.sample[half])


def test_check_aligned_refuses_another_order_or_number_of_samples(features, tmp_path):
    schema = small_schema()
    write_store(tmp_path / "b", replace(schema, sample=(*schema.sample[:4], "s005", "s004", *schema.sample[6:])))
    write_store(tmp_path / "c", small_schema(samples=149))
    a, (b, c) = features, (FeatureStore(tmp_path / name / "store.zarr") for name in "bc")
    check_aligned([a, a])
    with raises(StoreError, a.location, b.location, 4, key="sample", value="s005", allowed=["s004"]):
        check_aligned([a, b])
    with raises(StoreError, a.location, c.location, key="sample", value=149, allowed=[150]):
        check_aligned([a, c])


@pytest.mark.parametrize("array", ["sample", "split"])
def test_open_with_a_lost_file_of_names_is_refused(tmp_path, array):
    write_store(tmp_path)
    (chunk,) = (tmp_path / "store.zarr" / array / "c").iterdir()
    chunk.unlink()
    with raises(StoreError, key=array, path=tmp_path / "store.zarr"):
        FeatureStore(tmp_path / "store.zarr")


def test_pickled_store_reads(features):
    copy = pickle.loads(pickle.dumps(features))
    assert copy.read("level1/features", [3]).shape == (1, 7, 4, 4)
