"""The house: which folder may import which, what may be imported where, and how large a file is.

Modules are parsed and never imported, so that a wall holds whatever a machine has
installed, and an import inside a function counts as one at the top.
"""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1] / "xr_aimz"
GROUND = {"errors", "options", "provenance"}

# What each folder imports besides the ground; docs/architecture.md draws it.
IMPORTS = {
    "storage": set(),
    "random": set(),
    "tracing": {"storage"},
    "binding": {"tracing"},
    "kernel": {"random", "tracing", "binding"},
    "inference": {"storage", "random", "tracing", "binding"},
    "fits": {"storage", "random", "tracing", "binding", "kernel", "inference"},
    "prediction": {"storage", "random", "tracing", "binding", "kernel", "fits"},
    "mlflow": {"storage", "binding", "fits", "prediction"},
}
# The files beside the folders: of the ground, and those that import lazily or are imported last.
FILES = GROUND | {"__init__", "accessor", "demo"}

# Folders and modules in which alone a package may be imported.
HOMES = {
    "dask": {"prediction.graph", "storage", "inference.minibatch_data"},
    # A posterior larger than memory goes to disk as it is made; a served fit is a zip of a store.
    "zarr": {"storage", "inference.per_cell_store", "mlflow.loading"},
    "mlflow": {"mlflow"},
    "matplotlib": {"mlflow.artifacts", "demo"},
    "distributed": set(),
    "scipy": {"fits.diagnostics"},
    "cloudpickle": {"fits.posterior"},
    "importlib": {"__init__", "fits.configuration", "mlflow.artifacts", "options", "provenance"},
    "jax.extend": {
        "random",
        "tracing",
        "kernel.compile",
        "kernel.coupling",
        "prediction.recursion",
    },
}
# What folders and modules must not import.
WALLS = {
    "jax": {"errors", "options", "provenance", "accessor", "__init__", "storage", "random.labels"},
    "numpyro": {"errors", "options", "provenance", "accessor", "__init__", "storage", "binding"},
    "xarray": {
        "random",
        "tracing",
        "kernel.spec",
        "kernel.program",
        "kernel.handlers",
        "kernel.scenarios",
        "kernel.compile",
    },
    "pandas": {
        "random.keys",
        "random.cellwise",
        "random.cells",
        "random.coefficients",
        "random.distributions",
        "random.inversion",
        "random.quantiles",
        "tracing",
        "kernel.spec",
        "kernel.program",
        "kernel.handlers",
        "kernel.scenarios",
        "kernel.compile",
    },
}
NO_DEVICE = ("binding", "fits.posterior", "prediction.effects")
DEVICES = {"devices", "local_devices", "device_count", "local_device_count", "device_put"}
CODE_LINES_A_FILE = 350
LINES_A_FUNCTION = 40


def name_of(path):
    return ".".join(path.relative_to(HOUSE).with_suffix("").parts)


SOURCES = {name_of(path): path for path in sorted(HOUSE.rglob("*.py"))}
TREES = {module: ast.parse(path.read_text("utf8")) for module, path in SOURCES.items()}
DOORS = sorted(module for module in TREES if module.endswith(".__init__"))

each_module = pytest.mark.parametrize("module", sorted(TREES))


def folder_of(module):
    return module.partition(".")[0] if "." in module else ""


def lies_in(module, place):
    return module == place or module.startswith(f"{place}.")


def imports_of(module):
    """Pairs of a module's dotted name and the name that is taken from it, wherever that is."""
    package = ["xr_aimz", *module.split(".")[:-1]]
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            yield from ((source, alias.name) for alias in node.names)


def own_imports(module):
    """Of the package's own: the place that is imported, and the name taken from it."""
    for source, name in imports_of(module):
        if source == "xr_aimz" or source.startswith("xr_aimz."):
            place = source.partition(".")[2]
            if name and ".".join(filter(None, [place, name])) in {*TREES, *IMPORTS}:
                place, name = ".".join(filter(None, [place, name])), ""
            yield place, name


def functions(module):
    for node in ast.walk(TREES[module]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def lines_of(function):
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


def test_every_module_has_its_folder():
    assert {folder_of(module) for module in TREES} - {""} == set(IMPORTS)
    assert {module for module in TREES if "." not in module} == FILES


def test_folders_stand_on_each_other():
    list(TopologicalSorter(IMPORTS).static_order())


def test_the_page_on_the_architecture_has_this_table():
    page = (HOUSE.parent / "docs/architecture.md").read_text("utf8")
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in page.partition("| imports |")[2].partition("\n\n")[0].splitlines()
        if line.startswith("|")
    ]
    columns = ["storage", "random", "tracing", "binding", "kernel"]
    columns += ["inference", "fits", "prediction"]
    table = {
        folder: {c for c, mark in zip(columns, marks, strict=True) if mark}
        for folder, *marks in rows[1:]
    }
    assert {f: table.get(f, set()) for f in IMPORTS} == IMPORTS


