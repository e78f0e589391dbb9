"""GEO-Bench's twelve sets, on files laid out as released: what is read, and what is put right."""

import os
import shutil

import h5py
import numpy as np
import pytest
from h5py import h5d, h5s, h5t

from pipeline.data import image_store, image_writer
from pipeline.data.sources import geobench, validate
from pipeline.data.sources.geobench import download, reader
from pipeline.errors import UserError
from tests import geobench_files
from tests.pipeline.data.sources.conftest import block

ALL = (*geobench_files.CLASSIFICATION, *geobench_files.SEGMENTATION)


@pytest.mark.parametrize("name", ALL)
def test_every_set_is_read_as_it_is(geobench_root, stream, name):
    declared, made = geobench.SETS[name], stream(geobench_root, name)
    assert (declared.image_size, len(declared.classes)) == (geobench_files.SIZE[name], geobench_files.CLASSES[name])
    assert made.task == ("segmentation" if name in geobench_files.SEGMENTATION else made.task)
    assert [made.split.count(one) for one in ("train", "val", "test")] == [6, 4, 4]
    folder = download.local_folder(declared, geobench_root)
    for sample in (made.sample[0], made.sample[-1]):
        found = made.read(sample)
        with h5py.File(folder / f"{sample}.hdf5") as file:
            keys = sorted(key for key in file if not key.startswith("label") and key != "Neon")
            for place, key in enumerate(keys):
                values = file[key][...].squeeze()
                values = values.astype(np.float32) if values.dtype == np.float64 else values
                values = np.rint(values * 255) if declared.divided_by_255 else values
                repeat = declared.image_size // len(values)
                np.testing.assert_array_equal(found.image[place], values.repeat(repeat, 0).repeat(repeat, 1))
            masks = [file[key][...] for key in file if key.startswith("label")]
        if masks:
            np.testing.assert_array_equal(found.label, masks[0])
        assert found.image.shape == made.shape


def test_pictures_over_255_become_the_bytes_that_they_were(copied, stream, tmp_path):
    name = "m-chesapeake-landcover"
    root, folder = copied(name)
    made, released = stream(root, name), stream(root, name, as_labelled=True)
    assert (made.dtype, made.units, released.dtype, released.units) == ("u1", "uint8", "f4", "display")
    for sample in made.sample[:3]:
        ours, theirs = made.read(sample).image, released.read(sample).image
        assert ours.max() > 200
        # What a network is given is the same, to the last digit.
        np.testing.assert_array_equal(np.divide(ours, np.float32(255), dtype=np.float32), theirs)
    # All bytes, divided by 255 or multiplied by what is nearly 1/255, in double precision, and with a negative 0.
    whole = np.resize(np.arange(256, dtype=np.uint8), (256, 256))
    ways = [np.divide(whole, 255, dtype=np.float32), whole * np.float32(1 / 255), whole / 255]
    ways.append(np.where(whole == 0, np.float32(-0.0), ways[0]))
    for values in ways:
        with h5py.File(folder / "id_0001.hdf5", "r+") as file:
            del file["Red"]
            file.create_dataset("Red", data=values)
        np.testing.assert_array_equal(made.read("id_0001").image[3], whole)


def test_what_is_no_picture_over_255_is_refused(copied, stream, tmp_path):
    name = "m-chesapeake-landcover"
    root, folder = copied(name)
    made, released = stream(root, name), stream(root, name, as_labelled=True)
    for wrong in (np.nan, np.inf, -1 / 255, 256 / 255, 0.5004, 200):
        with h5py.File(folder / "id_0001.hdf5", "r+") as file:
            file["Green"][200, 100] = wrong
        with pytest.raises(UserError, match="id_0001.hdf5: its Green has .*, which is no byte divided by 255"):
            made.read("id_0001")
        np.testing.assert_equal(released.read("id_0001").image[1, 200, 100], np.float32(wrong))
    fewer = image_writer.write(made, tmp_path / "scratch", tmp_path / "store", skip_bad=True)
    assert list(fewer.skipped) == ["id_0001"]


TRUE = {
    "m-eurosat": ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "B8A"],
    "m-brick-kiln": ["B01", "B02", "B03", "B04", "B05", "B07", "B8A", "B08", "B11", "B12", "TCI_R", "TCI_G", "TCI_B"],
}


