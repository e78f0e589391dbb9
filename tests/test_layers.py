"""Who may import whom, read from the syntax tree, so that the rooms of the README stay rooms."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [path for room in ("cache", "pipeline", "stages") for path in sorted((ROOT / room).rglob("*.py"))]
# Folders of which no file may import another.
SEPARATE = ("datasets", "backbones", "heads", "students")


def imports(path: Path, top_level: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms(path):
    room, found = path.relative_to(ROOT).parts[0], imports(path)
    roots = {name.split(".")[0] for name in found}
    assert room == "stages" or "stages" not in roots, "nobody imports stages"
    if room == "cache":
        assert not roots & {"pipeline", "stages", "torch", "terratorch", "timm"}
    if room == "pipeline":
        assert "dvc" not in roots


@pytest.mark.parametrize("folder", SEPARATE)
def test_files_of_one_folder_do_not_import_one_another(folder):
    paths = [path for path in FILES if path.parent.name == folder and path.name != "__init__.py"]
    for path in paths:
        for other in {other.stem for other in paths} - {path.stem}:
            assert not any(name.startswith(f"pipeline.{folder}.{other}") for name in imports(path)), (
                path,
                other,
            )


# What rooms of `pipeline` may import, besides its own files and those of no room.
BEFORE = {
    "imagery": set(),
    "datasets": {"imagery"},
    "encoding": set(),
    "backbones": {"encoding"},
    "extraction": {"imagery", "encoding", "backbones"},
    "heads": set(),
    "training": {"imagery", "heads"},
    "composing": {"training", "heads"},
    "students": set(),
    "reporting": {"imagery", "composing"},
}


@pytest.mark.parametrize("room", BEFORE)
def test_rooms_import_what_comes_before_them(room):
    folder = ROOT / "pipeline" / room
    others = {path.name for path in folder.parent.iterdir() if path.is_dir()} - {room, "__pycache__"}
    paths = [path for path in FILES if folder in path.parents]
    assert paths
    for path in paths:
        found = {name.split(".")[1] for name in imports(path) if name.startswith("pipeline.")}
        assert found & others <= BEFORE[room], path


FAMILIES = [path.stem for path in FILES if path.parent.name == "backbones"]
LIGHT = [
    "mapping/make",
    "mapping/sources",
    "mapping/exported",
    "params",
    "bands",
    "imagery/images",
    "archives",
    "hub",
    "encoding/inputs",
    "encoding/pyramid",
]


@pytest.mark.parametrize("name", [*LIGHT, *[f"backbones/{family}" for family in FAMILIES]])
def test_what_a_left_out_cell_needs_does_not_import_torch(name):
    roots = {name.split(".")[0] for name in imports(ROOT / "pipeline" / f"{name}.py", top_level=True)}
    assert not roots & {"torch", "timm", "terratorch", "segmentation_models_pytorch"}