@each_module
def test_a_module_imports_what_its_folder_may(module):
    folder = folder_of(module)
    if module in {"__init__", "accessor", "demo"}:
        return
    allowed = GROUND | IMPORTS.get(folder, set()) | {folder}
    strange = {place for place, _ in own_imports(module)}
    strange = {place for place in strange if place.partition(".")[0] not in allowed}
    if not folder:
        strange = {place for place, _ in own_imports(module)} - GROUND
    assert not strange, f"{module} imports {sorted(strange)}; see the table in this file"


@each_module
def test_another_folder_is_entered_by_its_door(module):
    inside = {
        place
        for place, _ in own_imports(module)
        if "." in place and folder_of(place) != folder_of(module)
    }
    assert not inside, f"{module} imports {sorted(inside)}, and not from the folder"


@each_module
def test_private_names_stay_in_their_module(module):
    taken = {name for _, name in own_imports(module) if name.startswith("_")}
    assert not taken - {"__version__"}


@pytest.mark.parametrize("folder", sorted(IMPORTS))
def test_no_cycles_in_a_folder(folder):
    graph = {
        module: {place for place, _ in own_imports(module) if folder_of(place) == folder}
        for module in TREES
        if folder_of(module) == folder and module not in DOORS
    }
    # An import within a function may go back: none does, but for one that is wanted late.
    graph["fits.posterior"] = graph.get("fits.posterior", set()) - {"fits.saving"}
    list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("door", DOORS)
def test_a_door_holds_imports_and_one_paragraph(door):
    docstring, *rest = TREES[door].body
    assert isinstance(docstring, ast.Expr)
    assert len(ast.get_docstring(TREES[door]).splitlines()) <= 8
    if door != "mlflow.__init__":
        # The extra has to be asked for before anything of it is imported.
        *imports, listed = rest
        assert all(isinstance(node, ast.ImportFrom) for node in imports)
        assert listed.targets[0].id == "__all__"


@pytest.mark.parametrize("door", [d for d in DOORS if d != "mlflow.__init__"])
def test_a_door_has_only_what_is_taken_through_it(door):
    folder = folder_of(door)
    offered = {name for _, name in own_imports(door)}
    taken = {
        name
        for module in TREES
        if folder_of(module) != folder
        for place, name in own_imports(module)
        if place == folder
    }
    assert taken == offered


@pytest.mark.parametrize("package", sorted(HOMES))
def test_a_package_is_imported_only_in_its_home(package):
    importers = {
        module
        for module in TREES
        for source, _ in imports_of(module)
        if lies_in(source, package) and not lies_in(source, "xr_aimz")
    }
    strangers = {m for m in importers if not any(lies_in(m, home) for home in HOMES[package])}
    assert not strangers, f"{package} belongs in {sorted(HOMES[package])}"


@pytest.mark.parametrize(
    ("package", "place"), [(p, at) for p, places in WALLS.items() for at in sorted(places)]
)
def test_a_wall_keeps_a_package_out(package, place):
    through = {
        module
        for module in TREES
        if lies_in(module, place)
        for source, _ in imports_of(module)
        if lies_in(source, package)
    }
    # The lock under which JAX's dtypes are asked for is no part of any model.
    assert not through


@pytest.mark.parametrize("place", NO_DEVICE)
def test_names_and_draws_never_see_a_device(place):
    for module in (m for m in TREES if lies_in(m, place)):
        nodes = list(ast.walk(TREES[module]))
        named = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        named |= {node.id for node in nodes if isinstance(node, ast.Name)}
        assert not named & DEVICES


def lines_of_code(module):
    """The lines of a module that are neither blank nor comment nor docstring."""
    text = SOURCES[module].read_text("utf8")
    documented = set()
    for node in ast.walk(TREES[module]):
        holder = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if holder and ast.get_docstring(node) is not None:
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in documented
        for number, line in enumerate(text.splitlines(), 1)
    )


@each_module
def test_a_module_is_small(module):
    lines = lines_of_code(module)
    assert lines <= CODE_LINES_A_FILE, f"{module} has {lines} lines of code: a second idea?"


