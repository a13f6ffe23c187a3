"""The Collector against hooks of our own that clone, and against every way of ending badly."""

import gc
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from cka_probe.activations.hooks import Collector, Tap


def images(n: int = 4, side: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


class Kept(dict):
    """A sink that keeps copies, by tap."""

    def __call__(self, tap: Tap, features: Tensor) -> None:
        assert tap not in self
        assert not features.requires_grad
        self[tap] = features.clone()


def collected(model: nn.Module, x: Any, layers: Any = "*", **more: Any) -> tuple[dict, Collector]:
    kept = Kept()
    with Collector(model, layers, **more) as collector:
        collector.run(x, kept)
    assert list(collector.labels) == list(collector.shapes) == list(kept)
    return {collector.labels[tap]: features for tap, features in kept.items()}, collector


def cloned(model: nn.Module, x: Any) -> list[tuple[str, Any]]:
    """(path, clone of the output) in the order of firing: plain hooks, another code."""
    fired, handles = [], []
    for path, module in model.named_modules():
        if path:
            handles.append(
                module.register_forward_hook(lambda m, i, o, p=path: fired.append((p, o.clone())))
            )
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return fired


@pytest.mark.parametrize("name", ["vgg16_bn", "resnet50", "mobilenet_v2", "densenet121"])
@pytest.mark.parametrize("threads", [1], indirect=True)
def test_every_layer_is_what_a_clone_at_hook_time_holds(name, threads):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    x = images(4, 64)
    truth = cloned(model, x)
    times, seen, expected = Counter(path for path, _ in truth), Counter(), []
    for path, output in truth:
        expected.append((f"{path}#{seen[path]}" if times[path] > 1 else path, output))
        seen[path] += 1
    values, views, copies = [], {}, {}

    def sink(tap: Tap, features: Tensor) -> None:
        values.append((tap, features.clone()))
        views[tap], copies[tap] = features, values[-1][1]

    with Collector(model, "*") as collector:
        output = collector.run(x, sink)
    assert torch.equal(output, model(x))
    assert [collector.labels[tap] for tap, _ in values] == [label for label, _ in expected]
    for (tap, features), (label, output) in zip(values, expected, strict=True):
        assert collector.shapes[tap] == output.shape[1:]
        assert torch.equal(features, output.flatten(1)), label
    assert not collector.skipped
    inplace = sum(getattr(m, "inplace", False) for m in model.modules())
    rewritten = sum(not torch.equal(view, copies[tap]) for tap, view in views.items())
    assert rewritten >= 1 if inplace else rewritten == 0  # else the comparison above is no test


def test_reducer_is_applied_in_the_hook():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(inplace=True)).eval()
    truth = dict(cloned(model, images()))
    for reduce, reference in [
        ("mean", lambda x: x.mean((2, 3))),
        ("grid=2", lambda x: x.unfold(2, 3, 3).unfold(3, 3, 3).mean((4, 5)).flatten(1)),
        (lambda x: x[:, :, 0, 0], lambda x: x[:, :, 0, 0]),
    ]:
        found, _ = collected(model, images(), reduce=reduce)
        for path, output in truth.items():
            torch.testing.assert_close(found[path], reference(output))


class Outputs(OrderedDict):
    """Like the ModelOutput of Hugging Face."""


@dataclass
class Data:
    out: Tensor
    more: Any = None


