"""Measure the layout of the source: files, lines, imports, layers, cycles, longest function.

    python -m benchmarks.layout [FOLDER]

Nodes of the import graph are the packages directly under `pipeline/` and its single modules, `cache` and `stages`.
An arrow is an import of one node by another. A node's layer is the length of the longest chain of arrows below it.
"""

import ast
import json
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGES = ("cache", "pipeline", "stages")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def source_files(root: Path) -> list[Path]:
    """Every Python file of the three packages, without benchmarks and tests."""
    return [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]


def module_name(path: Path, root: Path) -> str:
    """`pipeline/data/splits.py` is `pipeline.data.splits`; an `__init__.py` is its package."""
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all imports, also those inside functions; `from a import b` gives `a.b`.

    Imports under `if TYPE_CHECKING:` are for annotations and do not count.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imported_modules(node)


def import_graph(root: Path) -> dict[str, set[str]]:
    """For every node the other nodes that it imports; `pipeline.data.splits` belongs to `pipeline.data`."""
    graph: dict[str, set[str]] = {}
    for path in source_files(root):
        names = [module_name(path, root), *imported_modules(ast.parse(path.read_text()))]
        parts = [name.split(".") for name in names]
        node, *imported = [".".join(part[:2]) if part[0] == "pipeline" else part[0] for part in parts]
        if node != "pipeline":  # the package's own docstring
            below = {name for name in imported if name.split(".")[0] in PACKAGES}
            graph.setdefault(node, set()).update(below - {node, "pipeline"})
    return graph


def circles(root: Path) -> list[str]:
    """The modules of one import cycle between files, empty if there is none."""
    files = {module_name(path, root): path for path in source_files(root)}
    graph = {}
    for module, path in files.items():
        names = set(imported_modules(ast.parse(path.read_text())))
        names |= {name.rpartition(".")[0] for name in names}
        graph[module] = {name for name in names & files.keys() if not f"{module}.".startswith(f"{name}.")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def measure(root: Path) -> dict:
    """All figures of one source tree; 0 layers if the packages import each other in a circle."""
    files, graph, depth = source_files(root), import_graph(root), {}
    functions = [
        (path, node)
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, FUNCTIONS) and node.end_lineno
    ]
    lengths = [
        (node.end_lineno - node.lineno + 1, f"{path.relative_to(root)}:{node.name}") for path, node in functions
    ]
    try:
        for node in TopologicalSorter(graph).static_order():
            depth[node] = 1 + max((depth[below] for below in graph.get(node, ())), default=0)
    except CycleError:
        depth = {"": 0}
    return {
        "files": len(files),
        "lines": sum(len(path.read_text().splitlines()) for path in files),
        "test_lines": sum(len(path.read_text().splitlines()) for path in (root / "tests").rglob("*.py")),
        "nodes": len(graph),
        "arrows": sum(map(len, graph.values())),
        "layers": max(depth.values()),
        "circle": circles(root),
        "longest_function": max(lengths),
        "functions_over_50_lines": sum(length > 50 for length, _ in lengths),
        "imports_inside_functions": sum(
            isinstance(inner, (ast.Import, ast.ImportFrom)) for _, node in functions for inner in ast.walk(node)
        ),
    }


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1] if len(sys.argv) > 1 else ".")), indent=1))
