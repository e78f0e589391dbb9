"""Labels in a CSV file."""

import dataclasses
import shutil
import unicodedata

import pandas as pd
import pytest

from pipeline.errors import UserError
from tests.errors import raises
from tests.pipeline.data.sources.custom.custom_data import (
    prepare,
    table_dataset,
    tile_dataset,
    with_options,
    write_table,
)

FIRST, SECOND = "tile_0000_0000.tif", "tile_0000_0128.tif"

INVALID_TABLES = {
    "empty": (b"", {}),
    "no rows": (b"file,label\n", {}),
    "not UTF-8": ("file,label\ntile_0000_0000,Gewässer\n".encode("latin1"), {}),
    "binary": (bytes(range(256)) * 20, {}),
    "semicolons": (b"file;label\na;b\n", {"key": "file", "allowed": ["file;label"]}),
    "no label column": (b"file,kind\ntile_0000_0000,farm\n", {"key": "label", "allowed": ["file", "kind"]}),
    "two label columns": (b"file,label,label\ntile_0000_0000,a,b\n", {"key": "label"}),
    "more values than columns": (b"file,label\ntile_0000_0000,a,b\n", {}),
    "unknown image": (b"file,label\nno.tif,a\n", {"key": "file", "value": "no.tif"}),
    "image listed twice": (
        b"file,label\ntile_0000_0128.tif,a\ntile_0000_0128,b\n", {"key": "file", "value": "tile_0000_0128"}
    ),
    "no label": (b"file,label\ntile_0000_0000.tif,\n", {"key": "label", "value": FIRST}),
}  # fmt: skip


@pytest.mark.parametrize("kind", INVALID_TABLES)
def test_read_table_invalid_table_is_refused(tiles, tmp_path, kind):
    text, fields = INVALID_TABLES[kind]
    folder, dataset = table_dataset(tiles, tmp_path, text)
    with raises(UserError, path=folder / "labels.csv", **fields):
        prepare(dataset, tmp_path)


def test_read_table_unknown_class_is_refused(tiles, tmp_path):
    folder, dataset = table_dataset(tiles, tmp_path, options={"classes": ["farm", "water"]})
    with raises(UserError, key="label", value="forest", allowed=["farm", "water"], path=folder / "labels.csv"):
        prepare(dataset, tmp_path)


def test_read_table_strips_blanks(tiles, tmp_path):
    names = [path.name for path in sorted((tiles / "images").iterdir())]
    rows = [f"{name}, {('farm ', 'forest')[index % 2]}" for index, name in enumerate(names)]
    _, dataset = table_dataset(tiles, tmp_path / "a", "\n".join(["file, label", *rows]).encode())
    assert prepare(dataset, tmp_path).classes == ("farm", "forest")
    rows = [f"{name},farm | water" for name in names]
    _, dataset = table_dataset(tiles, tmp_path / "b", "\n".join(["file,label", *rows]).encode(), task="multilabel")
    assert prepare(dataset, tmp_path).classes == ("farm", "water")


def test_read_table_accepts_empty_rows_relative_paths_backslashes_and_accents(tiles, tmp_path):
    names = [path.name for path in sorted((tiles / "images").iterdir())]
    forms = ("./images/{}", "images\\{}", "{}")
    labels = ("for\u00eat", "fore\u0302t", "farm")
    rows = [f"{forms[index % 3].format(name)},{labels[index % 3]}" for index, name in enumerate(names)]
    _, dataset = table_dataset(tiles, tmp_path, "\n".join(["file,label", *rows, ",", ""]).encode())
    prepared = prepare(dataset, tmp_path)
    assert (len(prepared.sample), prepared.classes) == (48, ("farm", "for\u00eat"))


def test_read_table_finds_files_in_either_form_of_accents(tiles, tmp_path):
    folder, dataset = table_dataset(tiles, tmp_path)
    decomposed, composed = (unicodedata.normalize(form, "m\u00fchle.tif") for form in ("NFD", "NFC"))
    (folder / "images" / SECOND).rename(folder / "images" / decomposed)
    table = folder / "labels.csv"
    table.write_text(table.read_text().replace(SECOND, composed))
    assert len(prepare(dataset, tmp_path).sample) == 48


