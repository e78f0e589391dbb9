"""Labels of one's own as a table: a CSV file with a row an image."""

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.errors import UserError

_SEVERAL = "|"


def table(
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
    gone = [name for name in frame.file if _one(name) not in known]
    if gone and (not skip_bad or len(gone) == len(frame)):
        raise UserError(f"{path} lists {gone[0]}, and there is no such image ({len(images)} images are there).")
    frame = frame[~frame.file.isin(gone)].reset_index(drop=True)
    frame["path"] = _paths(path, frame.file, known)
    said = [[one.strip() for one in value.split(_SEVERAL)] if several else [value] for value in frame[column]]
    named = list(classes) or unlike({name for names in said for name in names if name}, f"The labels of {path}")
    if strange := {name for names in said for name in names if name} - set(named):
        raise UserError(f"{path} has the label '{min(strange)}', and the classes are {', '.join(named)}.")
    if several:
        frame["label"] = [[int(name in names) for name in named] for names in said]
    else:
        if "" in frame[column].values:
            raise UserError(f"{path}: {frame.file[frame[column] == ''].iloc[0]} has no label.")
        frame["label"] = [named.index(names[0]) for names in said]
    if "time" in frame:
        frame["time"] = frame.time.str.removesuffix("Z")
        _check_times(path, frame)
    frame.attrs["classes"] = tuple(named)
    frame.attrs["notes"] = [f"left out: {path} lists {name}, and there is no such image" for name in gone]
    return frame


def unlike(names: Iterable[str], whose: str) -> list[str]:
    """Names of classes in order.

    Raises:
        UserError: two differ in capitals alone, and are surely one.
    """
    found: dict[str, str] = {}
    for name in sorted(names):
        other = found.setdefault(name.casefold(), name)
        if other != name:
            raise UserError(
                f"{whose} have the classes '{other}' and '{name}', which differ in capitals alone. Write them alike, "
                "or, if they are two, list all classes in the options."
            )
    return list(found.values())


def _read(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """The table as text, without blanks at the ends of names and values."""
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False, skipinitialspace=True)
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
    if frame.empty:
        raise UserError(f"{path} has no rows below its columns {', '.join(frame.columns)}.")
    return frame.apply(lambda values: values.fillna("").str.strip())


def _check_times(path: Path, frame: pd.DataFrame) -> None:
    for file, time in zip(frame.file, frame.time, strict=True):
        try:
            np.datetime64(time or "NaT", "s")
        except ValueError:
            raise UserError(
                f"{path}: the time of {file} is '{time}'; write it as 2017-02-16 or 2017-02-16T10:21:01, in UTC."
            ) from None


def _names(path: Path, images: Sequence[Path]) -> dict[str, set[Path]]:
    """Images by what a row may call them: the path, the path below the table's folder, the name or the stem."""
    known: dict[str, set[Path]] = {}
    for image in images:
        below = {str(image.relative_to(path.parent))} if image.is_relative_to(path.parent) else set()
        for key in {str(image), image.name, image.stem, *below}:
            known.setdefault(_one(key), set()).add(image)
    return known


def _one(name: str) -> str:
    """One way to write a name: macOS takes letters and their accents apart, and tables do not."""
    return unicodedata.normalize("NFC", name)


def _paths(path: Path, named: pd.Series, known: dict[str, set[Path]]) -> list[str]:
    """The image of each row."""
    for name in named:
        if len(known[_one(name)]) > 1:
            several = ", ".join(map(str, sorted(known[_one(name)])[:3]))
            raise UserError(f"{path} lists '{name}', and several images have that name: {several}. List their paths.")
    paths = [str(image) for name in named for image in known[_one(name)]]
    twice = pd.Series(paths).duplicated()
    if twice.any():
        raise UserError(f"{path} lists {named[twice.to_numpy()].iloc[0]} twice.")
    return paths
