"""The images store: what it contains, and what is refused."""

import dataclasses
import os
import shutil
from functools import partial

import numpy as np
import pytest
import xarray as xr

from pipeline.data import image_writer
from pipeline.data.image_store import open_images, parse_timestamp
from pipeline.errors import UserError
from pipeline.tasks import get_task
from tests.errors import raises


@pytest.mark.parametrize("name", ["sample-landuse", "sample-trees-seg"])
def test_images_store_opened_with_xarray_equals_the_dataset(images_path, image_dataset, name):
    images, dataset = xr.open_zarr(images_path(name)), image_dataset(name)
    np.testing.assert_array_equal(images.image, dataset.image)
    np.testing.assert_array_equal(images.label, dataset.label)
    assert images.image.dims == ("sample", "band", "y", "x")
    assert images.label.dims == get_task(dataset.task).label_dims
    assert images.sample.values.tolist() == list(dataset.sample)
    assert images.split.values.tolist() == list(dataset.split)
    assert images.wavelength.values.tolist() == [band.wavelength for band in dataset.bands]
    assert images.image.attrs["units"] == dataset.units
    for key in ("task", "classes", "units", "gsd", "licence", "source", "notes", "content_sha256"):
        assert images.attrs[key] is not None
    assert {"sample", "split", "band", "wavelength"} <= set(images.coords)


def test_content_digest_depends_on_pixels_and_units(image_dataset, tmp_path):
    def digest(dataset):
        image_writer.write(dataset, tmp_path / "scratch", tmp_path / "store")
        return xr.open_zarr(tmp_path / "store").attrs["content_sha256"]

    dataset = image_dataset("sample-landuse")
    pixels = dataset.image.copy()
    pixels[0, 0, 0, 0] += 1
    variants = [
        dataset,
        dataclasses.replace(dataset, image=pixels),
        dataclasses.replace(dataset, units="reflectance"),
    ]
    assert len({digest(variant) for variant in variants}) == 3


@pytest.mark.parametrize(
    ("key", "change", "fields"),
    [
        ("sample", lambda images: [images.sample[1], *images.sample[1:]], {"key": "sample"}),
        ("split", lambda images: ["train"] * len(images.split), {"key": "split", "value": ["test", "val"]}),
        ("label", lambda images: images.label[1:], {"key": "label", "value": 858, "allowed": [859]}),
        ("label", lambda images: images.label + 1, {"key": "label"}),
        ("units", lambda images: "photons", {"key": "units", "value": "photons"}),
        ("bands", lambda images: images.bands[:5], {"key": "image", "value": (859, 13, 16, 16), "allowed": [5]}),
        ("task", lambda images: "segmentation", {"key": "label", "value": (), "allowed": [(16, 16)]}),
        ("lat", lambda images: images.lat + 60, {"key": "lat, lon"}),
    ],
)
def test_write_invalid_dataset_is_refused_and_writes_nothing(image_dataset, tmp_path, key, change, fields):
    dataset = image_dataset("sample-landuse")
    invalid = dataclasses.replace(dataset, **{key: change(dataset)})
    with raises(UserError, **fields):
        image_writer.write(invalid, tmp_path / "scratch", tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_open_images_missing_store_names_the_command(tmp_path):
    with raises(UserError, "dvc repro prepare@m-eurosat", path=tmp_path / "m-eurosat.zarr"):
        open_images(tmp_path / "m-eurosat.zarr")


@pytest.mark.parametrize("name", ["image/c.1.0.0.0", "label/c.1.0.0"])
def test_open_images_missing_or_truncated_file_is_refused(images_path, tmp_path, name):
    """zarr would read zeros where a file is missing."""
    damaged = tmp_path / "sample-landuse-seg.zarr"
    shutil.copytree(images_path("sample-landuse-seg"), damaged)
    open_images(damaged)
    size = (damaged / name).stat().st_size
    os.truncate(damaged / name, 1000)
    with raises(UserError, "dvc repro prepare@sample-landuse-seg", value=1000, allowed=[size], path=damaged / name):
        open_images(damaged)
    (damaged / name).unlink()
    with raises(UserError, value=None, path=damaged / name):
        open_images(damaged)


@pytest.mark.parametrize("name", ["sample", "split", "band", "label", "lat", "lon", "time", "wavelength"])
def test_open_images_missing_file_of_a_small_array_is_refused(images_path, tmp_path, name):
    """Else all labels would be the first class, and all locations 0° N, 0° E."""
    damaged = tmp_path / "sample-landuse.zarr"
    shutil.copytree(images_path("sample-landuse"), damaged)
    open_images(damaged)
    for remove in ((damaged / name / "c/0").unlink, partial(shutil.rmtree, damaged / name)):
        remove()
        with raises(UserError, "dvc repro prepare@sample-landuse", key=name, path=damaged / name / "c/0"):
            open_images(damaged)


def test_open_images_array_of_zeros_has_its_file(image_dataset, tmp_path):
    """zarr omits files of zeros by default; a missing file would then look the same."""
    dataset = image_dataset("sample-landuse")
    zeros = dataclasses.replace(dataset, label=np.zeros_like(dataset.label), lat=dataset.lat * 0, lon=dataset.lon * 0)
    image_writer.write(zeros, tmp_path / "scratch", tmp_path / "store")
    images = open_images(tmp_path / "store")
    assert not images.label.any()
    assert not images.lat.any()


@pytest.mark.parametrize("text", ["2017-02-16T10:21:01Z", "2017-02-16 10:21:01+00:00", "2017-02-16T10:21:01"])
def test_parse_timestamp_accepts_utc(text):
    assert parse_timestamp(text, "time") == np.datetime64("2017-02-16T10:21:01", "s")


def test_parse_timestamp_of_empty_text_is_nat():
    assert np.isnat(parse_timestamp("", "time"))


@pytest.mark.parametrize("text", ["20170216", "today", "1487240461", "2017-02-16T10:21+01:00", "0001-01-01"])
def test_parse_timestamp_other_formats_are_refused(text):
    """numpy would read some of them as other times."""
    with raises(UserError, key="options.time", value=text):
        parse_timestamp(text, "options.time")
