"""One store: subsets, alignment, and requests that cannot be met."""

from dataclasses import replace

import numpy as np
import pytest
from small_store import open_store, small_schema, write_store

from cache.errors import StoreError
from cache.reader import FeatureStore, check_aligned
from cache.schema import CONTRACT
from tests.errors import raises

ARRAYS = ["level0/features", "level1/features", "pooled/mean_level0", "pooled/mean_level1"]
VIEWS = ["identity", "flip_x"]


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """An open store, which no test changes."""
    return open_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def features_with_views(tmp_path_factory):
    return open_store(tmp_path_factory.mktemp("views"), small_schema(samples=20, views=tuple(VIEWS)))


def test_levels_are_in_the_order_of_their_numbers(tmp_path):
    schema = small_schema(samples=2)
    features = open_store(tmp_path, replace(schema, levels=(schema.levels[1],) * 12, pooled={}))
    assert features.levels == [f"level{number}" for number in range(12)]
    assert features.level_arrays == [f"level{number}/features" for number in range(12)]


@pytest.mark.parametrize(
    ("request_name", "arguments", "fields"),
    [
        ("read", ("level0/features", [20]), {"key": "index", "value": (20, 20)}),
        ("read", ("level0/features", [-1]), {"key": "index", "value": (-1, -1)}),
        ("read", ("level0/features", np.ones(20, bool)), {"key": "index", "value": "bool"}),
        ("read", ("level7/features", [0]), {"key": "name", "value": "level7/features", "allowed": ARRAYS}),
        ("read", ("level0/features", [0], "rot90"), {"key": "view", "value": "rot90", "allowed": VIEWS}),
        ("rows", ("val",), {"key": "split", "value": "val", "allowed": ["test", "train"]}),
        ("rows", ("train", 0), {"key": "fraction", "value": 0}),
        ("statistics", ("level7",), {"key": "level", "value": "level7", "allowed": ["level0", "level1"]}),
    ],
)
def test_bad_requests_state_what_there_is(features_with_views, request_name, arguments, fields):
    features = features_with_views
    with raises(StoreError, *fields.get("allowed", ()), path=features.location, **fields):
        getattr(features, request_name)(*arguments)


def test_open_of_another_contract_or_with_a_lost_file_of_names_is_refused(tmp_path):
    store = tmp_path / "store.zarr"
    write_store(tmp_path, small_schema(samples=4))
    text = (store / "zarr.json").read_text()
    for contract in ("2", "4"):  # the old contract as well as a future one
        (store / "zarr.json").write_text(text.replace(f'"contract": "{CONTRACT}"', f'"contract": "{contract}"'))
        with raises(StoreError, contract, key="contract", value=contract, allowed=["3"], path=store):
            FeatureStore(store)
    (store / "zarr.json").write_text(text)
    for array in ("split", "sample"):
        (chunk,) = (store / array / "c").iterdir()
        chunk.unlink()
        with raises(StoreError, key=array, path=store):
            FeatureStore(store)


def test_rows_of_fractions_are_nested_and_depend_on_names_only(features, tmp_path):
    train = features.rows("train")
    assert (features.split[train] == "train").all()
    tenth, half = features.rows("train", 0.1), features.rows("train", 0.5)
    assert (len(tenth), len(half), len(train)) == (10, 50, 100)
    assert set(tenth) < set(half) < set(train)
    assert set(features.rows("train", 0.1, seed=1)) != set(tenth)
    schema = small_schema()
    reordered = open_store(tmp_path, replace(schema, sample=("s000", "s002", "s001", *schema.sample[3:])))
    assert set(reordered.sample[reordered.rows("train", 0.5)]) == set(features.sample[half])


def test_check_aligned_refuses_another_order_or_number_of_samples(features, tmp_path):
    schema = small_schema()
    a, swapped = features, replace(schema, sample=(*schema.sample[:4], "s005", "s004", *schema.sample[6:]))
    b, c = open_store(tmp_path / "b", swapped), open_store(tmp_path / "c", small_schema(samples=149))
    check_aligned([a, a])
    with raises(StoreError, a.location, b.location, 4, key="sample", value="s005", allowed=["s004"]):
        check_aligned([a, b])
    with raises(StoreError, a.location, c.location, key="sample", value=149, allowed=[150]):
        check_aligned([a, c])
