"""Means of bands against the published ones: other orders are noticed, and the released one is not refused."""

import dataclasses

import h5py
import numpy as np
import pytest

from pipeline.data import image_writer
from pipeline.data.sources import geobench
from pipeline.data.sources.geobench.band_check import BandMeanCheck
from pipeline.errors import UserError
from tests import geobench_files


def test_bands_in_another_order_show_in_the_means(copied, stream, tmp_path, monkeypatch):
    root, folder = copied("m-eurosat")

    def full(published):
        declared = dataclasses.replace(geobench.SETS["m-eurosat"], counts=(6, 4, 4), published=published)
        monkeypatch.setitem(geobench.SETS, "m-eurosat", declared)
        return stream(root, "m-eurosat")

    made = full({})
    pixels = np.stack([made.read(sample).image for sample in made.sample])[:, :, ::4, ::4].astype(float)
    pairs = zip(pixels.mean(axis=(0, 2, 3)), pixels.std(axis=(0, 2, 3)), strict=True)
    published = dict(zip(geobench_files.S2, pairs, strict=True))
    image_writer.write(full(published), tmp_path / "scratch", tmp_path / "store")
    for path in folder.glob("*.hdf5"):  # as if a copy had other bands under these keys
        with h5py.File(path, "r+") as file:
            file.move("08 - NIR", "away")
            file.move("12 - SWIR", "08 - NIR")
            file.move("03 - Green", "12 - SWIR")
            file.move("away", "03 - Green")
    with pytest.raises(UserError, match="the mean of '03 - Green' is .* or their bands are in another order"):
        image_writer.write(full(published), tmp_path / "scratch", tmp_path / "again")
    trusted = stream(root, "m-eurosat", check_means=False)
    image_writer.write(trusted, tmp_path / "scratch", tmp_path / "again")
    # Where nothing is declared, band_stats.json of the files themselves counts.
    with pytest.raises(UserError, match="these are not the released files"):
        image_writer.write(full({}), tmp_path / "scratch", tmp_path / "third")


def test_means_of_bytes_are_compared_as_bytes(copied, stream, tmp_path, monkeypatch):
    root, _ = copied("m-chesapeake-landcover")
    declared = dataclasses.replace(geobench.SETS["m-chesapeake-landcover"], counts=(6, 4, 4))
    monkeypatch.setitem(geobench.SETS, declared.name, declared)
    for options in ({}, {"as_labelled": True}):
        made = stream(root, declared.name, **options)
        assert made.verify.published["Red"][0] > (0 if options else 1)
        image_writer.write(made, tmp_path / "scratch", tmp_path / str(len(options)))


def test_published_means_tell_the_true_order(geobench_root):
    """EuroSAT's own means of each band (torchgeo's, of all 27 000 images) stand beside those of the keys' truth."""
    known = {"B09": 732, "B10": 12.1, "B11": 1819, "B12": 1119, "B8A": 2594}
    declared = geobench.SETS["m-eurosat"]
    for key, band in declared.actual_bands.items():
        if band.name in known:
            mean, std = declared.published_stats[key]
            assert abs(mean - known[band.name]) < 0.2 * std
            assert abs(mean - known.get(declared.released_bands[key].name, 0)) > 0.2 * std


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("m-pv4ger", "Red", "Blue"),
        ("m-pv4ger", "Green", "Red"),
        ("m-bigearthnet", "08 - NIR", "08A - Vegetation Red Edge"),
    ],
)
def test_two_bands_that_changed_places_are_noticed(name, one, other):
    """Also those whose means are within the tolerance of each other's; and no shift of all, as of other light, is."""
    published = geobench.SETS[name].published_stats
    means = BandMeanCheck(name, published, min_separation=0.03)
    right = {key: mean for key, (mean, _) in published.items()}
    for shift in (-0.15, 0, 0.15):
        moved = {key: mean + shift * published[key][1] for key, mean in right.items()}
        means(np.array(list(moved.values())))
    swapped = right | {one: right[other], other: right[one]}
    with pytest.raises(UserError, match=f"{name}: the mean"):
        means(np.array(list(swapped.values())))