LABELLED = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12"]


@pytest.mark.parametrize("name", TRUE)
def test_mislabelled_bands_are_put_right_unless_asked_for(geobench_root, stream, name):
    right, labelled = stream(geobench_root, name), stream(geobench_root, name, as_labelled=True)
    assert [band.name for band in right.bands] == TRUE[name]
    assert [band.name for band in labelled.bands] == LABELLED
    assert any("the released names are wrong" in note for note in right.notes)
    assert any("as_labelled" in note for note in labelled.notes)
    sample = right.sample[0]
    np.testing.assert_array_equal(right.read(sample).image, labelled.read(sample).image)
    # Prithvi's six, by name, lie under the keys that the facts say.
    six = stream(geobench_root, name, bands=["B02", "B03", "B04", "B8A", "B11", "B12"])
    keys = {"m-eurosat": [1, 2, 3, 12, 10, 11], "m-brick-kiln": [1, 2, 3, 6, 8, 9]}[name]
    np.testing.assert_array_equal(six.read(sample).image, right.read(sample).image[keys])
    assert [band.common_name for band in six.bands] == ["blue", "green", "red", "nir08", "swir16", "swir22"]


def test_labels_come_from_the_lists_or_the_file_alone(copied, stream):
    for name, lists in (("m-bigearthnet", "label_stats.json"), ("m-pv4ger", "label_map.json")):
        root, folder = copied(name)
        listed = stream(root, name)
        with_lists = [listed.read(sample).label for sample in listed.sample]
        (folder / lists).unlink()
        alone = stream(root, name)
        for sample, label in zip(alone.sample, with_lists, strict=True):
            np.testing.assert_array_equal(alone.read(sample).label, label)
        shutil.rmtree(root)
    assert {int(label) for label in with_lists} == {0, 1}


def test_places_and_dates(geobench_root, stream):
    forest = stream(geobench_root, "m-forestnet")
    first, second = (forest.read(sample) for sample in forest.sample[:2])
    assert (first.lat, first.lon) == pytest.approx((-1.5, 113.25))
    assert np.isnat(first.time), "1 January stands for a composite of a year"
    assert second.time == np.datetime64("2014-06-02")
    # Germany's latitude is larger than its longitude, whatever the name says.
    solar = stream(geobench_root, "m-pv4ger")
    assert solar.sample[1].startswith("6.8")
    assert (solar.read(solar.sample[1]).lat, solar.read(solar.sample[1]).lon) == pytest.approx((51.201, 6.801))
    released = stream(geobench_root, "m-pv4ger", as_labelled=True)
    assert released.read(solar.sample[1]).lat == pytest.approx(6.801)
    cattle = stream(geobench_root, "m-nz-cattle")
    cow = cattle.read(cattle.sample[0])
    assert (cow.lat, cow.lon) == pytest.approx((-38.1, 175.3))
    assert np.isnat(cow.time)
    as_released = stream(geobench_root, "m-nz-cattle", as_labelled=True)
    assert as_released.read(cattle.sample[0]).time == np.datetime64("2019-01-01")
    cashew = stream(geobench_root, "m-cashew-plantation")
    assert cashew.read(cashew.sample[3]).time == np.datetime64("2020-02-04")
    assert np.isnan(cashew.read(cashew.sample[3]).lat)


def test_the_class_no_data_counts_unless_ignored(geobench_root, stream):
    for name, index in (("m-SA-crop-type", 0), ("m-cashew-plantation", 0), ("m-chesapeake-landcover", 6)):
        counted, ignored = (stream(geobench_root, name, ignore_nodata=one) for one in (False, True))
        masks = [np.stack([one.read(sample).label for sample in one.sample]) for one in (counted, ignored)]
        assert (masks[0] == index).any()
        np.testing.assert_array_equal(np.where(masks[0] == index, image_store.IGNORE, masks[0]), masks[1])
        assert any("counts as a class" in note for note in counted.notes)
    with pytest.raises(UserError, match="m-NeonTree has no class 'no data'"):
        validate("m", block("m-NeonTree", ignore_nodata=True))


