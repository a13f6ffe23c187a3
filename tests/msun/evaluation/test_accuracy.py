"""Evaluation against one image at a time, costs against hand counts, CKA against the probe."""

import math

import numpy as np
import pytest
import torch
from measured import QUIET, Tiny, macs_by_hand, photographs, slowly, tensors
from oracle import cka as slow_cka
from torch import nn
from torchvision.transforms.v2 import functional as tv

from cka_probe.models.load import LoadedModel
from cka_probe.probing.api import probe
from msun import Predictions, build, compare, evaluate
from msun.data.labelled import open_labelled
from msun.evaluation.inputs import resolve_feed
from msun.metrics import drawn_sides, wilson_interval


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("photos"))


@pytest.mark.parametrize("feed", ["native", "upsampled"])
def test_it_equals_one_image_at_a_time(photos, tmp_path, feed):
    net, sides = Tiny(), [8, 13, 20]
    frame = evaluate(net, photos, sides, feed=feed, batch_size=6,
                     predictions=tmp_path / "p.npz", **QUIET)  # fmt: skip
    kept = Predictions.load(tmp_path / "p.npz")
    assert frame["size_px"].tolist() == sides
    assert frame["fed_px"].tolist() == (sides if feed == "native" else [20, 20, 20])
    assert kept.view.tolist() == ["8", "13", "20"]
    for k, side in enumerate(sides):
        rank, predicted, label = slowly(net, photos, side, None if feed == "native" else 20)
        assert np.array_equal(kept.rank[:, k], rank)
        assert np.array_equal(kept.predicted[:, k], predicted)
        assert np.array_equal(kept.label, label)
        right = int((rank == 0).sum())
        row = frame.iloc[k]
        assert (row["n"], row["top1"]) == (20, right / 20)
        assert (row["top1_low"], row["top1_high"]) == wilson_interval(right, 20)
        assert math.isnan(row["top5"])  # of three classes
        assert row["gmacs"] == macs_by_hand(int(row["fed_px"])) / 1e9
        assert row["params_m"] == sum(p.numel() for p in net.parameters()) / 1e6
    assert len(set(kept.predicted.flatten())) > 1, "a network that always says the same"


def test_a_loaded_models_mean_and_std_count(photos, tmp_path):
    net = Tiny()
    mean, std = (0.3, 0.5, 0.6), (0.5, 0.2, 0.9)
    loaded = LoadedModel(net, "tiny", mean, std, "test", 16, "none", None)
    frame = evaluate(loaded, photos, [8], feed="upsampled", predictions=tmp_path / "p", **QUIET)
    assert frame["fed_px"].tolist() == [16]
    assert np.array_equal(Predictions.load(tmp_path / "p").rank[:, 0],
                          slowly(net, photos, 8, 16, mean, std)[0])  # fmt: skip
    evaluate(loaded, photos, [8], mean=(0, 0, 0), std=(1, 1, 1), predictions=tmp_path / "q",
             **QUIET)  # fmt: skip
    plain = slowly(net, photos, 8, None, (0, 0, 0), (1, 1, 1))
    assert np.array_equal(Predictions.load(tmp_path / "q").rank[:, 0], plain[0])


def test_any_feed(photos):
    frame = evaluate(Tiny(), photos, [8, 10, 16], feed=lambda side: min(16, 2 * side), **QUIET)
    assert frame["fed_px"].tolist() == [16, 16, 16]
    assert resolve_feed(np.int64, 16)(8) == 8  # whole numbers of NumPy, too
    with pytest.raises(ValueError, match=r"bad feed: 4\.0 for 8 px: "):
        evaluate(Tiny(), photos, [8], feed=lambda side: side / 2, **QUIET)
    with pytest.raises(ValueError, match="unknown feed: 'up': "):
        evaluate(Tiny(), photos, [8], feed="up", **QUIET)


def test_batches_seed_and_workers_change_nothing(photos, tmp_path):
    looks = [{"batch_size": 4}, {"batch_size": 20}, {"seed": 5}, {"workers": 1}]
    found = []
    for k, options in enumerate(looks):
        frame = evaluate(Tiny(), photos, [8, 16], predictions=tmp_path / f"{k}", **options, **QUIET)
        found.append((frame["top1"].tolist(), Predictions.load(tmp_path / f"{k}")))
    for top1, kept in found[1:]:
        assert top1 == found[0][0]
        assert np.array_equal(kept.rank, found[0][1].rank)
        assert np.array_equal(kept.label, found[0][1].label)


