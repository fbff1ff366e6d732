# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""CI, the workflow and the commit hooks run the same targets of the Makefile; the test matrix runs what it says."""

import re
import subprocess
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from reference import REPO


CHECKS = ["make quality", "make test"]


def commands_of(*targets: str) -> list[str]:
    """What make runs, of an environment that is there."""
    dry_run = ["make", "--dry-run", "--always-make", "--old-file=.venv/installed", "PYTHON=python", *targets]
    return subprocess.run(dry_run, cwd=REPO, capture_output=True, text=True, check=True).stdout.splitlines()


def test_ci_and_the_workflow_check_quality_and_then_test():
    lines = (REPO / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if line.startswith("make ")] == CHECKS
    workflow = yaml.safe_load((REPO / ".github" / "workflows" / "tests.yml").read_text())
    assert [step["run"] for step in workflow["jobs"]["tests"]["steps"] if "run" in step] == CHECKS


def test_hooks_run_the_targets_and_download_nothing():
    repos = yaml.safe_load((REPO / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    hooks = repos[0]["hooks"]
    assert [(hook["entry"], hook["language"]) for hook in hooks] == [
        ("make --silent style", "system"),
        ("make --silent quality", "system"),
    ]


def test_style_mends_what_quality_checks():
    style, quality = commands_of("style"), commands_of("quality")
    assert "python -m ruff format ." in style and "python -m ruff check --fix ." in style
    assert "python -m ruff format --check ." in quality and "python -m ruff check ." in quality
    assert any(re.match("python -m mypy ", line) for line in quality)


@pytest.mark.parametrize("target", CHECKS)
def test_contributing_names_the_checks(target):
    assert f"`{target}`" in (REPO / "CONTRIBUTING.md").read_text()


def test_the_newest_releases_are_installed_without_our_upper_bounds():
    newest = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["tox"]["env"]["newest"]
    (command,) = newest["commands_pre"]
    assert command[:5] == ["python", "-m", "pip", "install", "--upgrade"]
    lines = [line for path in REPO.glob("requirements*.txt") for line in path.read_text().splitlines()]
    ours = [Requirement(line) for line in lines if line and not line.startswith(("#", "-r"))]
    bounded = {requirement.name for requirement in ours if "<" in str(requirement.specifier)}
    assert set(command[5:]) == bounded != set()
