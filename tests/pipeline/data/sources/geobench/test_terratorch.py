"""Parity with terratorch's datasets on the same files, and the known differences."""

import importlib
import json
import shutil

import numpy as np
import pytest

from pipeline.data.sources import geobench
from pipeline.data.sources.geobench import download
from tests import geobench_files
from tests.pipeline.data.sources.geobench.conftest import dataset_config

TERRATORCH_CLASSES = {
    "m-bigearthnet": "m_bigearthnet.MBigEarthNonGeo",
    "m-so2sat": "m_so2sat.MSo2SatNonGeo",
    "m-brick-kiln": "m_brick_kiln.MBrickKilnNonGeo",
    "m-forestnet": "m_forestnet.MForestNetNonGeo",
    "m-eurosat": "m_eurosat.MEuroSATNonGeo",
    "m-pv4ger": "m_pv4ger.MPv4gerNonGeo",
    "m-pv4ger-seg": "m_pv4ger_seg.MPv4gerSegNonGeo",
    "m-chesapeake-landcover": "m_chesapeake_landcover.MChesapeakeLandcoverNonGeo",
    "m-cashew-plantation": "m_cashew_plantation.MBeninSmallHolderCashewsNonGeo",
    "m-SA-crop-type": "m_SA_crop_type.MSACropTypeNonGeo",
    "m-nz-cattle": "m_nz_cattle.MNzCattleNonGeo",
    "m-NeonTree": "m_neontree.MNeonTreeNonGeo",
}
# terratorch stacks the bands of this set, so it can only read bands of one size.
BANDS = {"m-NeonTree": ("BLUE", "GREEN", "RED")}
WITH_METADATA = ("m-forestnet", "m-pv4ger", "m-pv4ger-seg", "m-nz-cattle", "m-cashew-plantation")


@pytest.fixture
def open_both(geobench_root, tmp_path):
    """Function from a set's name and options to our images and terratorch's datasets by split."""

    def prepare(name: str, **options):
        spec = geobench.SETS[name]
        folder = download.local_folder(spec, geobench_root)
        if name == "m-eurosat":  # terratorch requires label_map.json, which some releases lack
            shutil.copytree(folder, tmp_path / folder.name)
            folder = tmp_path / folder.name
            _write_label_map(folder, spec)
        (tmp_path / "source.json").write_text(json.dumps({"folder": str(folder)}))
        images = geobench.prepare(tmp_path, dataset_config(name, **options))
        module, _, class_name = TERRATORCH_CLASSES[name].partition(".")
        dataset_class = getattr(importlib.import_module(f"terratorch.datasets.{module}"), class_name)
        arguments = {"bands": BANDS[name]} if name in BANDS else {}
        arguments |= {"use_metadata": True} if name in WITH_METADATA else {}
        datasets = {
            split: dataset_class(folder.parent, split=split, **arguments) for split in ("train", "val", "test")
        }
        return images, datasets

    # terratorch uses the standard unpickler, which needs geobench's classes.
    with geobench_files.classes():
        yield prepare


def _write_label_map(folder, spec):
    names = [path.stem for path in sorted(folder.glob("*.hdf5"))]
    labels = {str(label): [] for label in range(len(spec.classes))}
    for number, name in enumerate(names):
        labels[str(number * 7 % 10)].append(name)
    (folder / "label_map.json").write_text(json.dumps(labels))


@pytest.mark.parametrize("name", TERRATORCH_CLASSES)
def test_prepare_pixels_labels_and_splits_equal_terratorchs(open_both, name):
    bands = ["blue", "green", "red"] if name in BANDS else []
    images, datasets = open_both(name, keep_released_metadata=True, bands=bands)
    samples = {sample: images.read_sample(sample) for sample in images.sample}
    for split, dataset in datasets.items():
        names = [path.stem for path in dataset.image_files]
        assert names == [
            sample for sample, own_split in zip(images.sample, images.split, strict=True) if own_split == split
        ]
        for number, sample in enumerate(names):
            item = dataset[number]
            np.testing.assert_array_equal(item["image"].numpy(), samples[sample].image.astype(np.float32))
            label = item["mask"] if "mask" in item else item["label"]
            np.testing.assert_array_equal(np.asarray(label), samples[sample].label)


def test_prepare_eurosat_b8a_differs_from_terratorch_which_returns_water_vapour(open_both):
    images, datasets = open_both("m-eurosat", bands=["B8A"])
    dataset = datasets["train"]
    assert dataset.all_band_names.index("NIR_NARROW") == 8
    actual = images.read_sample(images.sample[0]).image[0]
    assert not np.array_equal(dataset[0]["image"][8].numpy(), actual)
    np.testing.assert_array_equal(dataset[0]["image"][12].numpy(), actual)


@pytest.mark.parametrize("name", WITH_METADATA)
def test_prepare_released_locations_and_dates_equal_terratorchs(open_both, name):
    images, datasets = open_both(name)
    released_images, _ = open_both(name, keep_released_metadata=True)
    for number in range(6):
        sample, item = images.sample[number], datasets["train"][number]
        corrected, released = images.read_sample(sample), released_images.read_sample(sample)
        if "location_coords" in item:
            np.testing.assert_allclose(item["location_coords"], [released.lat, released.lon], rtol=1e-6)
            if name.startswith("m-pv4ger"):  # terratorch does not correct swapped coordinates
                assert corrected.lat > 50 > corrected.lon
        if "temporal_coords" in item:
            year, day = item["temporal_coords"][0].tolist()
            assert released.time == np.datetime64(f"{year:.0f}-01-01", "s") + np.timedelta64(int(day), "D")
            # terratorch passes placeholder dates to the model; ours are removed.
            assert np.isnat(corrected.time) == (day == 0)
