"""Names and prose follow the words of the field; the lists of what is not allowed are here."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "cache", "stages", "benchmarks", "tests")
TREES = {path: ast.parse(path.read_text()) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}

# Pronouns, prepositions and bare participles: they carry no type and mean something else in every file.
VAGUE_NAMES = {
    "one", "some", "each", "others", "more", "there", "where", "here", "by", "about", "made", "said", "told", "given",
    "wanted", "found", "known", "kept", "held", "taken", "gone", "turned", "asked", "mine", "rest", "seen", "eats",
    "ours", "theirs", "beside", "thing", "things", "stuff", "lacking", "strange", "odd", "wanting", "begun",
}  # fmt: skip

# Words of a private dialect, in docstrings, comments and messages.
DIALECT = [
    r"\beats?\b", r"\btold\b", r"\bforetells?\b", r"\bno numbers?\b", r"\blaid down\b", r"\bgo(es|ne)? on with\b",
    r"\btaken back\b", r"\bput right\b", r"\bby turns\b", r"\bdealt\b", r"\bside by side\b", r"\bstand-ins?\b",
    r"\bfresh eyes\b", r"\bin hand\b", r"\blabels alone\b", r"\bsmall kin\b", r"\bin words\b", r"\bat hand\b",
    r"\bnarrowed\b", r"\bleft out\b", r"\bwhat is asked\b", r"\bhow wrong\b", r"\bsays? of\b", r"\bverbs?\b(?= of)",
]  # fmt: skip


def bound_names(tree: ast.Module) -> list[tuple[int, str]]:
    """Line and name of every variable, parameter, attribute, function and class that the code binds."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            names.append((node.lineno, node.id if isinstance(node, ast.Name) else node.attr))
        elif isinstance(node, ast.arg):
            names.append((node.lineno, node.arg))
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.append((node.lineno, node.name))
        elif isinstance(node, ast.alias) and node.asname:
            names.append((node.lineno, node.asname))
    return names


def prose(path: Path) -> list[tuple[int, str]]:
    """Line and text of every docstring, message and comment."""
    strings = [
        (node.lineno, node.value)
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value
    ]
    lines = enumerate(path.read_text().splitlines(), 1)
    comments = [(number, match[1]) for number, line in lines if (match := re.search(r"# (.*)", line))]
    return strings + comments


def place(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def test_names_are_nouns_or_verbs_of_the_field():
    vague = [
        (place(path, line), name)
        for path, tree in TREES.items()
        for line, name in bound_names(tree)
        if name.strip("_") in VAGUE_NAMES
    ]
    assert not vague


def test_prose_has_no_private_words():
    dialect = [
        (place(path, line), match[0])
        for path in TREES
        if path != Path(__file__)
        for line, text in prose(path)
        for word in DIALECT
        if (match := re.search(word, text))
    ]
    assert not dialect


def test_no_public_class_name_occurs_twice():
    classes: dict[str, list[str]] = {}
    for path, tree in TREES.items():
        if not path.is_relative_to(ROOT / "tests"):
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    classes.setdefault(node.name, []).append(place(path, node.lineno))
    assert not {name: places for name, places in classes.items() if len(places) > 1}


def test_first_line_of_a_docstring_is_short():
    long = [
        (place(path, getattr(node, "lineno", 1)), first_line)
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module))
        if len(first_line := (ast.get_docstring(node) or "").split("\n")[0]) > 100
    ]
    assert not long


def test_errors_are_tested_by_values_not_by_prose():
    """`match=` may hold a name, a number or a pattern, but no words of a sentence."""
    phrases = [
        (place(path, node.lineno), keyword.value.value)
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "match" and isinstance(keyword.value, ast.Constant) and " " in str(keyword.value.value)
    ]
    assert not phrases