@pytest.mark.parametrize("module", sorted(set(TREES) - {"accessor"}))
def test_functions_are_short(module):
    # A method of the accessor is a signature and a call, each with all of the parameters.
    long = {f.name: lines_of(f) for f in functions(module) if lines_of(f) > LINES_A_FUNCTION}
    assert not long, f"functions of {module} over {LINES_A_FUNCTION} lines: {long}"


@each_module
def test_a_module_says_what_it_is_for(module):
    assert not set(module.split(".")) & {"utils", "util", "helpers", "core", "misc", "common"}
    assert ast.get_docstring(TREES[module])


def test_no_module_is_named_like_a_public_function():
    [listed] = [
        ast.literal_eval(node.value)
        for node in TREES["__init__"].body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
    ]
    public = set(listed) - {"errors"}
    assert not public & {part for module in TREES for part in module.split(".")}


@pytest.mark.parametrize(
    "name",
    ["_of_block", "_check_event", "_check_start", "_check_whole", "_check_nothing_missing"],
)
def test_a_function_in_a_graph_has_a_name_of_its_own(name):
    # In names of graphs it goes by that alone: see storage/canonical.py.
    places = [
        module
        for module, tree in TREES.items()
        if folder_of(module) == "prediction"
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    assert len(places) == 1


def pieces_of(module):
    """Six lines of code after each other, less what is blank or a comment, with their place."""
    tree = TREES[module]
    left_out = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            left_out |= set(range(node.lineno, node.end_lineno + 1))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            if ast.get_docstring(node) is not None:
                left_out |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
            if isinstance(node, ast.FunctionDef):
                left_out |= set(range(node.lineno, node.body[0].lineno))
    lines = [
        (number, line.strip())
        for number, line in enumerate(SOURCES[module].read_text("utf8").splitlines(), 1)
        if line.strip() and not line.strip().startswith("#") and number not in left_out
        # An argument that is passed on is a part of a signature.
        if not re.fullmatch(r"(\w+)=\1,", line.strip())
    ]
    for at in range(len(lines) - 5):
        yield tuple(line for _, line in lines[at : at + 6]), (module, lines[at][0])


def test_nothing_is_written_twice():
    places = defaultdict(list)
    for module in TREES:
        for piece, place in pieces_of(module):
            places[piece].append(place)
    assert not [found for found in places.values() if len(found) > 1]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from xr_aimz.random import sample", {("random", "sample")}),
        ("from xr_aimz import errors, set_options", {("errors", ""), ("", "set_options")}),
        ("from xr_aimz.inference import mcmc", {("inference.mcmc", "")}),
        ("from xr_aimz.inference.problem import D", {("inference.problem", "D")}),
        ("import xr_aimz", {("", "")}),
        ("import xr_aimz.kernel.compile as d", {("kernel.compile", "")}),
        ("from . import kernel", {("kernel", "")}),
        ("from .storage import to_zarr", {("storage", "to_zarr")}),
        ("def f():\n    from xr_aimz.storage import to_zarr", {("storage", "to_zarr")}),
        ("if TYPE_CHECKING:\n    from xr_aimz.fits import fit", {("fits", "fit")}),
        ("import jax.numpy as jnp", set()),
    ],
)
def test_imports_are_seen_however_they_are_spelled(monkeypatch, source, expected):
    # A wall that overlooks a spelling is no wall.
    monkeypatch.setitem(TREES, "newcomer", ast.parse(source))
    assert set(own_imports("newcomer")) == expected


def test_lines_of_a_function_leave_out_its_docstring():
    function = ast.parse(
        'def f(\n    x,\n):\n    """One\n\n    two.\n    """\n    return x\n'
    ).body[0]
    assert lines_of(function) == 4


def imported_by(statement):
    """Names of all modules that a fresh interpreter holds after a statement."""
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}\nimport sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_importing_the_package_imports_nothing_heavy():
    # How long it takes over xarray is measured in tests/benchmarks.
    there = imported_by("import xr_aimz; import xarray; assert hasattr(xarray.Dataset, 'aimz')")
    heavy = {"jax", "jaxlib", "numpyro", "mlflow", "distributed", "dask.distributed"}
    assert "xr_aimz" in there
    assert not there & heavy


def test_storage_needs_no_jax():
    there = imported_by("import xr_aimz; xr_aimz.to_zarr, xr_aimz.open_zarr")
    assert "xr_aimz.storage.results" in there
    assert not there & {"jax", "jaxlib", "numpyro"}


def test_public_names_bring_what_they_need():
    statement = "import xr_aimz\nfor name in xr_aimz.__all__: getattr(xr_aimz, name)"
    there = imported_by(statement)
    assert {"jax", "numpyro"} <= there
    # Half a second, for a client that nobody has asked for.
    assert "distributed" not in there
