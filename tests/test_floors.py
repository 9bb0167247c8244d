"""What pyproject.toml promises of versions is what is installed, imported and tested."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]
HARD = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {
    name: [Requirement(line) for line in lines]
    for name, lines in PROJECT["optional-dependencies"].items()
}
# Extras that this environment has by way of the extra `test`.
SOFT = [r for lines in EXTRAS.values() for r in lines if r.name != "xr_aimz"]


def top_level_imports(path):
    """Packages that importing a module imports at once, not in a function or for types."""
    found = set()
    for node in ast.parse(path.read_text("utf8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("requirement", HARD, ids=str)
def test_a_requirement_has_a_floor_that_is_met_and_no_ceiling(requirement):
    assert {s.operator for s in requirement.specifier} == {">="}
    assert version(requirement.name) in requirement.specifier


@pytest.mark.parametrize("requirement", SOFT, ids=str)
def test_an_extra_that_is_installed_meets_its_floor(requirement):
    try:
        found = version(requirement.name)
    except ModuleNotFoundError:
        pytest.skip(f"{requirement.name} is not installed")
    assert found in requirement.specifier


def test_what_modules_import_at_once_is_required():
    names = packages_distributions()
    allowed = {r.name for r in HARD} | {"xr_aimz"}
    for path in sorted((ROOT / "xr_aimz").rglob("*.py")):
        if path.stem == "demo" or path.parent.name == "mlflow":
            continue
        for package in top_level_imports(path) - set(sys.stdlib_module_names):
            assert allowed & set(names.get(package, [package])), f"{path.name} imports {package}"


def test_the_pythons_of_the_classifiers_are_those_that_ci_runs():
    named = {
        line.rpartition(" ")[2]
        for line in PROJECT["classifiers"]
        if re.search(r"Python :: 3\.\d+$", line)
    }
    assert all(f"{v}.0" in SpecifierSet(PROJECT["requires-python"]) for v in named)
    ci = (ROOT / ".ci" / "run").read_text("utf8")
    newer = set(re.findall(r"for version in ([\d. ]+);", ci)[0].split())
    assert named == newer | {"3.11"}
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in named