class Makes(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


@pytest.mark.parametrize(
    ("make", "expected", "skipped"),
    [
        (lambda x: (x, 2 * x), {"0:0": 1, "0:1": 2}, {}),
        (lambda x: [x, None, [3 * x]], {"0:0": 1, "0:2.0": 3}, {}),
        (lambda x: {"out": x, "aux": 2 * x}, {"0:out": 1, "0:aux": 2}, {}),
        (lambda x: Outputs(b=x, a=(2 * x,)), {"0:b": 1, "0:a.0": 2}, {}),
        (lambda x: Data(x, {"k": 4 * x}), {"0:out": 1, "0:more.k": 4}, {}),
        (lambda x: torch.max(x, 1), {"0:0": None}, {"0:1": "output is int64, not floating point"}),
        (lambda x: None, {}, {"0": "output is NoneType, not a tensor"}),
        (lambda x: x.flatten(0, 1), {}, {"0": "first axis is 12, not the batch of 4"}),
        (lambda x: (x, x[0], 7), {"0:0": 1}, {"0:1": "first axis is 3, not the batch of 4",
                                              "0:2": "output is int, not a tensor"}),
        (lambda x: x.argmax(1), {}, {"0": "output is int64, not floating point"}),
        (lambda x: x.mean((1, 2, 3)), {}, {"0": "output has 1 axes, fewer than 2"}),
    ],
)  # fmt: skip
def test_outputs_that_are_no_plain_tensor(make, expected, skipped):
    x = images()
    found, collector = collected(nn.Sequential(Makes(make)), x)
    assert list(found) == list(expected)
    for label, factor in expected.items():
        truth = x.max(1).values if factor is None else factor * x
        assert torch.equal(found[label], truth.flatten(1))
    assert collector.skipped == skipped
    assert collector.unreached == []


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 1)
        self.conv2 = nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU(inplace=True)
        self.unused = nn.Conv2d(3, 4, 1)
        self.pair = Makes(lambda x: (x, -x))
        self.times = 3

    def forward(self, x):
        x = self.relu(self.conv1(x))
        for _ in range(self.times - 1):
            x = self.relu(self.conv2(x))
            self.pair(x)
        return x


SHARED = ["conv1", "relu#0", "conv2#0", "relu#1", "pair:0#0", "pair:1#0", "conv2#1", "relu#2",
          "pair:0#1", "pair:1#1"]  # fmt: skip


def test_shared_modules_are_told_apart_by_their_calls():
    model = Shared().eval()
    found, collector = collected(model, images())
    assert list(found) == SHARED
    x = model.conv1(images()).relu()
    assert torch.equal(found["relu#0"], x.flatten(1))
    x = model.conv2(x).relu()
    assert torch.equal(found["relu#1"], x.flatten(1))
    assert torch.equal(found["pair:1#0"], -x.flatten(1))
    assert torch.equal(found["conv2#1"], model.conv2(x).flatten(1))
    assert collector.unreached == ["unused"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (["relu#1", "conv1"], ["conv1", "relu#1"]),
        ("*#1", ["relu#1", "conv2#1", "pair:0#1", "pair:1#1"]),
        ("pair:1", ["pair:1#0", "pair:1#1"]),
        (["pair:1#1", "pair:0#0"], ["pair:0#0", "pair:1#1"]),
        ("conv1#0", ["conv1"]),
    ],
)
def test_suffixes_keep_one_output(layers, expected):
    found, _ = collected(Shared(), images(), layers)
    assert list(found) == expected


def test_every_label_is_a_name_that_selects_its_layer_alone():
    model = Shared()
    everything, _ = collected(model, images())
    for label, features in everything.items():
        found, _ = collected(model, images(), label)
        assert list(found) == [label]
        assert torch.equal(found[label], features)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("relu#3", r"no such output: 'relu#3': it fired 3 times in one forward, with one tensor"),
        ("pair:2", r"no such output: 'pair:2': it fired 2 times .*, with outputs '0', '1'"),
        ("conv1:out", r"no such output: 'conv1:out': it fired 1 times"),
    ],
)
def test_an_output_that_does_not_exist_is_an_error(layers, message):
    with Collector(Shared(), [layers, "conv2"]) as c, pytest.raises(ValueError, match=message):
        c.run(images(), Kept())


def test_a_glob_with_a_suffix_names_what_has_no_such_output():
    found, collector = collected(Shared(), images(), "*:1")
    assert list(found) == ["pair:1#0", "pair:1#1"]
    assert collector.skipped["conv1:1"] == "the module has no such output"


def test_the_network_itself():
    found, _ = collected(nn.Linear(3, 2), torch.ones(4, 3), None)
    assert list(found) == ["(model)"]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("steps", [4, 6])  # with 4 the sequence is as long as the batch
