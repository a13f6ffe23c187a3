import base64
import dataclasses
import itertools
import re

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from scipy import stats

from cka_probe.report import FORMAT, Report

META = {"groups": 8, "estimator": "minibatch", "kernel": "linear", "n_images": 800}
ENTRIES = [(view, layer) for view in ("32", "64", "16") for layer in ("stem", "layer1", "fc")]


def make(entries=ENTRIES, seed=0, **meta):
    """A report of random values: they need not be anybody's CKA."""
    rng = np.random.default_rng(seed)
    m = len(entries)
    cka, stderr = rng.uniform(-0.2, 1, (m, m)), rng.uniform(0.001, 0.1, (m, m))
    cka, stderr = (cka + cka.T) / 2, (stderr + stderr.T) / 2
    np.fill_diagonal(cka, 1)
    view, layer = zip(*entries, strict=True)
    return Report(cka, stderr, np.array(view), np.array(layer), {**META, **meta})


def gone(report, *entries):
    """The same report with entries that are nan."""
    cka, stderr = report.cka.copy(), report.stderr.copy()
    for k, name in enumerate(zip(report.view, report.layer, strict=True)):
        if name in entries:
            for array in (cka, stderr):
                array[k] = array[:, k] = np.nan
    return dataclasses.replace(report, cka=cka, stderr=stderr)


def cell(report, a, b, values=None):
    """The obvious look-up: the value of two (view, layer) pairs, nan if one is not there."""
    pairs = list(zip(report.view.tolist(), report.layer.tolist(), strict=True))
    if a not in pairs or b not in pairs:
        return np.nan
    return (report.cka if values is None else values)[pairs.index(a), pairs.index(b)]


# ---- what a report is


def test_numbers_are_float64_own_and_read_only():
    cka = np.eye(2, dtype=np.float32)
    report = Report(cka, [[0, 0.5], [0.5, 0]], ["a", "a"], ["x", "y"])
    cka[0, 1] = 9
    assert report.cka[0, 1] == 0
    for array in (report.cka, report.stderr):
        assert array.dtype == np.float64
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 2
    for names in (report.view, report.layer):
        assert names.dtype.kind == "U"
        assert not names.flags.writeable
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.cka = cka


def test_rounding_is_evened_out():
    report = Report(**{**GOOD, "cka": [[1 - 1e-13, 0.5 + 1e-13], [0.5, 1]]})
    assert report.cka[0, 1] == report.cka[1, 0]
    assert (report.cka.diagonal() == 1).all()


GOOD = {"cka": np.eye(2), "stderr": np.zeros((2, 2)), "view": ["a", "b"], "layer": ["x", "x"]}


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"cka": np.eye(3)}, ValueError, r"cka does not fit 2 entries: shape \(3, 3\)"),
        ({"cka": np.ones(2)}, ValueError, "cka does not fit"),
        ({"stderr": np.zeros((2, 1))}, ValueError, "stderr does not fit"),
        ({"cka": [[1, 0.5], [0.4, 1]]}, ValueError, r"cka is not symmetric: at \(0, 1\)"),
        ({"cka": [[1, np.nan], [0.4, 1]]}, ValueError, "cka is not symmetric"),
        ({"stderr": [[0, 0.5], [0.4, 0]]}, ValueError, "stderr is not symmetric"),
        ({"cka": [[1, np.inf], [np.inf, 1]]}, ValueError, "cka is infinite"),
        ({"stderr": [[0, np.inf], [np.inf, 0]]}, ValueError, "stderr is infinite"),
        ({"stderr": [[0, -0.1], [-0.1, 0]]}, ValueError, "negative standard error: -0.1"),
        ({"cka": [[1, 0], [0, 0.9]]}, ValueError, "itself: 0.9"),
        ({"cka": [["u", "v"], ["v", "u"]]}, TypeError, "cka holds more than numbers"),
        ({"view": ["a", "a"]}, ValueError, r"stands 2 times: \('a', 'x'\)"),
        ({"view": ["a"]}, ValueError, "unpaired: 1, 2"),
        ({"view": [], "layer": []}, ValueError, "unpaired: 0, 0"),
        ({"view": [32, 64]}, TypeError, "view holds more than text"),
        ({"layer": "xy"}, TypeError, "layer holds more than text"),
        ({"meta": []}, TypeError, "meta is not a dict"),
        ({"meta": {"a": {1}}}, TypeError, r"meta\['a'\] cannot be JSON"),
        ({"meta": {"reference": "c"}}, ValueError, "unknown view: 'c': use one of 'a', 'b'"),
    ],
)
def test_what_cannot_be_a_report_is_refused(change, error, match):
    Report(**GOOD)
    with pytest.raises(error, match=match) as caught:
        Report(**{**GOOD, **change})
    assert "\n" not in str(caught.value)
    assert str(caught.value).count(": ") == 2


