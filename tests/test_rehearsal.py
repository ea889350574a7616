"""The rehearsal at the paper's size: what it expects of a GPU, and what it refuses."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]


def rehearse(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "benchmarks/rehearsal.py", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_the_table_in_the_docs_is_what_the_script_expects():
    rows = [line for line in rehearse("--expected_only").stdout.splitlines() if re.match(r"\| [2-5] ", line)]
    assert len(rows) == 7
    assert all(row in (ROOT / "docs/benchmarks.md").read_text() for row in rows)


@pytest.mark.slow
def test_a_directory_that_is_not_there_is_refused(tmp_path):
    done = rehearse("--directory", str(tmp_path / "none"))
    assert done.returncode == 2
    assert done.stderr.strip() == f"error: --directory {str(tmp_path / 'none')!r} is no folder"


def test_the_expected_budgets_are_those_of_decoding(monkeypatch):
    import run_models

    budgets = {}
    for gigabytes in (16, 24, 40, 48, 80):
        gpu = SimpleNamespace(total_memory=gigabytes * 1e9)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, gpu=gpu: gpu)
        budgets[gigabytes] = run_models.fit_budget(torch.device("cuda"))
    assert budgets == {16: 65536, 24: 65536, 40: 131072, 48: 131072, 80: 262144}
    assert run_models.fit_budget(torch.device("cpu")) == 1024
