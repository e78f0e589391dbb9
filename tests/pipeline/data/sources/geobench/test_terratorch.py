"""The same files through terratorch's own datasets: same pixels, same labels, same splits; and where it differs."""

import importlib
import json
import shutil

import numpy as np
import pytest

from pipeline.config import DatasetConfig
from pipeline.data.sources import geobench
from pipeline.data.sources.geobench import download
from tests import geobench_files

# terratorch's class of each set.
THEIRS = {
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
# terratorch opens this one's bands together, so it can read those of one size alone.
BANDS = {"m-NeonTree": ("BLUE", "GREEN", "RED")}
PLACED = ("m-forestnet", "m-pv4ger", "m-pv4ger-seg", "m-nz-cattle", "m-cashew-plantation")


@pytest.fixture
def both(geobench_root, tmp_path):
    """From a set's name, and our options, to our stream and terratorch's dataset of each split."""

    def make(name: str, **options):
        declared = geobench.SETS[name]
        folder = download.local_folder(declared, geobench_root)
        if name == "m-eurosat":  # terratorch cannot do without the list that some releases lack
            shutil.copytree(folder, tmp_path / folder.name)
            folder = tmp_path / folder.name
            _write_label_map(folder, declared)
        (tmp_path / "source.json").write_text(json.dumps({"folder": str(folder)}))
        ours = geobench.prepare(tmp_path, DatasetConfig("geobench", options={"set": name, **options}))
        module, _, kind = THEIRS[name].partition(".")
        loaded = getattr(importlib.import_module(f"terratorch.datasets.{module}"), kind)
        given = {"bands": BANDS[name]} if name in BANDS else {}
        given |= {"use_metadata": True} if name in PLACED else {}
        theirs = {split: loaded(folder.parent, split=split, **given) for split in ("train", "val", "test")}
        return ours, theirs

    # terratorch unpickles without care, and so needs geobench's classes.
    with geobench_files.classes():
        yield make


def _write_label_map(folder, declared):
    names = [path.stem for path in sorted(folder.glob("*.hdf5"))]
    labels = {str(label): [] for label in range(len(declared.classes))}
    for number, name in enumerate(names):
        labels[str(number * 7 % 10)].append(name)
    (folder / "label_map.json").write_text(json.dumps(labels))


@pytest.mark.parametrize("name", THEIRS)
def test_pixels_labels_and_splits_are_terratorchs(both, name):
    bands = ["blue", "green", "red"] if name in BANDS else []
    ours, theirs = both(name, as_labelled=True, bands=bands)
    read = {sample: ours.read(sample) for sample in ours.sample}
    for split, dataset in theirs.items():
        names = [path.stem for path in dataset.image_files]
        assert names == [one for one, home in zip(ours.sample, ours.split, strict=True) if home == split]
        for number, sample in enumerate(names):
            one = dataset[number]
            np.testing.assert_array_equal(one["image"].numpy(), read[sample].image.astype(np.float32))
            label = one["mask"] if "mask" in one else one["label"]
            np.testing.assert_array_equal(np.asarray(label), read[sample].label)


def test_where_terratorch_takes_the_wrong_band(both):
    """Asked for the narrow near infrared of m-eurosat, terratorch gives water vapour."""
    ours, theirs = both("m-eurosat", bands=["B8A"])
    assert theirs["train"].all_band_names.index("NIR_NARROW") == 8
    given = theirs["train"][0]["image"][8].numpy()
    right = ours.read(ours.sample[0]).image[0]
    assert not np.array_equal(given, right)
    np.testing.assert_array_equal(theirs["train"][0]["image"][12].numpy(), right)


@pytest.mark.parametrize("name", PLACED)
def test_places_and_dates_are_terratorchs_where_it_is_right(both, name):
    ours, theirs = both(name)
    released, _ = both(name, as_labelled=True)
    for number in range(6):
        sample, one = ours.sample[number], theirs["train"][number]
        fixed, labelled = ours.read(sample), released.read(sample)
        if "location_coords" in one:
            np.testing.assert_allclose(one["location_coords"], [labelled.lat, labelled.lon], rtol=1e-6)
            if name.startswith("m-pv4ger"):  # it does not know that many are swapped
                assert fixed.lat > 50 > fixed.lon
        if "temporal_coords" in one:
            year, day = one["temporal_coords"][0].tolist()
            assert labelled.time == np.datetime64(f"{year:.0f}-01-01", "s") + np.timedelta64(int(day), "D")
            assert np.isnat(fixed.time) == (day == 0), "it gives the placeholder to the model, we nothing"