def test_meta_is_as_json_returns_it():
    report = make(pair=(1, np.float64(0.5)), lost=float("nan"))
    assert report.meta["pair"] == [1, 0.5]
    assert report.meta["lost"] is None


def test_equality():
    report = gone(make(), ("64", "fc"))
    assert report == gone(make(), ("64", "fc"))
    assert report != make()
    assert report != dataclasses.replace(report, meta={})
    assert report != dataclasses.replace(report, stderr=report.stderr * 2)
    assert report != dataclasses.replace(report, layer=[f"{name}x" for name in report.layer])
    assert report != dataclasses.replace(report, view=[f"{name}x" for name in report.view])
    assert report != "report"
    with pytest.raises(TypeError):
        hash(report)


# ---- order


@pytest.mark.parametrize(
    ("views", "merged"),
    [
        (["abc", "abc"], "abc"),
        (["ac", "abc"], "abc"),
        (["bc", "abc"], "abc"),
        (["ab", "abc"], "abc"),
        (["ad", "abcd", "axd"], "axbcd"),
        (["ab", "xy"], "abxy"),
        (["c", "ab", "abc"], "cab"),
    ],
)
def test_layers_of_all_views_in_execution_order(views, merged):
    entries = [(str(k), layer) for k, layers in enumerate(views) for layer in layers]
    report = make(entries)
    assert "".join(report.layers) == merged
    assert "".join(report.against().index) == merged
    assert report.layers_of("0") == list(views[0])


def test_order_holds_where_entries_are_sorted_by_layer():
    report = make([(view, layer) for layer in "zay" for view in "ab"])
    assert report.layers == list("zay")
    assert report.views == list("ab")


# ---- intervals


@pytest.mark.parametrize("groups", [2, 4, 20])
@pytest.mark.parametrize("level", [0.5, 0.95])
def test_interval_is_students(groups, level):
    report = gone(make(groups=groups), ("64", "fc"))
    low, high = report.interval(level)
    t = stats.t(groups - 1).ppf((1 + level) / 2)
    off = ~np.eye(len(report), dtype=bool)
    np.testing.assert_allclose(low[off], (report.cka - t * report.stderr)[off], rtol=1e-12)
    np.testing.assert_allclose(high[off], (report.cka + t * report.stderr)[off], rtol=1e-12)
    for end in (low, high):
        known = ~np.isnan(report.cka.diagonal())
        assert (end.diagonal()[known] == 1).all()
        assert np.isnan(end.diagonal()[~known]).all()


@pytest.mark.parametrize("groups", [None, 0, 1])
def test_no_interval_without_groups(groups):
    for end in make(groups=groups).interval():
        np.testing.assert_array_equal(end, np.where(np.eye(len(end)), 1, np.nan))


def test_nan_error_is_nan_interval():
    report = make()
    stderr = report.stderr.copy()
    stderr[0, 1] = stderr[1, 0] = np.nan
    low, high = dataclasses.replace(report, stderr=stderr).interval()
    assert np.isnan([low[0, 1], high[1, 0]]).all()
    assert np.isnan(low).sum() == 2


