"""Notebooks run by this interpreter, in a folder of their own, and what they showed."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
# Looked for, not imported: with ipykernel in it this process would pass for a notebook.
MISSING = [name for name in ("ipykernel", "ipywidgets", "nbclient") if find_spec(name) is None]
nbformat = pytest.importorskip("nbformat")


def execute(notebook, folder):
    """Run a notebook in `folder` with this interpreter; the executed notebook comes back.

    In a process of its own: what Jupyter's libraries warn of is not for our tests to fail on, and
    nothing of the user's Jupyter (kernels, configuration) is looked at.
    """
    home = folder / "jupyter"
    kernel = home / "share" / "kernels" / "tested" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": argv, "display_name": "tested", "language": "python"}))
    nbformat.write(notebook, folder / "notebook.ipynb")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "IPYTHON", "MPL"))}
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    own = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "JUPYTER_PATH": str(home / "share"),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "IPYTHONDIR": str(home / "ipython"),
        "OMP_NUM_THREADS": "1",
    }
    words = ["--kernel_name=tested", "--timeout=300", "--inplace", "notebook.ipynb"]
    run = subprocess.run(
        [sys.executable, "-c", "from nbclient.cli import main; main()", *words],
        cwd=folder,
        env=kept | own,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return nbformat.read(folder / "notebook.ipynb", as_version=4)


def shown_by(notebook):
    """What each cell showed: {id: {media type: content}}."""
    return {
        cell.id: {kind: text for out in cell.outputs for kind, text in out.get("data", {}).items()}
        for cell in notebook.cells
        if cell.cell_type == "code"
    }


def check_clean(notebook):
    """Every cell ran, in order, and nothing was said on stderr: no warning, no error."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [out for cell in cells for out in cell.outputs]
    assert not [out for out in outputs if out.output_type == "error"]
    assert not [out.text for out in outputs if out.output_type == "stream"]


def as_text(frame):
    """A table as a notebook shows it, without markup or blanks."""
    return re.sub(r"<style.*?</style>|<[^>]+>|\s", "", frame, flags=re.DOTALL)
