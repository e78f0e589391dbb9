"""Labels in a CSV file."""

import dataclasses
import shutil
import unicodedata

import pandas as pd
import pytest

from pipeline.data.sources.custom.labels import read_table
from pipeline.errors import UserError
from tests.errors import raises
from tests.pipeline.data.sources.custom.custom_data import make_options, prepare, table_dataset, with_options

NAMES = ("a.tif", "b.tif", "more/b.tif")


@pytest.fixture
def read(tmp_path):
    """Function from a table's text, the images' names and options to what is read; opens no image."""

    def read(text: str | bytes, names=NAMES[:2], is_multilabel=False, notes=None, **options):
        table = tmp_path / "labels.csv"
        table.write_bytes(text if isinstance(text, bytes) else text.encode())
        images = [tmp_path / "images" / name for name in names]
        parsed = make_options(tmp_path, **{"classes": []} | options)
        return read_table(table, images, parsed, is_multilabel, [] if notes is None else notes)

    return read


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        (b"", {}),
        (b"file,label\n", {}),
        ("file,label\na.tif,Gewässer\n".encode("latin1"), {}),
        (bytes(range(256)) * 20, {}),
        (b"file;label\na;b\n", {"key": "file", "allowed": ["file;label"]}),
        (b"file,kind\na.tif,farm\n", {"key": "label", "allowed": ["file", "kind"]}),
        (b"file,label,label\na.tif,a,b\n", {"key": "label"}),
        (b"file,label\na.tif,a,b\n", {}),
        (b"file,label\nno.tif,a\n", {"key": "file", "value": "no.tif"}),
        (b"file,label\na.tif,a\na,b\n", {"key": "file", "value": "a"}),
        (b"file,label\na.tif,\n", {"key": "label", "value": "a.tif"}),
    ],
    ids=["empty", "no rows", "not UTF-8", "binary", "semicolons", "no label column", "two label columns",
         "more values than columns", "unknown image", "image listed twice", "no label"],
)  # fmt: skip
def test_read_table_invalid_table_is_refused(read, tmp_path, text, fields):
    with raises(UserError, path=tmp_path / "labels.csv", **fields):
        read(text)


def test_read_table_unknown_class_or_time_in_another_format_is_refused(read):
    with raises(UserError, key="label", value="forest", allowed=["farm", "water"]):
        read("file,label\na.tif,forest\n", classes=["farm", "water"])
    with raises(UserError, "a.tif", value="16.2.2017"):
        read("file,label,time\na.tif,farm,16.2.2017\n")


def test_read_table_strips_blanks_and_accepts_empty_rows_paths_and_accents(read, tmp_path):
    text = "file, label,label.1\n./images/a.tif, fore\u0302t ,x\n,,\nimages\\b.tif,330,x\n"
    rows, classes = read(text)
    assert classes == ("330", "for\u00eat")
    assert rows.label.tolist() == [1, 0]
    assert rows.path.tolist() == [str(tmp_path / "images" / name) for name in NAMES[:2]]
    rows, classes = read("file,label\na.tif,farm | water\nb.tif,\n", is_multilabel=True)
    assert (classes, rows.label.tolist()) == (("farm", "water"), [[1, 1], [0, 0]])
    decomposed, composed = (unicodedata.normalize(form, "m\u00fchle.tif") for form in ("NFD", "NFC"))
    assert len(read(f"file,label\n{composed},a\n", [decomposed])[0]) == 1


def test_read_table_alike_classes_are_refused_unless_listed(read, tmp_path):
    text = "file,label\na.tif,forest\nb.tif,Forest\n"
    with raises(UserError, "forest", "Forest", tmp_path / "labels.csv", key="classes"):
        read(text)
    assert read(text, classes=["Forest", "forest"])[1] == ("Forest", "forest")


def test_read_table_name_of_several_images_is_refused(read, tmp_path):
    paths = [str(tmp_path / "images" / name) for name in NAMES[1:]]
    with raises(UserError, key="file", value="b.tif", allowed=paths):
        read("file,label\nb.tif,a\n", NAMES)
    assert read("file,label\nimages/b.tif,a\nimages/more/b.tif,b\n", NAMES)[0].path.tolist() == paths


@pytest.mark.parametrize("row", ["c.tif,farm", "b.tif,"])
def test_read_table_row_without_image_or_label_is_refused_or_skipped(read, row):
    text, name, notes = f"file,label\na.tif,forest\n{row}\n", row[:5], []
    with raises(UserError, value=name):
        read(text)
    assert len(read(text, notes=notes, skip_bad=True)[0]) == 1
    assert name in notes[0]
    with raises(UserError, value=name):
        read(f"file,label\n{row}\n", skip_bad=True)


def test_prepare_images_that_differ_in_their_endings_are_refused(tiles, tmp_path):
    folder, dataset = table_dataset(tiles, tmp_path, options={"images": "images/*"})
    (folder / "labels.csv").write_text("file,label\ntile_0000_0000.tif,a\ntile_0000_0000.tiff,b\n")
    first = folder / "images/tile_0000_0000.tif"
    shutil.copy(first, first.with_suffix(".tiff"))
    with raises(UserError, first, key="images", value="images/tile_0000_0000"):
        prepare(dataset, tmp_path)


def test_prepare_table_that_does_not_fit_its_options_is_refused(tiles, tmp_path):
    folder, dataset = table_dataset(tiles, tmp_path)
    with raises(UserError, key="split", allowed=["file", "label"], path=folder / "labels.csv"):
        prepare(with_options(dataset, split="column"), tmp_path)
    with raises(UserError, key="labels", value="labels.csv"):
        prepare(dataclasses.replace(dataset, task="segmentation"), tmp_path)
    shutil.copy(folder / "labels.csv", folder / "labels2.csv")
    with raises(UserError, key="labels", allowed=["labels.csv", "labels2.csv"]):
        prepare(with_options(dataset, labels="*.csv"), tmp_path)
    pd.read_csv(folder / "labels.csv").assign(label="farm").to_csv(folder / "labels.csv", index=False)
    with raises(UserError, key="classes", value=("farm",)):
        prepare(dataset, tmp_path)