def test_lstm_over_features_of_a_cnn(batch_first, steps):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.cnn = nn.Conv2d(3, 5, 3)
            self.lstm = nn.LSTM(5, 7, num_layers=2, batch_first=batch_first)
            self.end = nn.Identity()

        def forward(self, x):
            rows = self.cnn(x).mean(3).transpose(1, 2)  # (n, t, 5)
            output, _ = self.lstm(rows if batch_first else rows.transpose(0, 1))
            output = self.end(output)  # which knows nothing of time
            return output[:, -1] if batch_first else output[-1]

    model, x = Reader(), images(4, steps + 2)
    found, collector = collected(model, x)
    assert list(found) == ["cnn", "lstm:0", "lstm:1.0", "lstm:1.1", "end"][: 4 + batch_first]
    shapes = [(5, steps, steps), (steps, 7), (2, 7), (2, 7), (steps, 7)]
    assert list(collector.shapes.values()) == shapes[: 4 + batch_first]
    assert list(collector.skipped) == ([] if batch_first else ["end"])
    for i in range(4):  # an image alone gives what it gives in the batch
        alone, _ = collected(model, x[i : i + 1])
        for label, features in found.items():
            torch.testing.assert_close(features[i], alone[label][0])
    mean, _ = collected(model, x, "lstm:0", reduce="mean")
    torch.testing.assert_close(mean["lstm:0"], found["lstm:0"].view(4, steps, 7).mean(1))


def test_dtypes_reach_the_sink_unchanged():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).to(dtype)
        found, _ = collected(model, torch.ones(4, 3, dtype=dtype))
        assert {features.dtype for features in found.values()} == {dtype}


def test_autocast_reaches_the_network_but_not_the_sink():
    model, products = nn.Sequential(nn.Linear(3, 4), nn.ReLU()), []

    def sink(tap, features):
        products.append((features.dtype, (features.float() @ features.float().T).dtype))

    with Collector(model, "*") as collector, torch.autocast("cpu", torch.bfloat16):
        collector.run(torch.ones(4, 3), sink)
        assert torch.is_autocast_enabled("cpu")
    assert products == [(torch.bfloat16, torch.float32)] * 2


def test_hooks_of_the_user_come_first():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Identity())
    model[0].register_forward_hook(lambda module, args, output: output * 3)
    x = images()
    found, _ = collected(model, x)
    truth = nn.functional.conv2d(x, model[0].weight, model[0].bias) * 3
    assert torch.equal(found["0"], truth.flatten(1))
    assert len(model[0]._forward_hooks) == 1


def test_nothing_outlives_the_hook():
    model = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(6)], nn.ReLU(inplace=True))
    refs: list[StorageWeakRef] = []
    alive: list[int] = []

    def sink(tap: Tap, features: Tensor) -> None:
        refs.append(StorageWeakRef(features.untyped_storage()))
        alive.append(sum(not ref.expired() for ref in refs))

    gc.disable()  # so that what is gone is gone by counting references alone
    try:
        with Collector(model, [str(i) for i in range(7)]) as collector:
            collector.run(images(), sink)
            # a layer's input lives while it runs, so two of seven; and the ReLU's is its output
            assert max(alive) <= 3
            assert all(ref.expired() for ref in refs)
    finally:
        gc.enable()


@pytest.mark.parametrize("times", [2, 4])
def test_a_layer_that_fires_as_the_data_has_it_is_an_error(times):
    model = Shared()
    with Collector(model, "relu") as collector:
        collector.run(images(), Kept())
        collector.run(images(6), Kept())  # another batch size is the same input size
        model.times = times
        with pytest.raises(ValueError, match=r"^outputs differ between batches .*: layer 'relu#"):
            collector.run(images(seed=1), Kept())


def test_another_input_size_may_have_other_taps():
    model = Shared()
    with Collector(model, "relu") as collector:
        model.times = 1
        collector.run(images(), Kept())
        assert list(collector.labels.values()) == ["relu"]
        model.times = 2
        collector.run(images(4, 10), Kept())
    assert list(collector.labels.values()) == ["relu", "relu#1"]
    assert set(collector.shapes.values()) == {(4, 10, 10)}


def test_lists_and_dicts_of_inputs():
    class Stacks(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            parts = x.values() if isinstance(x, dict) else x
            return self.act(torch.cat([p if p.ndim == 4 else p[None] for p in parts]))

    x = images()
    for given in (list(x), {"a": x}, (x,)):
        found, _ = collected(Stacks(), given)
        assert torch.equal(found["act"], x.relu().flatten(1))
    with Collector(Stacks(), "*") as c, pytest.raises(TypeError, match=r"^no input tensor: str:"):
        c.run("x", Kept())


def test_wrapped_networks_are_tapped_inside():
    model = Shared()
    wrapped = nn.DataParallel(model, [0])  # which puts it on a card, if there is one
    found, _ = collected(wrapped, images().to(model.conv1.weight.device))
    assert list(found) == SHARED