@pytest.mark.parametrize("level", [0, 1, -0.5, 95, float("nan")])
def test_levels_out_of_range(level):
    with pytest.raises(ValueError, match="level out of range"):
        make().interval(level)


# ---- tables


@pytest.mark.parametrize("what", ["cka", "stderr", "low", "high"])
def test_against_and_between_by_look_up(what):
    entries = [*ENTRIES, ("64", "extra"), ("8", "fc"), ("8", "stem")]
    np.random.default_rng(1).shuffle(entries)
    report = gone(make([tuple(entry) for entry in entries]), ("16", "layer1"))
    low, high = report.interval(0.8)
    values = {"cka": report.cka, "stderr": report.stderr, "low": low, "high": high}[what]
    for view in report.views:
        table = report.against(view, what, level=0.8)
        assert list(table.columns) == report.views
        assert (table.index.name, table.columns.name) == ("layer", "view")
        for layer, other in itertools.product(table.index, table.columns):
            expected = cell(report, (other, layer), (view, layer), values)
            np.testing.assert_equal(table.loc[layer, other], expected)
    for a, b in itertools.product(report.views, repeat=2):
        table = report.between(a, b, what, level=0.8)
        assert list(table.index) == report.layers_of(a)
        assert list(table.columns) == report.layers_of(b)
        for one, two in itertools.product(table.index, table.columns):
            expected = cell(report, (a, one), (b, two), values)
            np.testing.assert_equal(table.loc[one, two], expected)


def test_reference():
    assert make().reference == "16"  # the last
    assert make(reference="64").reference == "64"
    pd.testing.assert_frame_equal(make(reference="64").against(), make().against("64"))
    assert (make(reference="64").against()["64"] == 1).all()


def test_between_is_labelled():
    table = make().between("32", "64")
    assert (table.index.name, table.columns.name) == ("layer in 32", "layer in 64")


def test_between_defaults():
    one = make([("a", "x"), ("a", "y")])
    pd.testing.assert_frame_equal(one.between(), one.between("a", "a"))
    two = make([("a", "x"), ("b", "y"), ("b", "z")])
    pd.testing.assert_frame_equal(two.between(), two.between("a", "b"))
    pd.testing.assert_frame_equal(two.between("b"), two.between("b", "b"))
    with pytest.raises(ValueError, match="the report has 3: name two of '32', '64', '16'"):
        make().between()


@pytest.mark.parametrize("call", [Report.against, Report.between, lambda r, v: r.between("64", v)])
def test_unknown_views_and_values(call):
    with pytest.raises(ValueError, match="unknown view: '128': use one of '32', '64', '16'"):
        call(make(), "128")
    with pytest.raises(ValueError, match="unknown value: 'p': use one of 'cka', 'stderr'"):
        make().against("64", "p")


def test_to_frame_holds_every_pair_once(tmp_path):
    report = gone(make(), ("16", "fc"))
    frame = report.to_frame(level=0.9)
    columns = ["view_a", "layer_a", "view_b", "layer_b", "cka", "stderr", "low", "high"]
    assert list(frame.columns) == columns
    m = len(report)
    assert len(frame) == m * (m + 1) // 2
    low, high = report.interval(0.9)
    pairs = set()
    for row in frame.itertuples():
        a, b = (row.view_a, row.layer_a), (row.view_b, row.layer_b)
        pairs.add(frozenset([a, b]))
        for name, values in {"cka": report.cka, "low": low, "high": high}.items():
            np.testing.assert_equal(getattr(row, name), cell(report, a, b, values))
        np.testing.assert_equal(row.stderr, cell(report, a, b, report.stderr))
    assert len(pairs) == len(frame)
    frame.to_csv(tmp_path / "cka.csv", index=False)
    back = pd.read_csv(tmp_path / "cka.csv", dtype={"view_a": str, "view_b": str})
    pd.testing.assert_frame_equal(back, frame, check_dtype=False)