def test_partitions_with_fewer_labels(geobench_root, stream):
    fewer = stream(geobench_root, "m-so2sat", partition="0.50x_train")
    assert [fewer.split.count(one) for one in ("train", "val", "test")] == [3, 4, 4]
    with pytest.raises(UserError, match="Partitions there: 0.01x_train, .*default"):
        stream(geobench_root, "m-so2sat", partition="0.03x_train")


@pytest.mark.parametrize(
    "way",
    [{"chunks": (8, 8), "compression": "gzip"}, {"dtype": ">f4"}, {"dtype": "f8"}, {"chunks": (32, 32)}],
)
def test_pixels_are_the_same_however_a_file_lays_them_down(copied, stream, way):
    root, folder = copied("m-so2sat")
    made = stream(root, "m-so2sat")
    before = made.read("id_0003").image.copy()
    with h5py.File(folder / "id_0003.hdf5", "r+") as file:
        for key in ("02 - Blue", "12 - SWIR"):
            values = file[key][()]
            del file[key]
            file.create_dataset(key, data=values, **way)
    into = np.zeros(made.shape, made.dtype)
    assert made.read("id_0003", into).image is into
    np.testing.assert_array_equal(into, before)


def test_pixels_are_found_behind_a_user_block(copied, stream):
    """Before HDF5's own bytes a file may hold others: places within it are counted from its very beginning."""
    root, folder = copied("m-so2sat")
    made = stream(root, "m-so2sat")
    before = made.read("id_0003").image.copy()
    with (
        h5py.File(folder / "id_0003.hdf5") as file,
        h5py.File(folder / "moved", "w", userblock_size=1024) as moved,
    ):
        for key in file:
            file.copy(key, moved)
        moved.attrs.update(file.attrs)
    os.replace(folder / "moved", folder / "id_0003.hdf5")
    np.testing.assert_array_equal(made.read("id_0003").image, before)


def test_a_mask_of_whole_numbers_of_another_make(copied, stream):
    """Numbers of three bytes in four: as numpy has them they are integers, but not by their bytes."""
    root, folder = copied("m-chesapeake-landcover")
    made = stream(root, "m-chesapeake-landcover")
    name = made.sample[0]
    before = made.read(name).label
    kind = h5t.STD_I32LE.copy()
    kind.set_precision(24)
    kind.set_offset(8)
    with h5py.File(folder / f"{name}.hdf5", "r+") as file:
        del file["label"]
        space = h5s.create_simple(before.shape)
        h5d.create(file.id, b"label", kind, space).write(h5s.ALL, h5s.ALL, before.astype("i4"))
        assert file["label"].dtype == np.dtype("i4")
    np.testing.assert_array_equal(made.read(name).label, before)


def test_a_file_that_is_cut_while_it_is_read_is_an_error(copied, stream, monkeypatch):
    root, folder = copied("m-so2sat")
    made = stream(root, "m-so2sat")
    found = reader.keys_without_dates

    def then_cut(file, declared):
        there = found(file, declared)
        os.truncate(folder / "id_0003.hdf5", h5d.open(file, there["12 - SWIR"]).get_offset() + 100)
        return there

    monkeypatch.setattr(reader, "keys_of", then_cut)
    with pytest.raises(UserError, match="id_0003.hdf5 cannot be read: it ends within its pixels"):
        made.read("id_0003")


def test_files_are_fetched_ahead_without_a_word(copied, stream):
    root, folder = copied("m-so2sat")
    made = stream(root, "m-so2sat")
    (folder / "id_0000.hdf5").unlink()
    before = len(os.listdir("/proc/self/fd"))
    made.ahead(["id_0000", "id_0001", "never"])
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_notes_say_what_was_done(geobench_root, stream):
    """Of places, labels and means."""
    said = {
        as_labelled: stream(geobench_root, "m-pv4ger", as_labelled=as_labelled).notes for as_labelled in (False, True)
    }
    assert any("swapped are put right" in note for note in said[False])
    assert any("swapped are kept as they are" in note for note in said[True])
    assert "band means are compared with none" in said[False], "a few samples are not the set"
    assert any("labels are those of the files" in note for note in stream(geobench_root, "m-so2sat").notes)
    assert not any("labels are those of the files" in note for note in said[False])