def test_cka_equals_the_probes():
    net, (images, labels) = Tiny(), tensors(37)
    frame = evaluate(net, (images, labels), [8, 12, 16], at="conv2", batch_size=8, seed=3, **QUIET)
    report = probe(net, images, [8, 12, 16], layers=["conv2"], batch_size=8, seed=3, progress=False)
    low, high = report.interval()
    for k in range(3):
        assert frame["cka"][k] == pytest.approx(report.cka[k, 2], abs=1e-6)
    for k in range(2):
        assert frame["cka_low"][k] == pytest.approx(low[k, 2], abs=1e-6)
        assert frame["cka_high"][k] == pytest.approx(high[k, 2], abs=1e-6)
    assert frame["cka"][2] == frame["cka_low"][2] == frame["cka_high"][2] == 1
    assert frame.attrs["features"] == "output of 'conv2'"


def test_cka_by_default_is_of_what_the_classifier_sees():
    net, (images, labels) = Tiny().eval(), tensors(24)
    frame = evaluate(net, (images, labels), [8], reference=16, **QUIET)
    with torch.no_grad():
        seen = []
        for x in (tv.resize(images, [8, 8], antialias=True), images):
            maps = net.conv2(net.relu(net.bn1(net.conv1(x))))
            seen.append(maps.mean((2, 3)).double().numpy())
    assert frame["cka"][0] == pytest.approx(slow_cka(*seen, unbiased=True), abs=1e-5)
    assert math.isnan(frame["cka_low"][0]), "one batch has no error bar"
    assert frame.attrs["features"] == "input of 'fc'"
    assert frame.attrs["reference_px"] == 16
    assert len(frame) == 1


def test_three_images_have_no_cka():
    frame = evaluate(Tiny(), tensors(3), [8, 16], **QUIET)
    assert frame["cka"].isna().all()
    assert frame["n"].tolist() == [3, 3]
    assert evaluate(Tiny(), tensors(8), [8], cka=False, **QUIET)["cka"].isna().all()


@pytest.fixture
def net():
    return build(Tiny(), "relu", [8, 12, 16])


class TestMSUN:
    def test_it_is_what_forward_and_features_give(self, net, tmp_path):
        images, labels = tensors(30)
        sides = [8, 11, 14, 16, 20]
        frame = evaluate(net, (images, labels), sides, predictions=tmp_path / "p", **QUIET)
        kept = Predictions.load(tmp_path / "p")
        net.eval()
        with torch.no_grad():
            whole = net.features(images).flatten(1).double().numpy()
            for k, side in enumerate(sides):
                small = tv.resize(images, [side, side], antialias=True)
                assert np.array_equal(kept.predicted[:, k], net(small).argmax(1).numpy())
                z = net.features(small).flatten(1).double().numpy()
                assert frame["cka"][k] == pytest.approx(slow_cka(z, whole, unbiased=True), abs=1e-4)
                assert frame["gmacs"][k] == net.macs(side) / 1e9
        assert frame.attrs["features"] == "the map that the trunk gets, after 'relu'"
        assert frame["params_m"][0] == sum(p.numel() for p in net.parameters()) / 1e6

    def test_upsampled_feeds_its_reference(self, net):
        frame = evaluate(net, tensors(8), [8, 10], feed="upsampled", **QUIET)
        assert frame["fed_px"].tolist() == [16, 16]
        assert frame.attrs["reference_px"] == 16

    def test_classes_are_found_by_name(self, photos, tmp_path):
        net = build(Tiny(classes=5), "relu", [8, 16], spec={"classes": ["b", "z", "c", "y", "a"]})
        evaluate(net, photos, [8], predictions=tmp_path / "p", **QUIET)
        evaluate(net, photos, [8], predictions=tmp_path / "q", rows=[4, 0, 2], **QUIET)
        p, q = (Predictions.load(tmp_path / name) for name in "pq")
        assert np.array_equal(p.rank, q.rank)
        net.spec = {"classes": ["c", "a", "b", "d"], "rows": [3, 1, 0, 2]}
        evaluate(net, photos, [8], predictions=tmp_path / "p", **QUIET)
        evaluate(net, photos, [8], predictions=tmp_path / "q", rows=[1, 0, 3], **QUIET)
        p, q = (Predictions.load(tmp_path / name) for name in "pq")
        assert np.array_equal(p.rank, q.rank)
        assert p.predicted.max() <= 2

    def test_normalisation_of_its_spec(self, photos, tmp_path):
        spec = {"mean": [0.2, 0.3, 0.4], "std": [0.5, 0.6, 0.7]}
        net = build(Tiny(), "relu", [16], spec=spec)
        evaluate(net, photos, [16], predictions=tmp_path / "p", **QUIET)
        slow = slowly(Tiny(), photos, 16, None, *spec.values())
        assert np.array_equal(Predictions.load(tmp_path / "p").rank[:, 0], slow[0])