# ---- files


def test_round_trip(tmp_path):
    report = gone(make([("a", "層.0"), ("a", 'x "y",\n'), ("ß", "層.0")]), ("ß", "層.0"))
    report = dataclasses.replace(report, meta={**report.meta, "names": {"é": [1.5, None, True]}})
    report.save(tmp_path / "r.npz")
    report.save(str(tmp_path / "r.npz"))
    back = Report.load(str(tmp_path / "r.npz"))
    assert back == report
    assert back.meta == report.meta
    assert not back.cka.flags.writeable
    assert [path.name for path in tmp_path.iterdir()] == ["r.npz"]


def test_the_file_is_the_contracts(tmp_path):
    report = make()
    report.save(tmp_path / "r.npz")
    with np.load(tmp_path / "r.npz", allow_pickle=False) as archive:
        assert set(archive) == {"cka", "stderr", "view", "layer", "meta", "format"}
        assert archive["view"].dtype.kind == archive["layer"].dtype.kind == "U"
        assert archive["meta"].dtype.kind == "U"
        assert archive["meta"].shape == ()
        assert archive["format"] == FORMAT
        np.testing.assert_array_equal(archive["cka"], report.cka)


def test_load_refuses_numbers_that_break_a_rule(tmp_path):
    arrays = {**GOOD, "cka": [[1, 0.5], [0.4, 1]], "meta": "{}", "format": FORMAT}
    np.savez(tmp_path / "r.npz", **{name: np.array(value) for name, value in arrays.items()})
    with pytest.raises(ValueError, match=r"r\.npz: cka is not symmetric") as caught:
        Report.load(tmp_path / "r.npz")
    assert str(caught.value).count(": ") == 2
    with pytest.raises(FileNotFoundError, match="no such report"):
        Report.load(tmp_path / "other.npz")
    np.savez(tmp_path / "newer.npz", format=FORMAT + 1)
    with pytest.raises(ValueError, match="newer format"):
        Report.load(tmp_path / "newer.npz")


# ---- words


def test_summary_names_the_least_similar_cell():
    report = gone(make(reference="64"), ("32", "stem"))
    table = report.against().drop(columns="64")
    layer, view = table.stack().idxmin()
    text = report.summary()
    assert text.startswith("Linear CKA (minibatch estimator, 800 images) of 3 layers in 3 views. ")
    assert f"At {view} px, {layer} changes most" in text
    assert f"its CKA with itself at 64 px is {table.loc[layer, view]:.3f}." in text
    assert "\n" not in text


def test_summary_without_intervals_views_or_values():
    assert "There are no intervals" in make(groups=1).summary()
    empty = gone(make([("a", "x"), ("b", "x")]), ("a", "x"))
    assert "There is no value to read" in empty.summary()
    single = make([("a", "x"), ("a", "y"), ("a", "z")])
    pairs = itertools.combinations("xyz", 2)
    a, b = max(pairs, key=lambda pair: cell(single, ("a", pair[0]), ("a", pair[1])))
    assert f"{b} in view a and {a} in view a, with a CKA" in single.summary()
    apart = make([("a", "x"), ("b", "y")])
    assert "x in view a and y in view b have a CKA" in apart.summary()
    bare = Report(**GOOD)
    assert bare.summary().startswith("CKA of 1 layer in 2 views. ")
    assert repr(bare) == f"<Report of 2 entries. {bare.summary()}>"


def test_a_notebook_gets_a_picture_and_a_sentence():
    before = plt.get_fignums()
    for entries in ([("a", "<b>"), ("b", "<b>")], [("a", "x"), ("b", "y")], [("a", "x")]):
        page = make(entries)._repr_html_()
        (image,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
        assert base64.b64decode(image).startswith(b"\x89PNG")
        assert "<b>" not in page
        assert "CKA" in page
    assert plt.get_fignums() == before
