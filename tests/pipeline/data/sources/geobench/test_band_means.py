"""The check of band means detects bands in another order, and accepts the released order."""

import dataclasses

import h5py
import numpy as np
import pytest

from pipeline.data import image_writer
from pipeline.data.sources import geobench
from pipeline.data.sources.geobench.partitions import BandMeanCheck
from pipeline.errors import UserError
from tests import geobench_files
from tests.errors import raises


def test_band_check_files_with_bands_in_another_order_are_refused(copy_set, open_set, tmp_path, monkeypatch):
    root, folder = copy_set("m-eurosat")

    def open_full_set(published_stats):
        spec = geobench.SETS["m-eurosat"]
        spec = dataclasses.replace(spec, split_sizes=(6, 4, 4), published_stats=published_stats)
        monkeypatch.setitem(geobench.SETS, "m-eurosat", spec)
        return open_set(root, "m-eurosat")

    images = open_full_set({})
    pixels = np.stack([images.read_sample(sample).image for sample in images.sample])[:, :, ::4, ::4].astype(float)
    stats = zip(pixels.mean(axis=(0, 2, 3)), pixels.std(axis=(0, 2, 3)), strict=True)
    published = dict(zip(geobench_files.S2, stats, strict=True))
    image_writer.write(open_full_set(published), tmp_path / "scratch", tmp_path / "store")
    for path in folder.glob("*.hdf5"):  # a copy that has other bands under these keys
        with h5py.File(path, "r+") as file:
            file.move("08 - NIR", "moved")
            file.move("12 - SWIR", "08 - NIR")
            file.move("03 - Green", "12 - SWIR")
            file.move("moved", "03 - Green")
    with raises(UserError, "m-eurosat", "check_means", key="03 - Green"):
        image_writer.write(open_full_set(published), tmp_path / "scratch", tmp_path / "permuted")
    unchecked = open_set(root, "m-eurosat", check_means=False)
    image_writer.write(unchecked, tmp_path / "scratch", tmp_path / "permuted")
    # Without published statistics, band_stats.json of the files themselves is used.
    with raises(UserError, "m-eurosat", "check_means"):
        image_writer.write(open_full_set({}), tmp_path / "scratch", tmp_path / "third")


def test_band_check_8_bit_images_are_compared_in_the_stored_units(copy_set, open_set, tmp_path, monkeypatch):
    root, _ = copy_set("m-chesapeake-landcover")
    spec = dataclasses.replace(geobench.SETS["m-chesapeake-landcover"], split_sizes=(6, 4, 4))
    monkeypatch.setitem(geobench.SETS, spec.name, spec)
    for options in ({}, {"keep_released_metadata": True}):
        images = open_set(root, spec.name, **options)
        assert images.check_band_means.published["Red"][0] > (0 if options else 1)
        image_writer.write(images, tmp_path / "scratch", tmp_path / str(len(options)))


def test_published_stats_of_eurosat_match_the_actual_bands():
    """torchgeo's means of all 27,000 images agree with the actual bands, not with the released ones."""
    torchgeo_mean = {"B09": 732, "B10": 12.1, "B11": 1819, "B12": 1119, "B8A": 2594}
    spec = geobench.SETS["m-eurosat"]
    for key, band in spec.actual_bands.items():
        if band.name in torchgeo_mean:
            mean, std = spec.published_stats[key]
            assert abs(mean - torchgeo_mean[band.name]) < 0.2 * std
            assert abs(mean - torchgeo_mean.get(spec.released_bands[key].name, 0)) > 0.2 * std


@pytest.mark.parametrize(
    ("name", "key_a", "key_b"),
    [
        ("m-pv4ger", "Red", "Blue"),
        ("m-pv4ger", "Green", "Red"),
        ("m-bigearthnet", "08 - NIR", "08A - Vegetation Red Edge"),
    ],
)
def test_band_check_swapped_bands_with_similar_means_are_refused(name, key_a, key_b):
    """The two means are within the tolerance of each other. A common shift of all bands is accepted."""
    published = geobench.SETS[name].published_stats
    check = BandMeanCheck(name, published, min_separation=0.03)
    means = {key: mean for key, (mean, _) in published.items()}
    for shift in (-0.15, 0, 0.15):
        check(np.array([mean + shift * published[key][1] for key, mean in means.items()]))
    swapped = means | {key_a: means[key_b], key_b: means[key_a]}
    with raises(UserError, name) as info:
        check(np.array(list(swapped.values())))
    assert info.value.key in (key_a, key_b)
    assert info.value.value == swapped[info.value.key]
