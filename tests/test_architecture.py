"""The house: who may import whom."""

import ast
import importlib

import pytest

import lsag
from tests.conftest import ROOT

# Lower rooms first. A package or file imports only from itself and from levels below its own.
LEVELS = (
    ("errors",),
    ("failpoints", "machine"),
    ("files", "config"),
    ("device", "presets", "plots"),
    ("model", "data", "weights"),
    ("checkpoint", "distributed"),
    ("inference", "convert", "timm_models"),
    ("training", "paper", "runtime", "hub", "report"),
    ("bench",),
    ("lsag_cli",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
FILES = sorted([*ROOT.glob("lsag/**/*.py"), *ROOT.glob("lsag_cli/*.py")])
PUBLIC = {
    "lsag": ("LSAG", "ModelConfig", "Preset", "load", "load_preset", "load_checkpoint"),
    "lsag.convert": ("from_released",),
    "lsag.runtime": ("Session",),
    "lsag.timm_models": ("PRESETS",),
    "lsag.hub": ("Classifier",),
}


def room_of(module):
    """'lsag.training.loop' -> 'training', 'lsag_cli.app' -> 'lsag_cli'; None for what is not ours."""
    package, *rest = module.split(".")
    if package == "lsag_cli":
        return package
    return rest[0] if package == "lsag" and rest and rest[0] in LEVEL else None


def imports(path):
    """Modules that a file imports when it is loaded or later, but not for types alone."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in typing_only and node.module:
            if node.module == "lsag":
                yield from (f"lsag.{alias.name}" for alias in node.names)
            else:
                yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_arrows_point_downward(path):
    own = room_of(module_of(path))
    if own is None:  # lsag/__init__.py hands names on
        return
    for module in imports(path):
        target = room_of(module)
        if target not in (None, own):
            assert LEVEL[target] < LEVEL[own], f"{module_of(path)} imports {module}, which is not below it"


def test_every_file_has_a_room():
    assert {room_of(module_of(path)) for path in FILES} - {None} == set(LEVEL)


def test_there_are_no_circles():
    """Within a package too: each file's imports of ours, followed to the end, never lead back to it."""
    modules = {module_of(path) for path in FILES}
    arrows = {module_of(path): {name for name in imports(path) if name in modules} for path in FILES}
    while leaves := {module for module, targets in arrows.items() if not targets}:
        arrows = {module: targets - leaves for module, targets in arrows.items() if module not in leaves}
    assert not arrows


@pytest.mark.parametrize("path", [path for path in FILES if path.is_relative_to(ROOT / "lsag")], ids=module_of)
def test_the_library_is_silent(path):
    tree = ast.parse(path.read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not [node for node in calls if getattr(node.func, "id", "") == "print"]
    assert not {name.split(".")[0] for name in imports(path)} & {"typer", "rich"}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_there(module):
    for name in PUBLIC[module]:
        assert hasattr(importlib.import_module(module), name)
    assert set(PUBLIC["lsag"]) <= set(dir(lsag))
