"""The words of the glossary in docs/concepts.md, in names and docstrings."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GLOSSARY = (ROOT / "docs/concepts.md").read_text("utf8").partition("## Glossary")[2]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in GLOSSARY.splitlines()
    if line.startswith("| ")
][1:]
BANNED = {word.strip() for *_, words in ROWS for word in words.split(",") if word.strip()}
NO_VALUES = set(re.findall(r"`(\w+)`", GLOSSARY.partition("No value is called")[2]))
# Fields of what fits have on disk, whose words stay.
ON_DISK = {"further"}
# What a docstring may not begin with: the first sentence has a verb or a noun of the field.
CLAUSES = {"Of", "What", "Who", "Whether", "Where", "How", "Which", "That", "When", "Why"}

SOURCES = {str(p.relative_to(ROOT)): p for p in sorted((ROOT / "xr_aimz").rglob("*.py"))}
TREES = {name: ast.parse(path.read_text("utf8")) for name, path in SOURCES.items()}

each_file = pytest.mark.parametrize("name", sorted(TREES))


def names_in(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name


def docstrings_in(tree):
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            yield getattr(node, "name", "the module"), ast.get_docstring(node) or ""


def parts_of(name):
    return set(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_"))


def test_the_glossary_has_words():
    assert len(ROWS) >= 25
    assert {"vault", "worlds", "holes"} <= BANNED
    assert {"found", "whole"} <= NO_VALUES


@each_file
def test_names_are_words_of_the_glossary(name):
    names = set(names_in(TREES[name]))
    assert not {n for n in names if parts_of(n) & BANNED}
    assert not {n for n in names if n.lstrip("_") in NO_VALUES} - ON_DISK


@each_file
def test_docstrings_use_words_of_the_glossary(name):
    words = {
        where: BANNED & set(re.findall(r"\b[a-z]+\b", re.sub(r"``.*?``|`.*?`", "", text.lower())))
        for where, text in docstrings_in(TREES[name])
    }
    assert not {where: banned for where, banned in words.items() if banned}


@each_file
def test_a_docstring_begins_with_a_verb_or_a_noun(name):
    clauses = [
        where
        for where, text in docstrings_in(TREES[name])
        if text and text.split()[0].strip(",") in CLAUSES
    ]
    assert not clauses
