"""Labels in a CSV file, one row per image."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from pipeline.data.image_store import parse_timestamp
from pipeline.data.sources.custom.options import normalize_unicode, unique_class_names
from pipeline.errors import UserError

LABEL_SEPARATOR = "|"


def read_table(
    path: Path,
    images: Sequence[Path],
    columns: Sequence[str],
    classes: Sequence[str],
    is_multilabel: bool,
    skip_bad: bool = False,
) -> pd.DataFrame:
    """Read a CSV file with the columns `file` and the label's, and, optionally, `split` and `time`.

    Args:
        images: all image files.
        columns: required columns; the first is `file`, the second that of the labels.
        classes: names of the classes; empty for those of the file.
        is_multilabel: labels are class names joined by `|`.
        skip_bad: skip rows without an image or a label.

    Returns:
        A row per image with path, label (class index, or list of zeros and ones), split and time. `attrs` has the
        classes, and notes on skipped rows.

    Raises:
        UserError: a column, file, time or class is missing or unknown, or a file is listed twice.
    """
    frame, column = _read_csv(path, columns), columns[1]
    images_by_name = _images_by_name(path, images)
    missing = [name for name in frame.file if _file_key(name) not in images_by_name]
    if missing and (not skip_bad or len(missing) == len(frame)):
        raise UserError(
            f"{path} lists '{missing[0]}', and there is no such image. There are {len(images)} images, such as "
            f"{images[0].name}.",
            key="file", value=missing[0], path=path,
        )  # fmt: skip
    notes = [f"skipped: {path} lists {name}, and there is no such image" for name in missing]
    is_empty = (frame[column] == "") & ~frame.file.isin(missing)
    unlabelled = [] if is_multilabel else frame.file[is_empty].tolist()
    if unlabelled and not skip_bad:
        raise UserError(f"{path}: {unlabelled[0]} has no label.", key=column, value=unlabelled[0], path=path)
    notes += [f"skipped: {path} has no label for {name}" for name in unlabelled]
    frame = frame[~frame.file.isin([*missing, *unlabelled])].reset_index(drop=True)
    if frame.empty:
        raise UserError(f"{path} has no row with an image and a label; {notes[0]}.", key=column, path=path)
    frame["path"] = _image_paths(path, frame.file, images_by_name)
    class_names = _add_labels(frame, path, column, classes, is_multilabel)
    if "time" in frame:
        for file, time in zip(frame.file, frame.time, strict=True):
            parse_timestamp(time, f"{path}: the time of {file}")
    frame.attrs["classes"] = tuple(class_names)
    frame.attrs["notes"] = notes
    return frame


def _add_labels(
    frame: pd.DataFrame, path: Path, column: str, classes: Sequence[str], is_multilabel: bool
) -> list[str]:
    """Add the column `label` and return the names of the classes."""
    labels = [
        [normalize_unicode(name) for name in (value.split(LABEL_SEPARATOR) if is_multilabel else [value])]
        for value in frame[column]
    ]
    used = {name for names in labels for name in names if name}
    class_names = [normalize_unicode(name) for name in classes] or unique_class_names(used, f"The labels of {path}")
    if unknown := used - set(class_names):
        raise UserError(
            f"{path} has the label '{min(unknown)}', and the classes are {', '.join(class_names)}.",
            key=column, value=min(unknown), allowed=class_names, path=path,
        )  # fmt: skip
    if is_multilabel:
        frame["label"] = [[int(name in names) for name in class_names] for names in labels]
    else:
        frame["label"] = [class_names.index(names[0]) for names in labels]
    return class_names


def _read_csv(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read the table as text, without blanks around names and values."""
    try:
        with warnings.catch_warnings():
            # pandas truncates rows that are all longer than the header, with a warning only.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False, skipinitialspace=True)
            # The header as written: pandas renames the second of two equal columns.
            header = pd.read_csv(path, dtype=str, header=None, nrows=1).iloc[0].astype(str).str.strip().tolist()
    except pd.errors.ParserWarning:
        raise UserError(
            f"{path} has rows with more values than columns. Join several labels of an image by {LABEL_SEPARATOR}.",
            path=path,
        ) from None
    except ValueError as error:  # also a parser error of pandas, or text that is not UTF-8
        raise UserError(
            f"{path} cannot be read as a table: {' '.join(str(error).split())}. Save it as CSV, in UTF-8.", path=path
        ) from None
    frame.columns = [str(name).strip() for name in frame.columns]
    for name in columns:
        if name not in frame:
            raise UserError(
                f"{path} has no column '{name}'. It has: {', '.join(frame.columns)}. It needs {', '.join(columns)}, "
                "separated by commas; label_column in params.yaml names the column of the labels.",
                key=name, allowed=frame.columns, path=path,
            )  # fmt: skip
        if header.count(name) > 1:
            raise UserError(f"{path} has two columns '{name}'. Remove one.", key=name, path=path)
    frame = frame.apply(lambda values: values.fillna("").str.strip())
    frame = frame[(frame != "").any(axis=1)].reset_index(drop=True)
    if frame.empty:
        raise UserError(f"{path} has no rows below its columns {', '.join(frame.columns)}.", path=path)
    return frame


def _file_key(name: str) -> str:
    """Write a file's name or path in one form."""
    return normalize_unicode(name).replace("\\", "/").removeprefix("./")


def _images_by_name(path: Path, images: Sequence[Path]) -> dict[str, set[Path]]:
    """Images by the names that a row may use: path, path relative to the table, file name, or stem."""
    by_name: dict[str, set[Path]] = {}
    for image in images:
        relative = {str(image.relative_to(path.parent))} if image.is_relative_to(path.parent) else set()
        for name in {str(image), image.name, image.stem, *relative}:
            by_name.setdefault(_file_key(name), set()).add(image)
    return by_name


def _image_paths(path: Path, names: pd.Series, images_by_name: dict[str, set[Path]]) -> list[str]:
    """Return the image of each row."""
    for name in names:
        matches = images_by_name[_file_key(name)]
        if len(matches) > 1:
            examples = ", ".join(map(str, sorted(matches)[:3]))
            raise UserError(
                f"{path} lists '{name}', and several images have that name: {examples}. List their paths.",
                key="file", value=name, allowed=sorted(map(str, matches)), path=path,
            )  # fmt: skip
    paths = [str(image) for name in names for image in images_by_name[_file_key(name)]]
    is_repeated = pd.Series(paths).duplicated()
    if is_repeated.any():
        name = names[is_repeated.to_numpy()].iloc[0]
        raise UserError(f"{path} lists {name} twice.", key="file", value=name, path=path)
    return paths
