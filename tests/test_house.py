"""The house: folders are the map, imports go one way, nothing prints but the command line."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cka_probe", "msun")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

# Each room (a sub-package, or a module at the top) and the rooms of its own package that it may
# import. `msun` may also import any room of `cka_probe` but its command line's commands; never the
# reverse. The `__init__` of a package reaches every room lazily and stands outside the table.
MAY_IMPORT = {
    "cka_probe": {
        "errors": "", "intervals": "", "io": "", "progress": "", "provenance": "io", "rng": "",
        "distributed": "",
        "engine": "rng",
        "activations": "errors rng",
        "inputs": "errors io progress rng",
        "models": "errors inputs io rng",
        "report": "errors intervals io",
        "features": "",
        "functional": "engine errors features progress report",
        "summary": "report",
        "probing": "activations distributed engine errors functional inputs io models progress "
        "provenance report rng summary",
        "plot": "io report summary",
        "html": "io plot report summary",
        "cli": "activations distributed engine errors html inputs io models plot probing "
        "provenance report rng summary",
        "__main__": "cli",
    },
    "msun": {
        "metrics": "", "cutting": "", "data": "",
        "network": "cutting",
        "splitting": "cutting network",
        "training": "data metrics network",
        "evaluation": "data metrics network",
        "plot": "splitting",
        "cli": "cutting data evaluation metrics network plot splitting training",
        "__main__": "cli",
    },
}  # fmt: skip
# A report draws and describes itself: the imports upwards, inside the methods that do.
UPWARDS = {("report", "plot"), ("report", "html"), ("report", "summary")}
WARN_LINES = 400


def module_of(path):
    """The dotted name of a file's module, without a trailing `__init__`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def room_of(module):
    """(package, room): ("cka_probe", "engine") for cka_probe.engine.hsic."""
    parts = module.split(".")
    return parts[0], parts[1] if len(parts) > 1 else ""


def imports_of(path):
    """(module, name or None) for each import of the two packages in a file, at any depth."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found = [
                (f"{node.module}.{alias.name}", None)
                if f"{node.module}.{alias.name}" in MODULES
                else (node.module, alias.name)
                for alias in node.names
            ]
        else:
            assert not isinstance(node, ast.ImportFrom), f"{path}: a relative import"
            continue
        yield from ((name, what) for name, what in found if name.split(".")[0] in PACKAGES)


def parametrized(test):
    return pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))(test)


@parametrized
def test_imports_go_one_way(path):
    package, room = room_of(module_of(path))
    if not room:
        return  # the package's own __init__
    table = MAY_IMPORT[package]
    assert room in table, f"say in MAY_IMPORT what the room {room!r} may import"
    for module, _ in imports_of(path):
        home, other = room_of(module)
        if home != package:
            assert (package, home) == ("msun", "cka_probe"), f"{path} imports {module}"
        elif other not in ("", room) and (room, other) not in UPWARDS:
            assert other in table[room].split(), f"{room} imports {module}"


def test_the_table_has_no_cycle():
    for package, table in MAY_IMPORT.items():
        allowed = {room: set(others.split()) for room, others in table.items()}
        assert set().union(*allowed.values()) <= set(allowed), package
        while allowed:
            free = {room for room, others in allowed.items() if not others & set(allowed)}
            assert free, f"a cycle among {sorted(allowed)}"
            for room in free:
                del allowed[room]


@parametrized
def test_no_private_name_crosses_rooms(path):
    mine = room_of(module_of(path))
    for module, name in imports_of(path):
        last = name or module.rpartition(".")[2]
        private = last.startswith("_") and not last.startswith("__")
        assert not (private and room_of(module) != mine), f"{path} imports {module}.{last}"


@parametrized
def test_no_public_function_has_the_name_of_its_module(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert path.stem not in names - {"main"}  # the entry point of a program, as everywhere


@parametrized
def test_only_the_command_line_prints(path):
    if room_of(module_of(path))[1] == "cli":
        return
    calls = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)]
    assert not [n for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]


def test_long_files_are_few():
    """A warning light, not a limit: three files may be longer before this goes red."""
    python = [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]
    long = {p: n for p in python if (n := len(p.read_text("utf-8").splitlines())) > WARN_LINES}
    assert len(long) <= 3, long


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