@pytest.mark.parametrize(("original", "replacement"), [("forest", "Forest"), ("1", "1.0")])
def test_read_table_alike_classes_are_refused_unless_listed(tiles, tmp_path, original, replacement):
    folder, dataset = table_dataset(tiles, tmp_path)
    table = folder / "labels.csv"
    text = table.read_text().replace(",forest", f",{original}")
    table.write_text(text.replace(f",{original}\n", f",{replacement}\n", 1))
    with raises(UserError, original, replacement, table, key="classes"):
        prepare(dataset, tmp_path)
    classes = (replacement, "farm", original)
    assert prepare(with_options(dataset, classes=list(classes)), tmp_path).classes == classes


def test_read_table_accepts_long_numbers_as_classes(tiles, tmp_path):
    names = [path.name for path in sorted((tiles / "images").iterdir())]
    rows = [f"{name},330101010{index % 2},x" for index, name in enumerate(names)]
    _, dataset = table_dataset(tiles, tmp_path, "\n".join(["file,label,label.1", *rows]).encode())
    assert prepare(dataset, tmp_path).classes == ("3301010100", "3301010101")


def test_read_table_name_of_several_images_is_refused(tiles, tmp_path):
    folder, dataset = table_dataset(tiles, tmp_path, options={"images": "**/*.tif"})
    (folder / "other").mkdir()
    shutil.copy(folder / "images" / SECOND, folder / "other")
    paths = [str(folder / "images" / SECOND), str(folder / "other" / SECOND)]
    with raises(UserError, key="file", value=SECOND, allowed=paths):
        prepare(dataset, tmp_path)
    frame = pd.read_csv(folder / "labels.csv")
    frame.assign(file="images/" + frame.file).to_csv(folder / "labels.csv", index=False)
    assert len(prepare(dataset, tmp_path).sample) == 48


def test_prepare_images_that_differ_in_their_endings_are_refused(tiles, tmp_path):
    folder, dataset = table_dataset(tiles, tmp_path, options={"images": "images/*"})
    shutil.copy(folder / "images" / FIRST, folder / "images/tile_0000_0000.tiff")
    (folder / "labels.csv").write_text("file,label\ntile_0000_0000.tif,a\ntile_0000_0000.tiff,b\n")
    with raises(UserError, folder / "images" / FIRST, key="images", value="images/tile_0000_0000"):
        prepare(dataset, tmp_path)


def test_prepare_column_split_is_used_or_noted(tiles, tmp_path):
    folder, dataset = table_dataset(tiles, tmp_path / "a", options={"split": "column"})
    with raises(UserError, key="split", allowed=["file", "label"], path=folder / "labels.csv"):
        prepare(dataset, tmp_path)
    _, options = write_table(tiles, tmp_path / "b", split="train")
    dataset = tile_dataset(tiles, task="classification", chip=0, block=128, options=options)
    assert "column split" in prepare(dataset, tmp_path).notes[0]


@pytest.mark.parametrize("problem", ["no image", "no label"])
def test_read_table_row_without_image_or_label_is_refused_or_skipped(tiles, tmp_path, problem):
    folder, dataset = table_dataset(tiles, tmp_path)
    if problem == "no image":
        (folder / "images" / SECOND).unlink()
    else:
        frame = pd.read_csv(folder / "labels.csv")
        frame.loc[frame.file == SECOND, "label"] = ""
        frame.to_csv(folder / "labels.csv", index=False)
    with raises(UserError, value=SECOND, path=folder / "labels.csv"):
        prepare(dataset, tmp_path)
    prepared = prepare(with_options(dataset, skip_bad=True), tmp_path)
    assert len(prepared.sample) == 47
    assert any(SECOND in note for note in prepared.notes)


def test_read_table_without_any_image_is_refused_even_if_bad_rows_are_skipped(tiles, tmp_path):
    folder, dataset = table_dataset(tiles, tmp_path, options={"skip_bad": True})
    for path in (folder / "images").iterdir():
        path.rename(path.with_name(f"x{path.name}"))
    with raises(UserError, key="file", value=FIRST):
        prepare(dataset, tmp_path)


def test_prepare_segmentation_from_a_table_is_refused(tiles, tmp_path):
    _, dataset = table_dataset(tiles, tmp_path)
    with raises(UserError, key="labels", value="labels.csv"):
        prepare(dataclasses.replace(dataset, task="segmentation"), tmp_path)


def test_prepare_several_tables_are_refused(tiles, tmp_path):
    folder, dataset = table_dataset(tiles, tmp_path)
    shutil.copy(folder / "labels.csv", folder / "labels2.csv")
    with raises(UserError, key="labels", allowed=["labels.csv", "labels2.csv"]):
        prepare(with_options(dataset, labels="*.csv"), tmp_path)
