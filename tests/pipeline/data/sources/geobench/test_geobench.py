"""GEO-Bench's twelve sets: pixels, labels, splits, locations, dates, and corrections of faults."""

import os

import h5py
import numpy as np
import pytest

from pipeline.data.image_store import SPLITS
from pipeline.data.sources.geobench import reader
from pipeline.errors import UserError
from pipeline.tasks import IGNORE
from tests.errors import raises

RELEASED_BANDS = "B01 B02 B03 B04 B05 B06 B07 B08 B8A B09 B10 B11 B12"
ACTUAL_BANDS = {
    "m-eurosat": "B01 B02 B03 B04 B05 B06 B07 B08 B09 B10 B11 B12 B8A",
    "m-brick-kiln": "B01 B02 B03 B04 B05 B07 B8A B08 B11 B12 TCI_R TCI_G TCI_B",
}


def test_reader_canopy_height_is_repeated_to_the_size_of_the_photograph(geobench_root, open_set):
    images = open_set("m-NeonTree")
    image = images.read_sample(images.sample[-1]).image
    with h5py.File(geobench_root / "segmentation_v1.0/m-NeonTree" / f"{images.sample[-1]}.hdf5") as file:
        np.testing.assert_array_equal(image[0], file["Blue"])
        np.testing.assert_array_equal(image[1], np.kron(file["Canopy Height Model"][..., 0], np.ones((10, 10))))


def test_reader_images_divided_by_255_are_restored_exactly_and_other_values_refused(copy_set, open_set):
    path = copy_set("m-chesapeake-landcover") / "id_0001.hdf5"
    restored, released = (open_set("m-chesapeake-landcover", keep_released_metadata=keep) for keep in (False, True))
    assert (restored.dtype, restored.units, released.dtype, released.units) == ("u1", "uint8", "f4", "display")
    actual, expected = (images.read_sample("id_0000").image for images in (restored, released))
    # Networks receive the same float32 values.
    np.testing.assert_array_equal(np.divide(actual, np.float32(255), dtype=np.float32), expected)
    # All 8-bit values, divided by 255, multiplied by an inexact 1/255, in double precision, and with a negative zero.
    all_values = np.resize(np.arange(256, dtype=np.uint8), (256, 256))
    quotient = np.divide(all_values, 255, dtype=np.float32)
    negative_zero = np.where(all_values == 0, np.float32(-0.0), quotient)
    for values in (quotient, all_values * np.float32(1 / 255), all_values / 255, negative_zero):
        with h5py.File(path, "r+") as file:
            del file["Red"]
            file["Red"] = values
        np.testing.assert_array_equal(restored.read_sample("id_0001").image[3], all_values)
    for invalid in (np.nan, np.inf, -1 / 255, 256 / 255, 0.5004, 200):
        with h5py.File(path, "r+") as file:
            file["Green"][200, 100] = invalid
        with raises(UserError, "Green", "skip_bad", key="Green", path=path) as info:
            restored.read_sample("id_0001")
        np.testing.assert_allclose(info.value.value, invalid, rtol=1e-5)
        np.testing.assert_equal(released.read_sample("id_0001").image[1, 200, 100], np.float32(invalid))


@pytest.mark.parametrize("name", ACTUAL_BANDS)
def test_bands_with_wrong_names_are_corrected_unless_released_metadata_is_kept(open_set, name):
    corrected, released = (open_set(name, keep_released_metadata=keep) for keep in (False, True))
    assert [band.name for band in corrected.bands] == ACTUAL_BANDS[name].split()
    assert [band.name for band in released.bands] == RELEASED_BANDS.split()
    assert any("09 - Water vapour is B" in note for note in corrected.notes)
    assert any("keep_released_metadata" in note for note in released.notes)
    sample = corrected.sample[0]
    image = corrected.read_sample(sample).image
    np.testing.assert_array_equal(image, released.read_sample(sample).image)
    # Prithvi's six bands, selected by name, are read from the keys where they actually are.
    prithvi = open_set(name, bands=["B02", "B03", "B04", "B8A", "B11", "B12"])
    indices = {"m-eurosat": [1, 2, 3, 12, 10, 11], "m-brick-kiln": [1, 2, 3, 6, 8, 9]}[name]
    np.testing.assert_array_equal(prithvi.read_sample(sample).image, image[indices])
    assert [band.common_name for band in prithvi.bands] == ["blue", "green", "red", "nir08", "swir16", "swir22"]