def test_rows_of_a_wide_head(photos, tmp_path):
    net, rows = Tiny(classes=50).eval(), [40, 3, 17]
    frame = evaluate(net, photos, [8], rows=rows, predictions=tmp_path / "p", **QUIET)

    class Narrow(nn.Module):
        def forward(self, x):
            return net(x)[:, rows]

    assert np.array_equal(Predictions.load(tmp_path / "p").rank[:, 0],
                          slowly(Narrow(), photos, 8)[0])  # fmt: skip
    assert math.isnan(frame["top5"][0]), "three classes are scored, not fifty"


def test_classes_that_do_not_fit(photos):
    def refused(match, rows=None, classes=50):
        with pytest.raises(ValueError, match=match) as caught:
            evaluate(Tiny(classes=classes), photos, [8], rows=rows, **QUIET)
        assert str(caught.value).count(": ") == 2

    refused("outputs do not fit the classes: 50 outputs for 3 classes of 'photos")
    refused("outputs do not fit the classes: 2 outputs for 3 classes", classes=2)
    refused("rows do not fit the classes: 2 rows for 3 classes", rows=[1, 2])
    refused("rows do not fit the classes: 3 rows for 3 classes", rows=[1, 2, 2])
    refused("no such output: row 50: give 0 to 49", rows=[1, 2, 50])
    refused("no such output: row -1", rows=[1, 2, -1])


def test_numbered_classes_need_not_all_occur():
    frame = evaluate(Tiny(classes=9), tensors(12, classes=6), [8], **QUIET)
    assert not math.isnan(frame["top5"][0])
    with pytest.raises(ValueError, match="5 outputs for 6 classes"):
        evaluate(Tiny(classes=5), tensors(12, classes=6), [8], **QUIET)


def test_mixed_sizes(photos, tmp_path):
    net = Tiny()
    frame = evaluate(net, photos, [16, 8], mixed=True, seed=4, predictions=tmp_path / "p", **QUIET)
    drawn = drawn_sides(20, 8, 16, 4)
    kept = Predictions.load(tmp_path / "p")
    assert np.array_equal(kept.side_px[:, 2], drawn)
    assert kept.view.tolist() == ["16", "8", "mixed"]
    slow = {side: slowly(net, photos, side)[0] for side in set(drawn.tolist())}
    wanted = [slow[side][k] for k, side in enumerate(drawn.tolist())]
    assert kept.rank[:, 2].tolist() == wanted
    row = frame.iloc[2]
    assert str(frame["size_px"].dtype) == "Int64"
    assert frame["size_px"].isna().tolist() == [False, False, True]
    assert row["gmacs"] == pytest.approx(np.mean([macs_by_hand(s) for s in drawn.tolist()]) / 1e9)
    assert row["fed_px"] == drawn.mean()
    assert math.isnan(frame["cka"][2])
    alone = evaluate(net, photos, [16, 8], **QUIET)
    assert frame["cka"][:2].tolist() == pytest.approx(alone["cka"].tolist(), abs=1e-12)


def test_compare_puts_arms_under_each_other(photos, tmp_path):
    net, other = Tiny(), Tiny(seed=7)
    frame = compare(
        {"native": net, "up": (net, {"feed": "upsampled", "predictions": tmp_path / "p"}),
         "other": other},
        photos, [8, 16], n_images=12, seed=2, **QUIET,
    )  # fmt: skip
    assert frame["arm"].tolist() == ["native"] * 2 + ["up"] * 2 + ["other"] * 2
    alone = evaluate(other, photos, [8, 16], n_images=12, seed=2, **QUIET)
    assert frame[frame["arm"] == "other"]["top1"].tolist() == alone["top1"].tolist()
    assert frame["n"].unique().tolist() == [12]
    assert Predictions.load(tmp_path / "p").rank.shape == (12, 2)
    with pytest.raises(ValueError, match="no arms"):
        compare({}, photos, [8])
    with pytest.raises(ValueError, match="one option for several arms: predictions"):
        compare({"a": net}, photos, [8], predictions=tmp_path / "q")


def test_the_glyphs_are_those_to_test_on():
    frame = evaluate(Tiny(classes=62), "glyphs", [16], n_images=70, arm="x", **QUIET)
    assert frame.columns[0] == "arm"
    images = open_labelled("glyphs", split="test", n_images=70)
    again = evaluate(Tiny(classes=62), images, [16], **QUIET)
    train = evaluate(Tiny(classes=62), "glyphs", [16], n_images=70, split="train", **QUIET)
    assert frame["cka"].tolist() == again["cka"].tolist()
    assert frame["top5"].tolist() == again["top5"].tolist() != train["top5"].tolist()
