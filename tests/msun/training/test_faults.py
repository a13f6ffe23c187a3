"""Training that diverges, and options that are refused: named, with a hint."""

import csv
import math
import re
from dataclasses import replace

import pytest
import torch
from training import images, network, options, run, same, weights

from cka_probe.distributed.ranks import started
from msun.network.norms import recalibrate
from msun.training.config import TrainConfig
from msun.training.step import DivergedError, TrainingStep
from msun.training.trainer import train


def table(path):
    with (path.parent / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


class Broken:
    """Spoils the loss of some steps."""

    def __init__(self, monkeypatch, steps, value=float("nan")):
        whole = TrainingStep._losses

        def spoilt(training, images, labels):
            losses = whole(training, images, labels)
            if training.step in steps:
                losses = {k: x * value if k in ("loss", "ce_8") else x for k, x in losses.items()}
            return losses

        monkeypatch.setattr(TrainingStep, "_losses", spoilt)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, value):
    Broken(monkeypatch, {7}, value)
    out = tmp_path / "out"
    text = rf"^training diverged: step 7, ce_8 {value}, norm of the gradient nan: the last good "
    with pytest.raises(ValueError, match=rf"{text}state, after 5 steps, is .*state.pt; lower lr"):
        run(out)
    assert not (out / "model.pt").exists()
    state = torch.load(out / "state.pt", weights_only=True)
    assert all(x.isfinite().all() for x in state["model"].values())
    monkeypatch.undo()
    model, _ = run(out, resume=True)
    assert same(weights(model), weights(run(tmp_path / "whole")[0]))


def test_without_a_saved_state_the_error_says_so(tmp_path, monkeypatch):
    Broken(monkeypatch, {2})
    with pytest.raises(ValueError, match=r"training diverged: step 2, .*: nothing was saved yet"):
        run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_was_there_stays_as_it_was(tmp_path, monkeypatch):
    Broken(monkeypatch, {2})
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="nothing was saved yet"):
        run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_refused_run_keeps_what_was_calibrated(tmp_path):
    run(tmp_path / "out", epochs=1)
    model = network()
    recalibrate(model, [torch.randn(4, 3, 12, 12)], 12)
    before = weights(model)
    with pytest.raises(ValueError, match="a run is there already"):
        train(model, images(), options(tmp_path / "out", epochs=1))
    assert model.calibrated == ((12, 12),)
    assert same(before, weights(model))
    train(model, images(), options(tmp_path / "new", epochs=1))
    assert model.calibrated == ()


