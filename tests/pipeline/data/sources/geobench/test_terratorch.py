"""Parity with terratorch's datasets on the same files, and the known differences."""

import importlib
import json

import numpy as np
import pytest

from pipeline.data.sources import geobench
from pipeline.data.sources.geobench import download
from tests import geobench_files
from tests.pipeline.data.sources.geobench.conftest import dataset_config

WITH_METADATA = ("m-forestnet", "m-pv4ger", "m-pv4ger-seg", "m-nz-cattle", "m-cashew-plantation")


@pytest.mark.parametrize("name", geobench.SETS)
def test_prepare_samples_equal_terratorchs_apart_from_its_faults(geobench_root, copy_set, tmp_path, name):
    folder = download.local_folder(geobench.SETS[name], geobench_root)
    if name == "m-eurosat":  # terratorch requires label_map.json, which some releases lack
        folder = copy_set(name)
        samples = sorted(path.stem for path in folder.glob("*.hdf5"))
        samples_of_class = {str(label): samples[label * 3 % 10 :: 10] for label in range(10)}
        (folder / "label_map.json").write_text(json.dumps(samples_of_class))
    # terratorch stacks the bands, so it can only read bands of one size.
    arguments = {"bands": ("BLUE", "GREEN", "RED")} if name == "m-NeonTree" else {}
    arguments |= {"use_metadata": True} if name in WITH_METADATA else {}
    bands = [band.lower() for band in arguments.get("bands", ())]
    (tmp_path / "source.json").write_text(json.dumps({"folder": str(folder)}))
    released = geobench.prepare(tmp_path, dataset_config(name, keep_released_metadata=True, bands=bands))
    corrected = geobench.prepare(tmp_path, dataset_config(name, bands=bands))
    module = importlib.import_module(f"terratorch.datasets.{name.replace('-', '_').replace('NeonTree', 'neontree')}")
    dataset_class = next(value for key, value in vars(module).items() if key.startswith("M") and "NonGeo" in key)
    with geobench_files.classes():  # terratorch uses the standard unpickler, which needs geobench's classes
        for split in ("train", "val", "test"):
            dataset = dataset_class(folder.parent, split=split, **arguments)
            names = [path.stem for path in dataset.image_files]
            expected = [name for name, part in zip(released.sample, released.split, strict=True) if part == split]
            assert names == expected
            for number, sample_name in enumerate(names[:2]):
                item, sample = dataset[number], released.read_sample(sample_name)
                np.testing.assert_array_equal(item["image"].numpy(), sample.image.astype(np.float32))
                label = item["mask"] if "mask" in item else item["label"]
                np.testing.assert_array_equal(np.asarray(label), sample.label)
                if name in WITH_METADATA:
                    _compare_metadata(name, item, sample, corrected.read_sample(sample_name))
    if name == "m-eurosat":  # terratorch returns water vapour as B8A
        assert dataset.all_band_names.index("NIR_NARROW") == 8
        assert corrected.bands[12].name == "B8A"
        actual = corrected.read_sample(sample_name).image[12]
        np.testing.assert_array_equal(item["image"][12].numpy(), actual)
        assert not np.array_equal(item["image"][8].numpy(), actual)


def _compare_metadata(name, item, released, corrected):
    if "location_coords" in item:
        np.testing.assert_allclose(item["location_coords"], [released.lat, released.lon], rtol=1e-6)
        if name.startswith("m-pv4ger"):  # terratorch does not correct swapped coordinates
            assert corrected.lat > 50 > corrected.lon
    if "temporal_coords" in item:
        year, day = item["temporal_coords"][0].tolist()
        assert released.time == np.datetime64(f"{year:.0f}-01-01", "s") + np.timedelta64(int(day), "D")
        # terratorch passes placeholder dates to the model; ours are removed.
        assert np.isnat(corrected.time) == (day == 0)
