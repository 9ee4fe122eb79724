"""The house: who may import whom."""

import ast

import pytest

from tests.conftest import ROOT

# Lower rooms first; a module imports only from its own level or below.
LEVELS = [
    {"lsag.errors", "lsag.failpoints", "lsag.onednn"},
    {"lsag.config", "lsag.files", "lsag.signals", "lsag.device", "lsag.gpu", "lsag.paper"},
    {"lsag.model", "lsag.sources", "lsag.optim", "lsag.flops", "lsag.launch", "lsag.reproduce"},
    {"lsag.networks", "lsag.timm_models"},
    {"lsag.data", "lsag.checkpoint", "lsag.distributed", "lsag.progress", "lsag.plain"},
    {"lsag.state", "lsag.runtime", "lsag.plots", "lsag.convert", "lsag.run_folder", "lsag.doctor", "lsag.hub"},
    {"lsag.evaluate", "lsag.export", "lsag.explain"},
    {"lsag.train", "lsag.bench", "lsag.predict"},
    {"lsag_cli"},
]
LEVEL = {module: level for level, modules in enumerate(LEVELS) for module in modules}
FILES = sorted([*ROOT.glob("lsag/*.py"), *ROOT.glob("lsag_cli/*.py")])


def module_of(path):
    return "lsag_cli" if path.parent.name == "lsag_cli" else f"lsag.{path.stem}"


def imports(path):
    """Modules of ours that a file imports when it is loaded or later, but not for types alone."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in typing_only and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in LEVEL else node.module for name in names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_arrows_point_downward(path):
    if path.name == "__init__.py":
        return
    level = LEVEL[module_of(path)]
    for name in imports(path):
        target = "lsag_cli" if name.startswith("lsag_cli") else name
        if target in LEVEL:
            assert LEVEL[target] <= level, f"{path.name} imports {name}, which is above it"


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name == "lsag"], ids=lambda path: path.name)
def test_the_library_is_silent(path):
    tree = ast.parse(path.read_text())
    assert not [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    ]
    assert not {name.split(".")[0] for name in imports(path)} & {"typer", "rich"}
