"""The check of band means detects bands in another order, and accepts the released order."""

import dataclasses
import itertools
import json

import h5py
import numpy as np
import pytest

from pipeline.data import image_writer
from pipeline.data.sources import geobench
from pipeline.data.sources.geobench import partitions
from pipeline.errors import UserError
from tests.errors import raises


@pytest.fixture
def open_full_set(open_set, monkeypatch):
    """Function that opens 14 images as if they were the full set, with other published statistics."""

    def prepare(name: str, published_stats=(), **options):
        changes = {"split_sizes": (6, 4, 4), "published_stats": dict(published_stats)}
        monkeypatch.setitem(geobench.SETS, name, dataclasses.replace(geobench.SETS[name], **changes))
        return open_set(name, **options)

    return prepare


def band_stats(images):
    """Means and standard deviations, (band,), of the pixels that the writer uses."""
    pixels = np.stack([images.read_sample(sample).image for sample in images.sample])[:, :, ::4, ::4].astype(float)
    return pixels.mean(axis=(0, 2, 3)), pixels.std(axis=(0, 2, 3))


def test_write_files_with_bands_in_another_order_are_refused(copy_set, open_full_set, tmp_path):
    folder = copy_set("m-eurosat")
    images = open_full_set("m-eurosat")
    stats = zip(*map(np.ndarray.tolist, band_stats(images)), strict=True)
    published = dict(zip(geobench.SETS["m-eurosat"].released_bands, stats, strict=True))
    image_writer.write(open_full_set("m-eurosat", published), tmp_path / "scratch", tmp_path / "store")
    for path in folder.glob("*.hdf5"):  # other bands under these keys
        with h5py.File(path, "r+") as file:
            for to, key in itertools.pairwise(("moved", "08 - NIR", "12 - SWIR", "03 - Green", "moved")):
                file.move(key, to)
    with raises(UserError, "m-eurosat", "check_means", key="03 - Green"):
        image_writer.write(open_full_set("m-eurosat", published), tmp_path / "scratch", tmp_path / "permuted")
    assert open_full_set("m-eurosat", published, check_means=False).check_band_means is None
    # Without published statistics, band_stats.json of the files themselves is used.
    with raises(UserError, "m-eurosat", "check_means"):
        images.check_band_means(band_stats(images)[0])


@pytest.mark.parametrize("options", [{}, {"keep_released_metadata": True}])
def test_band_check_8_bit_images_are_compared_in_the_stored_units(open_full_set, options):
    images = open_full_set("m-chesapeake-landcover", **options)
    means, _ = band_stats(images)
    assert (means > 1).all() == (not options)
    images.check_band_means(means)
    with raises(UserError, key="Blue"):
        images.check_band_means(means * 255)


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
    [("m-pv4ger", "Red", "Blue"), ("m-pv4ger", "Green", "Red"),
     ("m-bigearthnet", "08 - NIR", "08A - Vegetation Red Edge")],
)  # fmt: skip
def test_band_check_swapped_bands_with_similar_means_are_refused(tmp_path, name, key_a, key_b):
    """The two means are within the tolerance of each other. A common shift of all bands is accepted."""
    published = geobench.SETS[name].published_stats
    check = partitions.make_mean_check(tmp_path, geobench.SETS[name], tuple(published), scale=1)
    means = {key: mean for key, (mean, _) in published.items()}
    for shift in (-0.15, 0, 0.15):
        check(np.array([mean + shift * std for mean, std in published.values()]))
    swapped = means | {key_a: means[key_b], key_b: means[key_a]}
    with raises(UserError, name) as info:
        check(np.array(list(swapped.values())))
    assert (info.value.key, info.value.value) in {key: swapped[key] for key in (key_a, key_b)}.items()


def test_band_check_incomplete_entries_of_band_stats_are_ignored_and_others_refused(tmp_path):
    path, spec = tmp_path / "band_stats.json", geobench.SETS["m-cashew-plantation"]
    path.write_text(json.dumps({"02": {"mean": 2.0, "std": 1.0}, "label": {"mean": None}, "01": {"std": 1.0}}))
    check = partitions.make_mean_check(tmp_path, spec, ("01", "02"), scale=2)
    check(np.array([99, 4]))
    with raises(UserError, key="02", value=2):
        check(np.array([99, 2]))
    assert partitions.make_mean_check(tmp_path, spec, ("01",), scale=2) is None
    for text in ("{", "[1]", '{"01": 3}'):
        path.write_text(text)
        with raises(UserError, path, path=path):
            partitions.make_mean_check(tmp_path, spec, ("01",), scale=1)
