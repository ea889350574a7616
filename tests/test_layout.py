"""The house: stages stand side by side over the package `pargs`, and none reaches into another."""

import ast
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, STAGES
from forked import run

PACKAGE, DEMO = "pargs", "demo"
MODULES = {
    folder: {path.stem for path in (ROOT / folder).glob("*.py")} for folder in (*STAGES, PACKAGE, DEMO)
}


def imported(path: Path) -> set[str]:
    """The first names of all modules that a file imports, at its top or within a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a script has no package to import from"
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("folder", [*STAGES, PACKAGE, DEMO])
def test_a_folder_imports_its_own_modules_and_the_package(folder):
    others = {name for other in MODULES if other not in (folder, PACKAGE) for name in MODULES[other]}
    elsewhere = {path.stem for place in ("tests", "benchmarks") for path in (ROOT / place).glob("*.py")}
    for path in (ROOT / folder).glob("*.py"):
        # Within the package, `pargs.models` and not `models`.
        own = set() if folder == PACKAGE else MODULES[folder]
        reached = imported(path) & (others | elsewhere | {*STAGES, DEMO}) - own - sys.stdlib_module_names
        assert not reached, f"{path.relative_to(ROOT)} imports {reached}"


def test_helpers_have_names_of_their_own():
    """The tests find the modules of all stages on one path."""
    counts = Counter(name for folder, names in MODULES.items() if folder != PACKAGE for name in names)
    assert [name for name, count in counts.items() if count > 1] == []
    assert not counts.keys() & sys.stdlib_module_names


@pytest.mark.parametrize("folder", [*STAGES, PACKAGE, DEMO, "benchmarks"])
def test_nothing_edits_the_module_search_path(folder):
    for path in (ROOT / folder).glob("*.py"):
        assert "sys.path" not in path.read_text(encoding="utf-8"), path.relative_to(ROOT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("Evaluation/show_generations.py", []),
        ("Evaluation/GPT4_eval_tldr.py", ["generation_pargs.json", "generation_args.json"]),
        ("demo/true_quality.py", []),
    ],
)
def test_what_one_process_does_the_others_leave_to_it(script, arguments, tmp_path):
    """There is nothing here to read: a process that did its work would say so."""
    assert run(script, arguments, tmp_path, RANK="1", WORLD_SIZE="2") == (0, "")
