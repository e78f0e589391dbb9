"""Who may import whom, read from the syntax tree."""

import ast
from pathlib import Path

import pytest

from benchmarks.layout import circles, import_graph, imported_modules, measure, module_name, source_files

ROOT = Path(__file__).parents[1]
FILES = source_files(ROOT)

# From the bottom to the top. A package imports only from layers below; modules of the lowest may import each other.
LAYERS = [
    {"errors", "config", "bands", "tasks", "device", "feature_ops"},
    {"data"},
    {"backbones"},
    {"heads"},
    {"training"},
    {"extraction", "composition", "distillation", "finetuning"},
    {"mapping", "report"},
    {"export"},  # it checks its files with the reader that maps use
    {"cost", "plan"},
]
LAYER_OF = {f"pipeline.{name}": number for number, names in enumerate(LAYERS) for name in names}
# Packages whose modules never import each other, and the modules that they share.
SIBLINGS = {
    "pipeline/data/sources": set(),
    "pipeline/backbones": {"base", "catalog", "preprocessing", "encoder", "checkpoints", "intermediates"},
    "pipeline/heads": {"fusion", "config", "checkpoint", "dense"},
}
# What a skipped cell, a fetch or a map by onnxruntime needs: importing torch would take seconds for nothing.
TORCH_FREE = [
    "pipeline/backbones/__init__.py",
    "pipeline/backbones/base.py",
    "pipeline/backbones/catalog.py",
    "pipeline/bands.py",
    "pipeline/config.py",
    "pipeline/data/download.py",
    "pipeline/data/image_store.py",
    "pipeline/data/splits.py",
    "pipeline/heads/__init__.py",
    "pipeline/mapping/scene.py",
    "pipeline/mapping/predict_scene.py",
    "pipeline/tasks.py",
]
TORCH = {"torch", "timm", "terratorch", "segmentation_models_pytorch", "sam2"}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def local_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_layers_packages_import_only_from_layers_below():
    graph = import_graph(ROOT)
    assert {node for node in graph if node.startswith("pipeline.")} == set(LAYER_OF)
    upward = [
        (node, other)
        for node, below in graph.items()
        for other in below
        if node in LAYER_OF and other in LAYER_OF
        if LAYER_OF[other] > LAYER_OF[node] or LAYER_OF[other] == LAYER_OF[node] > 0
    ]
    assert not upward
    assert not any("stages" in below for below in graph.values())
    assert not graph["cache"]
    assert not graph["pipeline.extraction"] & {"pipeline.heads", "pipeline.training"}


def test_layers_modules_import_in_no_circle():
    assert circles(ROOT) == []


def test_layers_source_files_are_few():
    assert measure(ROOT)["files"] <= 125


def test_layers_only_stages_know_dvc_and_the_cache_knows_no_torch():
    for path in FILES:
        roots = {name.split(".")[0] for name in imported_modules(parse(path))}
        assert "dvc" not in roots or local_name(path).startswith("stages"), path
        assert not (local_name(path).startswith("cache") and roots & TORCH), path


@pytest.mark.parametrize("package", SIBLINGS)
def test_layers_siblings_do_not_import_each_other(package):
    modules = {
        path.stem for path in (ROOT / package).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    separate = modules - SIBLINGS[package] - {"__init__"}
    for path in FILES:
        parts = path.relative_to(ROOT / package).parts if path.is_relative_to(ROOT / package) else ("",)
        own = parts[0].removesuffix(".py")
        if own not in separate:
            continue
        prefix = package.replace("/", ".")
        siblings = {
            name.split(".")[prefix.count(".") + 1]
            for name in imported_modules(parse(path))
            if name.startswith(f"{prefix}.")
        }
        assert not siblings & separate - {own}, path


def test_layers_backbones_define_classes_at_module_level():
    inside = [
        (local_name(path), node.name)
        for path in FILES
        if "backbones" in path.parts
        for function in ast.walk(parse(path))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.ClassDef)
    ]
    assert not inside


def bare_local_imports(path: Path) -> list[int]:
    """Lines of imports inside functions without a comment; one comment serves the imports after it."""
    lines, bare = path.read_text().splitlines(), []
    for function in ast.walk(parse(path)):
        if not isinstance(function, ast.FunctionDef):
            continue
        for block in [node for node in ast.walk(function) if isinstance(getattr(node, "body", None), list)]:
            is_stated = False
            for node in block.body:
                is_import = isinstance(node, (ast.Import, ast.ImportFrom))
                comment = "#" in lines[node.lineno - 1] or lines[node.lineno - 2].strip().startswith("#")
                is_stated = is_import and (is_stated or comment)
                if is_import and not is_stated:
                    bare.append(node.lineno)
    return bare


def test_layers_imports_inside_functions_state_their_reason():
    assert not {local_name(path): lines for path in FILES if (lines := bare_local_imports(path))}


@pytest.mark.parametrize("name", TORCH_FREE)
def test_layers_light_modules_do_not_import_torch(name):
    visited, queue = set(), [ROOT / name]
    files = {module_name(path, ROOT): path for path in FILES}
    while queue:
        path = queue.pop()
        visited.add(path)
        names = set()
        for node in parse(path).body:  # imports at module level only
            names |= (
                set(imported_modules(ast.Module([node], [])))
                if isinstance(node, (ast.Import, ast.ImportFrom))
                else set()
            )
        assert not {module.split(".")[0] for module in names} & TORCH, path
        modules = {module for full in names for module in (full, full.rpartition(".")[0])}
        queue += [files[module] for module in modules if module in files and files[module] not in visited]
