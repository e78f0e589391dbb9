import dataclasses
import os
import shutil
from functools import partial

import numpy as np
import pytest
import xarray as xr

from cache.atomic import sync_tree
from pipeline.data import image_store, image_writer
from pipeline.errors import UserError


@pytest.mark.parametrize("name", ["sample-landuse", "sample-landuse-seg", "sample-trees", "sample-trees-seg"])
def test_a_store_opens_with_xarray_and_states_what_it_is(images_path, image_dataset, name):
    opened, made = xr.open_zarr(images_path(name)), image_dataset(name)
    np.testing.assert_array_equal(opened.image, made.image)
    np.testing.assert_array_equal(opened.label, made.label)
    assert opened.image.dims == ("sample", "band", "y", "x")
    assert opened.label.dims == image_store.label_dims(made.task)
    assert opened.sample.values.tolist() == list(made.sample)
    assert opened.split.values.tolist() == list(made.split)
    assert opened.wavelength.values.tolist() == [band.wavelength for band in made.bands]
    assert opened.image.attrs["units"] == made.units
    for key in ("task", "classes", "units", "gsd", "licence", "source", "notes", "content_sha256"):
        assert opened.attrs[key] is not None
    assert {"sample", "split", "band", "wavelength"} <= set(opened.coords)


def test_two_writes_give_the_same_bytes(image_dataset, tmp_path):
    for name in ("a", "b"):
        image_writer.write(image_dataset("sample-landuse"), tmp_path / "scratch", tmp_path / name)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) > 10
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    sync_tree(tmp_path)


def test_the_digest_follows_the_content(image_dataset, tmp_path):
    def digest(changed):
        image_writer.write(changed, tmp_path / "scratch", tmp_path / "store")
        return xr.open_zarr(tmp_path / "store").attrs["content_sha256"]

    made = image_dataset("sample-landuse")
    pixel = made.image.copy()
    pixel[0, 0, 0, 0] += 1
    changed = [made, dataclasses.replace(made, image=pixel), dataclasses.replace(made, units="reflectance")]
    assert len({digest(one) for one in changed}) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sample": lambda m: [m.sample[1], *m.sample[1:]]}, "twice"),
        ({"split": lambda m: ["train"] * len(m.split)}, "empty"),
        ({"label": lambda m: m.label[1:]}, "859 images but 858"),
        ({"label": lambda m: m.label + 1}, "outside the 5 classes"),
        ({"units": lambda m: "photons"}, "Known units"),
        ({"bands": lambda m: m.bands[:5]}, "do not have 5 bands"),
        ({"task": lambda m: "segmentation"}, "segmentation label has dimensions"),
        ({"lat": lambda m: m.lat + 60}, "Are they swapped"),
    ],
)
def test_what_cannot_be_a_dataset_is_refused_and_nothing_written(image_dataset, tmp_path, change, words):
    made = image_dataset("sample-landuse")
    broken = dataclasses.replace(made, **{key: value(made) for key, value in change.items()})
    with pytest.raises(UserError, match=words):
        image_writer.write(broken, tmp_path / "scratch", tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_no_store_says_which_stage_makes_it(tmp_path):
    with pytest.raises(UserError, match="dvc repro prepare@m-eurosat"):
        image_store.open_images(tmp_path / "m-eurosat.zarr")


@pytest.mark.parametrize("name", ["image/c.1.0.0.0", "label/c.1.0.0"])
def test_a_lost_or_cut_file_is_named(images_path, tmp_path, name):
    """zarr reads zeros where a file is missing."""
    damaged = tmp_path / "sample-landuse-seg.zarr"
    shutil.copytree(images_path("sample-landuse-seg"), damaged)
    image_store.open_images(damaged)
    size = (damaged / name).stat().st_size
    os.truncate(damaged / name, 1000)
    with pytest.raises(UserError, match=f"{name} has 1000 of {size} bytes.*dvc repro prepare@sample-landuse-seg"):
        image_store.open_images(damaged)
    (damaged / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        image_store.open_images(damaged)


@pytest.mark.parametrize("name", ["sample", "split", "band", "label", "lat", "lon", "time", "wavelength"])
def test_a_lost_file_of_small_arrays_is_named(images_path, tmp_path, name):
    """Else labels would all be the first class, and places lie in the Atlantic."""
    damaged = tmp_path / "sample-landuse.zarr"
    shutil.copytree(images_path("sample-landuse"), damaged)
    image_store.open_images(damaged)
    for lose in ((damaged / name / "c/0").unlink, partial(shutil.rmtree, damaged / name)):
        lose()
        with pytest.raises(UserError, match=f"sample-landuse.zarr/{name}/c/0 is missing.*dvc repro prepare@"):
            image_store.open_images(damaged)


def test_a_file_of_zeros_alone_is_there(image_dataset, tmp_path):
    """zarr leaves out such files unless told not to; one that is lost could not be told from them."""
    made = image_dataset("sample-landuse")
    zeros = dataclasses.replace(made, label=np.zeros_like(made.label), lat=made.lat * 0, lon=made.lon * 0)
    image_writer.write(zeros, tmp_path / "scratch", tmp_path / "store")
    opened = image_store.open_images(tmp_path / "store")
    assert not opened.label.any()
    assert not opened.lat.any()