@pytest.mark.parametrize(("name", "file"), [("m-bigearthnet", "label_stats.json"), ("m-pv4ger", "label_map.json")])
def test_labels_are_the_same_from_json_files_and_from_samples(copy_set, open_set, name, file):
    folder = copy_set(name)
    with_json = open_set(name)
    labels = [with_json.read_sample(sample).label for sample in with_json.sample]
    (folder / file).unlink()
    without_json = open_set(name)
    noted = [any("sample files" in note for note in images.notes) for images in (with_json, without_json)]
    assert noted == [False, True]
    np.testing.assert_array_equal([without_json.read_sample(sample).label for sample in with_json.sample], labels)
    assert {int(value) for label in labels for value in np.atleast_1d(label)} == {0, 1}


@pytest.mark.parametrize(
    ("name", "index", "corrected", "released"),
    [
        # 1 January stands for an annual composite.
        ("m-forestnet", 0, (-1.5, 113.25, "NaT"), (-1.5, 113.25, "2013-01-01")),
        ("m-forestnet", 1, (-1.51, 113.26, "2014-06-02"), (-1.51, 113.26, "2014-06-02")),
        # In Germany the latitude is larger than the longitude, whatever the sample name states.
        ("m-pv4ger", 0, (51.2, 6.8, "NaT"), (51.2, 6.8, "NaT")),
        ("m-pv4ger", 1, (51.201, 6.801, "NaT"), (6.801, 51.201, "NaT")),
        ("m-nz-cattle", 0, (-38.1, 175.3, "NaT"), (-38.1, 175.3, "2019-01-01")),
        ("m-cashew-plantation", 3, (np.nan, np.nan, "2020-02-04"), (np.nan, np.nan, "2020-02-04")),
    ],
)
def test_locations_and_dates_are_corrected_unless_released_ones_are_kept(open_set, name, index, corrected, released):
    for keep, (*location, day) in ((False, corrected), (True, released)):
        images = open_set(name, keep_released_metadata=keep)
        sample = images.read_sample(images.sample[index])
        assert [sample.lat, sample.lon] == pytest.approx(location, nan_ok=True)
        np.testing.assert_equal(sample.time, np.datetime64(day, "s"))


@pytest.mark.parametrize(
    ("name", "index"), [("m-SA-crop-type", 0), ("m-cashew-plantation", 0), ("m-chesapeake-landcover", 6)]
)
def test_nodata_class_counts_unless_ignored(open_set, name, index):
    counted, ignored = (open_set(name, ignore_nodata=ignore) for ignore in (False, True))
    with_class, without_class = (images.read_sample(images.sample[0]).label for images in (counted, ignored))
    assert (with_class == index).any()
    np.testing.assert_array_equal(np.where(with_class == index, IGNORE, with_class), without_class)
    assert counted.notes != ignored.notes


def test_partition_with_fewer_labels_has_fewer_training_samples(open_set):
    images = open_set("m-so2sat", partition="0.50x_train")
    assert [images.split.count(split) for split in SPLITS] == [3, 4, 4]
    assert images.check_band_means is None, "a few samples are not the full set"


def test_reader_file_truncated_while_it_is_read_is_refused(copy_set, open_set, monkeypatch):
    folder = copy_set("m-so2sat")
    images = open_set("m-so2sat")
    path = folder / "id_0003.hdf5"
    keys_without_dates = reader._keys_without_dates

    def truncate_after_opening(file, spec):
        keys = keys_without_dates(file, spec)
        os.truncate(path, file[keys["12 - SWIR"]].id.get_offset() + 100)
        return keys

    monkeypatch.setattr(reader, "_keys_without_dates", truncate_after_opening)
    with raises(UserError, path=path):
        images.read_sample("id_0003")


def test_reader_bands_of_several_dates_give_no_date(copy_set, open_set):
    folder = copy_set("m-cashew-plantation")
    images = open_set("m-cashew-plantation")
    name = images.sample[0]
    assert not np.isnat(images.read_sample(name).time)
    with h5py.File(folder / f"{name}.hdf5", "r+") as file:
        key = next(key for key in file if key.startswith("04 - Red"))
        file.move(key, "04 - Red_1999-05-05")
    assert np.isnat(images.read_sample(name).time)