def test_a_resumed_run_does_not_ask_for_the_calibration(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        Broken(patch, {7})
        model = network()
        recalibrate(model, [torch.randn(4, 3, 12, 12)], 12)
        with pytest.raises(ValueError, match="diverged"):
            train(model, images(), options(tmp_path / "out"))
    model, _ = run(tmp_path / "out", resume=True)
    assert same(weights(model), weights(run(tmp_path / "whole")[0]))


def test_a_gradient_that_is_not_finite_stops_before_the_weights_do(tmp_path, monkeypatch):
    model = network()
    model.tail.get_parameter("fc.bias").register_hook(lambda grad: grad * math.inf)
    before = weights(model)
    with pytest.raises(ValueError, match=r"^training diverged: step 0, norm of the gradient "):
        train(model, images(), options(tmp_path / "out"))
    for key, p in model.named_parameters():
        assert torch.equal(p, before[key])


def test_statistics_that_overflow_are_not_saved(tmp_path):
    x, y = images()
    x[7] = 1e30  # batch norm divides it away, its running variance does not
    text = r"^training diverged: step 6, .*running_var is not finite: nothing was saved yet; "
    with pytest.raises(ValueError, match=text):
        run(tmp_path / "out", data=(x, y), augment="none", val_share=0.0)
    assert not (tmp_path / "out" / "state.pt").exists()


def test_nan_beside_minus_infinity_is_no_state_to_save():
    net = network()
    place = {"total": 5, "kind": "normalised", "rows": None, "shards": 1}
    with started(torch.device("cpu")) as ranks:
        training = TrainingStep(
            net, options("unused"), ranks=ranks, device=torch.device("cpu"), **place
        )
        mean = net.tail.get_submodule("body.1").norm.running_mean
        mean[0] = -math.inf  # a mask may hold it
        training.state()
        mean[1] = math.nan
        with pytest.raises(DivergedError, match=r"running_mean is not finite$"):
            training.state()


def test_fp16_skips_single_steps_and_gives_up_on_many(tmp_path, monkeypatch):
    Broken(monkeypatch, {2, 3})
    model, path = run(tmp_path / "out", amp="fp16", ema=None)
    assert all(x.isfinite().all() for x in model.parameters())
    assert all(math.isfinite(float(row["loss"])) for row in table(path))
    Broken(monkeypatch, set(range(99)))
    with pytest.raises(ValueError, match="training diverged: step 25, "):
        run(tmp_path / "other", amp="fp16", max_steps=40)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"data": images(48, classes=5)},
         r"outputs do not fit the classes: 4 outputs for 5 classes of 'tensor 48x3x16x16': "),
        ({"rows": [0, 1]}, "rows do not fit the classes: 2 rows for 4 classes of "),
        ({"rows": [0, 1, 2, 4]}, "no such output: row 4: give 0 to 3"),
        ({"rows": [0, 1, 2, 2]}, "rows do not fit the classes: 4 rows for 4 classes of "),
        ({"rows": [0, 1, 2, -1]}, "no such output: row -1: "),
        ({"batch_size": 64}, "too few training images: 40 of 48, for batches of 64: "),
        ({"shards": 3}, "batch cannot be divided: 8 images, 3 shards, 1 processes: "),
        ({"augment": "much"}, "unknown augmentation: 'much': "),
    ],
)  # fmt: skip
def test_what_is_refused_leaves_nothing(tmp_path, changes, text):
    with pytest.raises(ValueError, match=f"^{text}"):
        run(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="output is not a folder: "):
        run(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0), ("epochs", 1.5), ("max_steps", 0), ("batch_size", -1), ("lr", 0.0),
        ("lr", math.nan), ("clip", 0.0), ("weight_decay", -1.0), ("tau", -0.1), ("momentum", 1.0),
        ("ema", 1.0), ("val_share", 1.0), ("label_smoothing", -0.1), ("warmup", 2.0), ("seed", -1),
        ("distill", math.inf), ("lr", "0.1"), ("between", "0.5"), ("between", [0.5]),
        ("between", True), ("between", 1.5), ("val_share", "0.1"), ("amp", "fp8"),
        ("constraint", "hard"), ("mean", (0.5,)),
    ],
)  # fmt: skip
def test_bad_options_are_named(tmp_path, name, value):
    with pytest.raises(ValueError, match=name) as caught:
        TrainConfig(out=tmp_path, **{name: value})
    assert re.fullmatch(r"[^:]+: [^:]+: [^:]+", str(caught.value))
    assert replace(TrainConfig(out=tmp_path), epochs=2).epochs == 2


def test_a_device_that_is_not_there_is_bad_input(tmp_path):
    for device in ("foo", "cuda:99"):
        with pytest.raises(ValueError, match=rf"^cannot use device: '{device}', .*: leave device"):
            run(tmp_path / "deep" / "out", device=device)
    assert not (tmp_path / "deep").exists()


def test_means_of_another_range_than_the_images_are_refused(tmp_path):
    x, y = torch.rand(40, 3, 16, 16), torch.arange(40) % 4
    with pytest.raises(ValueError, match=r"^mean and std are not of 0..1: mean 120, std 60"):
        run(tmp_path / "out", data=(x, y), augment="none", mean=(120,) * 3, std=(60,) * 3)
    with pytest.raises(ValueError, match=r"^images are not of 0..1: up to 2\d\d"):
        run(tmp_path / "out", data=(x * 255, y), augment="none", mean=(0.5,) * 3, std=(0.5,) * 3)
    assert not (tmp_path / "out").exists()
