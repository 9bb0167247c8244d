"""The shape of the package: who may import whom, and what may be imported where.

Modules are parsed and never imported, so that a wall holds whatever a machine has
installed, and an import inside a function counts as one at the top.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1] / "xr_aimz"

# From the ground up: a room imports only from rooms above it here.
ROOMS = (
    "errors",
    "spelling",
    "whole_numbers",
    "options",
    "listing",
    "origins",
    "words",
    "identity",
    "defaults",
    "labels",
    "threefry",
    "cellwise",
    "keys",
    "dataflow",
    "fingerprint",
    "axis_rules",
    "index_rules",
    "independence",
    "index_bounds",
    "scans",
    "model",
    "plates",
    "binding",
    "inputs",
    "requirements",
    "casting",
    "memory",
    "axes",
    "blanks",
    "missing",
    "written",
    "differing",
    "worlds",
    "mapped",
    "kernel",
    "device",
    "concrete",
    "outside_support",
    "supports",
    "index_ranges",
    "conversions",
    "labelling",
    "outcomes",
    "bound",
    "diagnostics",
    "probe",
    "densities",
    "guard",
    "cell_diagnostics",
    "completeness",
    "manifest",
    "rounding",
    "scheduling",
    "template",
    "writing",
    "record",
    "further",
    "packing",
    "storable",
    "source",
    "vault",
    "verified",
    "saving",
    "posterior",
    "kinds",
    "lineage",
    "batches",
    "stream",
    "checkpoint",
    "infer",
    "infer.problem",
    "infer.coverage",
    "infer.mcmc",
    "infer.repeatable",
    "infer.svi",
    "infer.stein",
    "infer.losses",
    "infer.entries",
    "infer.scaled",
    "infer.reflection",
    "infer.iterates",
    "infer.noise",
    "infer.batchable",
    "infer.training",
    "infer.entry_draws",
    "infer.minibatch",
    "infer.laplace",
    "infer.cells",
    "infer.methods",
    "infer.retarget",
    "infer.worded",
    "gaps",
    "tiles",
    "per_cell",
    "shelf",
    "assembly",
    "watch",
    "fit",
    "from_posterior",
    "reopened",
    "loading",
    "unseen",
    "upstream",
    "recursion",
    "order",
    "given",
    "paths",
    "targets",
    "values",
    "scenarios",
    "ints",
    "failures",
    "interventions",
    "plan",
    "reduction",
    "summary",
    "operands",
    "blocks",
    "cell_results",
    "drawn_from",
    "holes",
    "input_checks",
    "evaluation",
    "predict",
    "prior",
    "effects",
    "results_identity",
    "transaction",
    "store",
    "flavour",
    "flavour.columns",
    "flavour.typed",
    "flavour.pieces",
    "flavour.tables",
    "flavour.answers",
    "flavour.asking",
    "flavour.served",
    "flavour.predictor",
    "flavour.example",
    "flavour.signature",
    "flavour.environment",
    "flavour.layout",
    "flavour.archive",
    "flavour.models",
    "flavour.loaded",
    "describe",
    "tracking",
    "tracking.parameters",
    "tracking.curve",
    "tracking.measures",
    "tracking.tables",
    "tracking.datasets",
    "tracking.pictures",
    "tracking.environment",
    "tracking.files",
    "tracking.patience",
    "tracking.runs",
    "tracking.autologging",
    "mlflow",
    "accessor",
    "__init__",
    "demo",
)
# Where alone a package may be imported.
HOMES = {
    "dask": {"blocks", "identity", "operands", "scheduling", "stream", "words", "writing"},
    # A fit larger than memory goes to disk as it is made, before there is anything to predict.
    "zarr": {
        "flavour.archive",
        "listing",
        "manifest",
        "origins",
        "shelf",
        "store",
        "template",
        "transaction",
        "vault",
        "verified",
        "writing",
    },
    "numcodecs": {"store"},
    "mlflow": {
        "mlflow",
        "flavour.environment",
        "flavour.loaded",
        "flavour.models",
        "flavour.signature",
        "tracking.autologging",
        "tracking.runs",
    },
    "matplotlib": {"plot", "demo", "tracking.pictures"},
    "distributed": set(),
    "importlib": {"__init__", "record", "source", "tracking.environment"},
}
# What rooms must not see.
BLIND = (
    (("errors", "options", "labels", "accessor", "__init__"), {"jax", "numpyro", "flax"}),
    (
        (
            "keys",
            "scans",
            "kernel",
            "mapped",
            "written",
            "differing",
            "worlds",
            "device",
            "cellwise",
            "threefry",
        ),
        {"pandas", "xarray"},
    ),
)
NO_DEVICE = ("binding", "posterior", "effects")
DEVICES = {"devices", "local_devices", "device_count", "local_device_count", "device_put"}
CODE_LINES_A_FILE = 350
LINES_A_FUNCTION = 40


def room_of(path):
    parts = path.relative_to(HOUSE).with_suffix("").parts
    if len(parts) > 1 and parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts)


SOURCES = {room_of(path): path for path in sorted(HOUSE.rglob("*.py"))}
TREES = {room: ast.parse(path.read_text("utf8")) for room, path in SOURCES.items()}

each_room = pytest.mark.parametrize("room", sorted(TREES))


def modules_imported(room):
    """Dotted names of every module that a room imports, wherever it does so."""
    package = ["xr_aimz", *room.split(".")[:-1]]
    for node in ast.walk(TREES[room]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            # What is imported may be a module itself: from xr_aimz import keys.
            yield from (f"{source}.{alias.name}" for alias in node.names)


def rooms_imported(room):
    found = set()
    for name in modules_imported(room):
        first, _, rest = name.partition(".")
        if first != "xr_aimz":
            continue
        parts = rest.split(".") if rest else []
        while parts and ".".join(parts) not in TREES:
            parts.pop()
        found.add(".".join(parts) or "__init__")
    return found


def packages_imported(room):
    return {name.partition(".")[0] for name in modules_imported(room)}


def functions(room):
    for node in ast.walk(TREES[room]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def lines_of(function):
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


def test_every_room_has_its_place():
    assert set(TREES) == set(ROOMS), "a new room takes its place in ROOMS, an old one leaves it"
    assert len(set(ROOMS)) == len(ROOMS)


@each_room
def test_a_room_imports_only_from_rooms_above_it(room):
    # The package of a room is no room of its own: Python imports it for every one in it.
    above = ROOMS[: ROOMS.index(room)]
    below = rooms_imported(room) - set(above) - {room}
    assert not below, f"{room} imports {sorted(below)}, which come after it"


@pytest.mark.parametrize("package", sorted(HOMES))
def test_a_package_is_imported_only_in_its_home(package):
    strangers = {room for room in TREES if package in packages_imported(room)} - HOMES[package]
    assert not strangers, f"{package} belongs in {sorted(HOMES[package])}"


@pytest.mark.parametrize(("room", "unseen"), [(r, p) for rooms, p in BLIND for r in rooms])
def test_a_room_does_not_see_what_is_not_its_business(room, unseen):
    assert not packages_imported(room) & unseen


@pytest.mark.parametrize("room", [room for room in NO_DEVICE if room in TREES])
def test_names_and_draws_never_see_a_device(room):
    assert "device" not in rooms_imported(room)
    nodes = list(ast.walk(TREES[room]))
    named = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    named |= {node.id for node in nodes if isinstance(node, ast.Name)}
    assert not named & DEVICES


def lines_of_code(room):
    """The lines of a module that are neither blank nor comment nor docstring."""
    text = SOURCES[room].read_text("utf8")
    documented = set()
    for node in ast.walk(TREES[room]):
        holder = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if holder and ast.get_docstring(node) is not None:
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in documented
        for number, line in enumerate(text.splitlines(), 1)
    )


@each_room
def test_a_room_is_small(room):
    lines = lines_of_code(room)
    assert lines <= CODE_LINES_A_FILE, (
        f"{room} has {lines} lines of code: what is its second idea?"
    )


@each_room
def test_functions_are_short(room):
    long = {f.name: lines_of(f) for f in functions(room) if lines_of(f) > LINES_A_FUNCTION}
    assert not long, f"functions of {room} over {LINES_A_FUNCTION} lines: {long}"


@each_room
def test_a_room_says_what_it_is_for(room):
    assert not set(room.split(".")) & {"utils", "util", "helpers", "core", "misc", "common"}
    assert ast.get_docstring(TREES[room])


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from xr_aimz import keys", {"keys"}),
        ("from xr_aimz import keys, set_options", {"keys", "__init__"}),
        ("from xr_aimz.infer import svi", {"infer.svi"}),
        ("from xr_aimz.infer.problem import Draws", {"infer.problem"}),
        ("import xr_aimz", {"__init__"}),
        ("import xr_aimz.device as d", {"device"}),
        ("from . import kernel", {"kernel"}),
        ("from .blocks import Task", {"blocks"}),
        ("def f():\n    from xr_aimz.store import to_zarr", {"store"}),
        ("if TYPE_CHECKING:\n    from xr_aimz.fit import fit", {"fit"}),
        ("import jax.numpy as jnp", set()),
    ],
)
def test_imports_are_seen_however_they_are_spelled(monkeypatch, source, expected):
    # A wall that overlooks a spelling is no wall.
    monkeypatch.setitem(TREES, "newcomer", ast.parse(source))
    assert rooms_imported("newcomer") == expected


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


def test_public_names_bring_what_they_need():
    statement = "import xr_aimz\nfor name in xr_aimz.__all__: getattr(xr_aimz, name)"
    there = imported_by(statement)
    assert {"jax", "numpyro"} <= there
    # Half a second, for a client that nobody has asked for.
    assert "distributed" not in there


def test_public_names_are_no_modules():
    # Importing a room binds its module to the package, under the name of its function.
    statement = (
        "import sys, types, xr_aimz\n"
        "import xr_aimz.describe, xr_aimz.fit, xr_aimz.from_posterior, xr_aimz.predict\n"
        "import xr_aimz.summary\n"
        "names = [n for n in xr_aimz.__all__ if n != 'errors']\n"
        "modules = [n for n in names if isinstance(getattr(xr_aimz, n), types.ModuleType)]\n"
        "assert not modules, modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", statement], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
