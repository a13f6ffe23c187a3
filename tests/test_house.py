"""The house: imports go one way, files stay small, nothing prints but the command line."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = [p for p in (ROOT / "cka_probe", ROOT / "msun") if (p / "__init__.py").exists()]
ROOMS = [path for package in PACKAGES for path in sorted(package.rglob("*.py"))]
PYTHON = [
    path
    for folder in (*PACKAGES, ROOT / "tests", ROOT / "experiments")
    for path in sorted(folder.rglob("*.py"))
]

# Each room and how high it stands: a room imports only from lower ones.
LEVELS = {
    "cka_probe": {
        "files": 0, "kernels": 0, "hsic": 0, "reduce": 0, "progress": 0, "memory": 0, "decode": 0,
        "lettering": 0,
        "rows": 0, "project": 0, "fingerprints": 0, "own_kernel": 0,
        "interrupts": 0, "report_checks": 0,
        "bandwidth": 0, "link": 0, "scales": 0, "ranks": 0, "gemm": 0,
        "device": 1, "layers": 1, "views": 1, "tiles": 1, "report": 1, "weights": 1, "glyphs": 1,
        "estimator_base": 1, "spool": 1, "sketch_sums": 1,
        "glyphnet": 2, "collect": 2, "sources": 2, "asked": 2, "exact": 2, "sketch": 2,
        "images": 3, "estimators": 3,
        "models": 3, "provenance": 3, "features": 4, "row_file": 4, "state": 5, "sharing": 4,
        "forwards": 4, "estimate": 4, "reading": 4, "choose": 5, "loop": 6, "probe_run": 7,
        "probe": 8, "plot": 5, "page_curve": 5, "facts": 5, "page_cells": 5, "page": 6,
        "cli_output": 9, "cli_checks": 9,
        "cli_commands": 10, "cli": 11, "__main__": 12, "__init__": 12,
    },
    "msun": {
        "trace": 0, "policy": 0, "losses": 0, "data": 0, "costs": 0, "norms": 0, "curves": 0,
        "average": 0, "page": 0, "split_rules": 1, "split_choice": 1, "recipe": 1,
        "observe": 1,
        "parts": 1, "crops": 1, "cut": 2, "twins": 2, "surgery": 3, "split": 3,
        "settle": 3, "classifier": 3, "plans": 4, "subnets": 4, "paper": 5, "model": 5,
        "between": 6, "build": 6, "agree": 6, "checkpoint": 7, "heads": 7, "calibrate": 8,
        "train_state": 8, "descent": 8, "scores": 8, "measure": 8, "train": 9, "evaluate": 9,
        "plot": 9, "plot_split": 9,
        "demo": 10, "__init__": 11, "cli_options": 12, "cli_cuts": 13, "cli_suggest": 13,
        "cli_build": 13, "cli_eval": 13, "cli_train": 14, "cli_demo": 14,
        "cli": 15, "__main__": 16,
    },
}  # fmt: skip
# report shows itself in a notebook: the one look up, inside the function that a notebook calls
LOOKS_UP = {("report", "plot")}


def imports(path):
    """Rooms of its own package that a file imports, with the package: (package, room)."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = f"{path.parent.name}.{base}".rstrip(".")
            found.add(base)
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return {tuple(name.split(".")[:2]) for name in found if "." in name}


@pytest.mark.parametrize("path", ROOMS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_imports_go_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    levels = LEVELS[package]
    assert path.stem in levels, f"say in LEVELS where the room {path.stem!r} stands"
    for home, room in imports(path):
        if home == "msun":
            assert package == "msun", f"{path.stem} imports msun.{room}"
        if home != package or room not in levels:
            continue
        if (path.stem, room) not in LOOKS_UP:
            assert levels[room] < levels[path.stem] or levels[room] == levels[path.stem] == 0, (
                f"{path.stem} (level {levels[path.stem]}) imports {room} (level {levels[room]})"
            )


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_small(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 360


@pytest.mark.parametrize("path", ROOMS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_only_the_command_line_prints(path):
    if path.stem.startswith("cli"):
        return
    calls = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)]
    assert not [n for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]


def test_public_names_have_docstrings():
    import inspect

    import cka_probe

    for name in cka_probe.__all__:
        text = inspect.getdoc(getattr(cka_probe, name))
        assert text, name
        if inspect.isfunction(getattr(cka_probe, name)):
            for part in ("Args:", "Returns:", "Raises:"):
                assert part in text, f"{name} has no {part}"


def tracked():
    listing = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return [ROOT / line for line in listing.stdout.splitlines() if (ROOT / line).is_file()]


def test_nothing_large_is_tracked():
    assert not [p for p in tracked() if p.stat().st_size > 1_000_000]


def test_readme_opens_with_a_picture_that_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    picture = re.search(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert picture is not None
    assert text[: picture.start()].count("\n") <= 4
    assert (ROOT / picture[1]).is_file()


def test_ci_runs_the_line_of_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"```(?:sh|bash)\n(.*?)```", text, flags=re.DOTALL)[:2]
    assert len(lines) == 2
    assert all(line.strip().count("\n") == 0 for line in lines), "each is one line to paste"
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "README.md" in ci
    assert "pytest" in lines[1]
