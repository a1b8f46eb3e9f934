"""The five rules of the house (docs/house.md), read off the source with ast."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "tinymodal"
FLOORS = {
    "core": 1, "model": 1, "chat": 2, "compose": 3, "data": 3, "infer": 4, "train": 4, "port": 4, "eval": 5,
    "serve": 5,
    "cli": 7, "demo": 6, "verbs": 6, "__main__": 8, "__init__": 8,
}  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))
LIGHT = (
    "core/config.py",
    "core/errors.py",
    "core/lookup.py",
    "core/types.py",
    "train/recipe.py",
    "compose/spec.py",
    "cli.py",
)
HEAVY = {"torch", "transformers", "numpy", "PIL", "sklearn", "pyarrow"}
MODEL_MAY_IMPORT = {"torch", "transformers", "numpy", "PIL", "tokenizers", "safetensors"} | set(
    sys.stdlib_module_names
)


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def imports(path: Path, *, runtime_only: bool = False, top_only: bool = False) -> list[tuple[str, int]]:
    """Absolute module names that a file imports, with the line; relative ones come out absolute."""
    tree = ast.parse(path.read_text())
    hidden: set[ast.AST] = set()
    for node in ast.walk(tree):
        checks = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        inside = top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if (checks and runtime_only) or inside:
            hidden.update(child for child in ast.walk(node) if child is not node)
    found = []
    package = ("tinymodal", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                start = package[: len(package) - node.level + 1]
                found.append((".".join((*start, *(node.module or "").split("."))).strip("."), node.lineno))
            else:
                found.append((node.module or "", node.lineno))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_only_from_lower_floors_or_its_own_folder(path):
    here = FLOORS[room(path)]
    for name, line in imports(path):
        if not name.startswith("tinymodal.") or name == "tinymodal":
            continue
        there = name.split(".")[1]
        assert there == room(path) or FLOORS[there] < here, (
            f"{path.name}:{line} imports {name} from floor {FLOORS[there]}"
        )


def test_there_is_no_circle_between_files():
    names = {"tinymodal." + ".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in FILES}
    graph = {
        name: {n for n, _ in imports(p, top_only=True, runtime_only=True) if n in names}
        for name, p in names.items()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", sorted((PACKAGE / "model").glob("*.py")), ids=lambda p: p.name)
def test_model_is_self_contained_because_it_travels_with_the_checkpoint(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"{path.name}:{node.lineno} leaves the folder"
            assert "." not in (node.module or ""), f"{path.name}:{node.lineno}: the folder is flat"
    for name, line in imports(path):
        if not name.startswith("tinymodal.model"):
            assert name.split(".")[0] in MODEL_MAY_IMPORT, f"{path.name}:{line} imports {name}"


@pytest.mark.parametrize("name", LIGHT)
def test_words_and_recipes_do_not_load_torch(name):
    for module, line in imports(PACKAGE / name, runtime_only=True, top_only=True):
        assert module.split(".")[0] not in HEAVY, f"{name}:{line} imports {module}"


def test_reading_a_recipe_loads_neither_torch_nor_transformers():
    code = (
        "import sys, tinymodal.train.recipe, tinymodal.core.config, tinymodal.cli; "
        f"print(*(set(sys.modules) & {HEAVY!r}))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert out.stdout.split() == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_import_has_an_effect(path):
    """A module's top level defines things: no bare call, no loop, no assignment into another module."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), (
                f"{path.name}:{node.lineno} runs something when imported"
            )
        if isinstance(node, ast.For | ast.While | ast.With):
            raise AssertionError(f"{path.name}:{node.lineno} runs a loop or a block when imported")
        if isinstance(node, ast.Assign):
            assert all(not isinstance(t, ast.Attribute | ast.Subscript) for t in node.targets), (
                f"{path.name}:{node.lineno}"
            )
        if isinstance(node, ast.If) and "__main__" not in ast.dump(node.test):
            assert "TYPE_CHECKING" in ast.dump(node.test), (
                f"{path.name}:{node.lineno} decides something when imported"
            )


def test_train_knows_neither_eval_nor_infer():
    for path in (PACKAGE / "train").glob("*.py"):
        for name, line in imports(path):
            assert not name.startswith(("tinymodal.eval", "tinymodal.infer")), (
                f"{path.name}:{line} imports {name}"
            )


def test_there_is_no_drawer():
    forbidden = ("util", "helper", "manager", "handler", "common", "misc", "constants", "factory")
    for path in FILES:
        assert not any(word in path.stem for word in forbidden), path.name
