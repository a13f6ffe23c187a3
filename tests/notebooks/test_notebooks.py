"""The notebooks, executed as they are shipped, by this interpreter, in a folder of their own."""

import json

import numpy as np
import pytest
from notebook_runs import MISSING, REPOSITORY, as_text, check_clean, execute, shown_by
from PIL import Image

from cka_probe import Report
from cka_probe.activations.layers import default_layers
from cka_probe.models.embedded import glyphnet

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"pip install {' '.join(MISSING)}")
nbformat = pytest.importorskip("nbformat")

PROBE = REPOSITORY / "notebooks" / "1-probe-a-network.ipynb"
SPLIT = PROBE.with_name("2-choose-a-split.ipynb")
WIDGET = "application/vnd.jupyter.widget-view+json"

YOURS = """
from torch import nn

model = nn.Sequential(
    nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()),
    nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU()),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
)
images = "my photos"
scales = [12, 16]
n_images = 72
resize = "restore"
"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook")
    return folder, execute(nbformat.read(PROBE, as_version=4), folder)


def test_runs_without_a_word_on_stderr(executed):
    check_clean(executed[1])


def test_probes_the_embedded_network_at_the_sizes_it_names(executed):
    folder, notebook = executed
    shown = shown_by(notebook)
    report = Report.load(folder / "report.npz")
    assert report.layers == default_layers(glyphnet(trained=False))
    assert shown["layers"]["text/plain"].count("'") == 2 * len(report.layers)
    assert report.views == ["16", "32", "48", "64"]
    assert report.reference == "64"
    assert report.meta["n_images"] == 500
    low, high = report.interval()
    assert np.isfinite(low).all()
    assert ((low < report.cka) & (report.cka < high)).sum() > 0.9 * report.cka.size - len(report)
    assert shown["save"]["text/plain"] == "True"


def test_tables_hold_what_the_saved_report_holds(executed):
    folder, notebook = executed
    shown = shown_by(notebook)
    report = Report.load(folder / "report.npz")
    wanted = {
        "table": report.against().round(3),
        "between": report.between("16", "64").round(2),
    }
    for name, frame in wanted.items():
        assert as_text(frame._repr_html_()) == as_text(shown[name]["text/html"]), name
    interval = as_text(shown["interval"]["text/html"])
    for what in ("low", "cka", "high"):
        column = report.against(what=what)["16"].round(3)
        assert f"{column.iloc[0]:.3f}" in interval
        assert f"{column.iloc[-1]:.3f}" in interval
    for name, columns in (("kernel", ("linear", "rbf")), ("reduce", ("flatten", "mean"))):
        text = shown[name]["text/plain"].splitlines()
        assert tuple(text[0].split()) == columns
        cells = np.array([line.split()[1:] for line in text[-len(report.layers) :]], dtype=float)
        ours = report.against()["16"].to_numpy()
        assert np.abs(cells[:, 0] - ours).max() <= 0.0006, name
        assert np.abs(cells[:, 1] - ours).max() > 0.001, "the other way gave the same numbers"


def test_what_the_words_say_of_the_embedded_data_holds(executed):
    low = Report.load(executed[0] / "report.npz").between("16", "64", "low")
    high = Report.load(executed[0] / "report.npz").between("16", "64", "high")
    for layer in low.index[low.index.get_loc("layer1.1") :]:
        assert low.loc[layer, "layer1.0"] > high.loc[layer, layer]


def test_pictures_are_there(executed):
    shown = shown_by(executed[1])
    for name in ("curve", "grid", "mean-curve"):
        assert len(shown[name]["image/png"]) > 5000, name
    assert "data:image/png;base64," in shown["run"]["text/html"]
    assert "changes most: its CKA with itself" in shown["run"]["text/html"]


@pytest.mark.parametrize("cell", ["run", "kernel", "reduce"])
def test_a_progress_bar_of_widgets_reaches_its_end(executed, cell):
    _, notebook = executed
    shown = shown_by(notebook)
    assert WIDGET in shown[cell], "no widget: tqdm fell back to text"
    widgets = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    box = widgets[shown[cell][WIDGET]["model_id"]]["state"]
    parts = [widgets[name.removeprefix("IPY_MODEL_")] for name in box["children"]]
    (bar,) = (part["state"] for part in parts if part["model_name"] == "FloatProgressModel")
    assert bar["value"] == bar["max"] == 500
    assert bar["bar_style"] == "success"


def test_one_cell_changed_probes_your_own_network_and_folder(tmp_path):
    notebook = nbformat.read(PROBE, as_version=4)
    (yours,) = (cell for cell in notebook.cells if "yours" in cell.metadata.get("tags", []))
    yours.source = YOURS.strip()
    (tmp_path / "my photos" / "some").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for k in range(80):
        pixels = generator.integers(0, 256, (20 + k % 3, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "my photos" / "some" / f"{k}.png")
    notebook = execute(notebook, tmp_path)
    check_clean(notebook)
    report = Report.load(tmp_path / "report.npz")
    assert report.views == ["12", "16"]
    assert report.layers == ["0", "1"]
    assert report.meta["n_images"] == 72
    assert report.meta["resize"] == "restore"


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    return folder, execute(nbformat.read(SPLIT, as_version=4), folder)


def test_a_split_is_suggested_as_the_words_say(split):
    folder, notebook = split
    check_clean(notebook)
    shown = shown_by(notebook)
    told = json.loads((folder / "split.json").read_text())
    assert (told["view"], told["reference"], told["rule"]) == ("16", "64", "affordable")
    values = [point["cka"] for point in told["curve"]]
    assert values == sorted(values, reverse=True), "the words say that the curve only falls"
    assert told["clear"]
    rules = shown["rules"]["text/plain"].splitlines()[1:]
    answers = {line.split()[0]: line.split()[1] for line in rules}
    said = f"(False, {answers['recovery']!r}, ('there is no recovery',))"
    assert shown["clear"]["text/plain"] == said
    page = shown["suggest"]["text/html"]
    assert f"cut after {told['layer']}" in page
    assert page.count("<tr") == 1 + len(told["ranking"])
    assert len(shown["curve"]["image/png"]) > 5000
    assert answers["affordable"] == told["layer"] != answers["recovery"]
    assert answers["cheap"] == "stem"


def test_one_cell_changed_suggests_a_split_of_your_own_network(tmp_path):
    notebook = nbformat.read(SPLIT, as_version=4)
    (yours,) = (cell for cell in notebook.cells if "yours" in cell.metadata.get("tags", []))
    yours.source = YOURS.strip()
    (tmp_path / "my photos").mkdir()
    generator = np.random.default_rng(0)
    for k in range(70):
        pixels = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((20, 20)).save(tmp_path / "my photos" / f"{k}.png")
    check_clean(execute(notebook, tmp_path))
    told = json.loads((tmp_path / "split.json").read_text())
    assert (told["view"], told["reference"]) == ("12", "16")
    assert {row["layer"] for row in told["ranking"]} == {"0", "1"}


@pytest.mark.parametrize("path", sorted(PROBE.parent.glob("*.ipynb")), ids=lambda path: path.stem)
def test_shipped_without_outputs(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
        assert set(cell.metadata) <= {"tags"}
        if cell.cell_type == "code":
            assert len(cell.source.splitlines()) <= 16, f"{cell.id}: a few lines a cell"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert path.stat().st_size < 30_000
