"""Imports go down the floors, never in circles, and no command imports another."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("scripts", "models", "jaxkv", "pallas_kernels")  # each may import itself and those below
RUNS = "run_command(main, Args)"  # the last line of a command


def find_modules(root: Path) -> dict[str, Path]:
    """Files by dotted name; a package goes by its own name, not `__init__`."""
    modules = {}
    for floor in FLOORS:
        for path in sorted((root / floor).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            modules[".".join(parts)] = path
    return modules


def imports_of(name: str, path: Path, modules) -> set[str]:
    """Modules of ours that a file names anywhere: in functions and under TYPE_CHECKING, too.

    `from package import name` means the module of that name if there is one, else the package.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {_known(alias.name, modules) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [base])])
            found |= {_known(f"{base}.{alias.name}", modules) for alias in node.names}
    return found - {None, name}


def _known(name: str, modules) -> str | None:
    """The module, or the nearest package above it, that is ours."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def upward(imports: dict[str, set[str]]) -> list[str]:
    """Imports of a floor above one's own."""
    floor = lambda name: FLOORS.index(name.split(".")[0])
    return [f"{a} imports {b}" for a in imports for b in imports[a] if floor(b) < floor(a)]


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules of a circle, in order; empty if there is none."""
    done = set()

    def search(name, way):
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in sorted(imports[name]):
            if found := search(other, [*way, name]):
                return found
        done.add(name)
        return []

    return next(filter(None, (search(name, []) for name in sorted(imports))), [])


def commands_imported(imports: dict[str, set[str]], modules) -> list[str]:
    """Imports of a command by any file."""
    commands = {name for name, path in modules.items() if RUNS in path.read_text()}
    return [f"{a} imports {b}" for a in imports for b in imports[a] if b in commands]


@pytest.fixture(scope="module")
def modules():
    return find_modules(ROOT)


@pytest.fixture(scope="module")
def imports(modules):
    return {name: imports_of(name, path, modules) for name, path in modules.items()}


def test_imports_go_down(imports):
    assert sorted(upward(imports)) == []


def test_modules_import_each_other_in_no_circle(imports):
    assert " -> ".join(circle(imports)) == ""


def test_no_command_is_imported(imports, modules):
    assert sorted(commands_imported(imports, modules)) == []


def test_each_floor_has_modules_that_import_lower_ones(imports):
    """The reading itself: it finds imports between the floors that there must be."""
    for upper, lower in zip(FLOORS, FLOORS[1:], strict=False):
        names = [name for name in imports if name.split(".")[0] == upper]
        assert any(b.split(".")[0] == lower for a in names for b in imports[a]), upper


@pytest.fixture
def tree(tmp_path):
    """Writes files of a small tree and reads its imports."""

    def make(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        found = find_modules(tmp_path)
        return found, {name: imports_of(name, path, found) for name, path in found.items()}

    return make


def test_an_upward_import_is_found_under_type_checking(tree):
    text = "if TYPE_CHECKING:\n    from jaxkv.codecs import PageLayout\n"
    _, imports = tree({"jaxkv/codecs/__init__.py": "", "pallas_kernels/pages.py": text})
    assert upward(imports) == ["pallas_kernels.pages imports jaxkv.codecs"]
    assert circle(imports) == []


def test_a_circle_through_a_function_and_a_relative_import_is_found(tree):
    files = {
        "models/__init__.py": "from models.a import load\n",
        "models/a.py": "def load():\n    from .b import x\n",
        "models/b.py": "import models.c\n",
        "models/c.py": "from models import a\n",
        "models/d.py": "from models import e\n",
        "models/e.py": "",
    }
    _, imports = tree(files)
    assert circle(imports) == ["models.a", "models.b", "models.c", "models.a"]
    assert imports["models.d"] == {"models.e"} and imports["models"] == {"models.a"}


def test_an_import_of_a_command_is_found(tree):
    command = f"from scripts.shared import tables\n{RUNS}\n"
    modules, imports = tree(
        {
            "scripts/plan.py": command,
            "scripts/shared/tables.py": "",
            "scripts/generate.py": "from scripts.plan import spec\n" + command,
        }
    )
    assert commands_imported(imports, modules) == ["scripts.generate imports scripts.plan"]
