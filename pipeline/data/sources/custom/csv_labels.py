"""Labels of one's own as a table: a CSV file with a row an image."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from pipeline.data.image_store import parse_timestamp
from pipeline.data.sources.custom.names import normalize_unicode, unique_class_names
from pipeline.errors import UserError

_SEVERAL = "|"


def read_table(
    path: Path,
    images: Sequence[Path],
    columns: Sequence[str],
    classes: Sequence[str],
    several: bool,
    skip_bad: bool = False,
) -> pd.DataFrame:
    """A CSV with one row an image: columns `file`, the label's, and, if they are there, `split` and `time`.

    Args:
        columns: that it must have; the second is the labels'.
        several: labels are class names joined by `|`.
        skip_bad: leave out rows of images that are not there.

    Returns:
        path, label (index, or list of zeros and ones), split and time, a row an image; the classes and notes on rows
        that are left out are in `attrs`.

    Raises:
        UserError: a column, file, time or class that is not there, or a file listed twice.
    """
    frame, column = _read(path, columns), columns[1]
    known = _names(path, images)
    gone = [name for name in frame.file if _key(name) not in known]
    if gone and (not skip_bad or len(gone) == len(frame)):
        raise UserError(
            f"{path} lists '{gone[0]}', and there is no such image. {len(images)} are there, such as "
            f"{images[0].name}."
        )
    notes = [f"left out: {path} lists {name}, and there is no such image" for name in gone]
    unlabelled = frame.file[(frame[column] == "") & ~frame.file.isin(gone)].tolist() if not several else []
    if unlabelled and not skip_bad:
        raise UserError(f"{path}: {unlabelled[0]} has no label.")
    notes += [f"left out: {path} has no label for {name}" for name in unlabelled]
    frame = frame[~frame.file.isin([*gone, *unlabelled])].reset_index(drop=True)
    if frame.empty:
        raise UserError(f"{path} has no row with an image and a label; {notes[0]}.")
    frame["path"] = _paths(path, frame.file, known)
    said = [[normalize_unicode(one) for one in (value.split(_SEVERAL) if several else [value])] for value in frame[column]]
    used = {name for names in said for name in names if name}
    named = [normalize_unicode(name) for name in classes] or unique_class_names(used, f"The labels of {path}")
    if strange := used - set(named):
        raise UserError(f"{path} has the label '{min(strange)}', and the classes are {', '.join(named)}.")
    if several:
        frame["label"] = [[int(name in names) for name in named] for names in said]
    else:
        frame["label"] = [named.index(names[0]) for names in said]
    if "time" in frame:
        for file, time in zip(frame.file, frame.time, strict=True):
            parse_timestamp(time, f"{path}: the time of {file}")
    frame.attrs["classes"] = tuple(named)
    frame.attrs["notes"] = notes
    return frame


def _key(name: str) -> str:
    """One way to write a file's name or path."""
    return normalize_unicode(name).replace("\\", "/").removeprefix("./")


def _read(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """The table as text, without blanks at the ends of names and values."""
    try:
        with warnings.catch_warnings():
            # Of rows that are all longer than the columns pandas would cut the rest off.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False, skipinitialspace=True)
            # As it is written: of two columns of a name pandas calls one otherwise.
            header = pd.read_csv(path, dtype=str, header=None, nrows=1).iloc[0].astype(str).str.strip().tolist()
    except pd.errors.ParserWarning:
        raise UserError(
            f"{path} has rows with more values than columns. Several labels of an image are joined by {_SEVERAL}."
        ) from None
    except ValueError as error:  # also of pandas' parser, and of text that is not UTF-8
        raise UserError(
            f"{path} cannot be read as a table: {' '.join(str(error).split())}. Save it as CSV, in UTF-8."
        ) from None
    frame.columns = [str(name).strip() for name in frame.columns]
    for name in columns:
        if name not in frame:
            raise UserError(
                f"{path} has no column '{name}'. It has: {', '.join(frame.columns)}. It needs {', '.join(columns)}, "
                "with commas between them; label_column in params.yaml names the labels'."
            )
        if header.count(name) > 1:
            raise UserError(f"{path} has two columns '{name}'.")
    frame = frame.apply(lambda values: values.fillna("").str.strip())
    frame = frame[(frame != "").any(axis=1)].reset_index(drop=True)
    if frame.empty:
        raise UserError(f"{path} has no rows below its columns {', '.join(frame.columns)}.")
    return frame


def _names(path: Path, images: Sequence[Path]) -> dict[str, set[Path]]:
    """Images by what a row may call them: the path, the path below the table's folder, the name or the stem."""
    known: dict[str, set[Path]] = {}
    for image in images:
        below = {str(image.relative_to(path.parent))} if image.is_relative_to(path.parent) else set()
        for key in {str(image), image.name, image.stem, *below}:
            known.setdefault(_key(key), set()).add(image)
    return known


def _paths(path: Path, named: pd.Series, known: dict[str, set[Path]]) -> list[str]:
    """The image of each row."""
    for name in named:
        if len(known[_key(name)]) > 1:
            several = ", ".join(map(str, sorted(known[_key(name)])[:3]))
            raise UserError(f"{path} lists '{name}', and several images have that name: {several}. List their paths.")
    paths = [str(image) for name in named for image in known[_key(name)]]
    twice = pd.Series(paths).duplicated()
    if twice.any():
        raise UserError(f"{path} lists {named[twice.to_numpy()].iloc[0]} twice.")
    return paths
