"""However a collection ends, the network and the random state are as they were before."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cka_probe.activations.hooks import Collector, Tap, failing_module, preserved_rng


class Noisy(nn.Module):
    """Draws from every global generator, in eval mode too, and can be told to fail."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.error: BaseException | None = None

    def forward(self, x):
        noise = torch.rand(()) + float(np.random.rand()) + random.random()  # noqa: NPY002
        x = self.conv(x) + noise
        if self.error is not None:
            raise self.error
        return x


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True))
        self.noisy = Noisy()
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.drop(self.noisy(self.stem(x))).mean((2, 3)))


def everything(model: nn.Module) -> dict[str, Any]:
    """What must not change, as plain values."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "training": {path: module.training for path, module in model.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "values": {name: value.tolist() for name, value in model.state_dict().items()},
        "hooks": {
            path: [list(getattr(module, kind).items()) for kind in hooks]
            for path, module in model.named_modules()
        },
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),  # noqa: NPY002
        "random": random.getstate(),
        "grad": torch.is_grad_enabled(),
    }


@pytest.fixture
def model():
    """A network of mixed flags, as fine-tuning leaves it, with a hook of its own."""
    torch.manual_seed(0)
    net = Net().train()
    net.stem[1].eval()
    net.drop.eval()
    net.stem[0].weight.requires_grad_(False)
    net.head.bias.requires_grad_(False)
    net.stem[0].register_forward_hook(lambda module, args, output: None)
    return net


def images() -> Tensor:
    return torch.linspace(-1, 1, 4 * 3 * 5 * 5).view(4, 3, 5, 5)


def ignore(tap: Tap, features: Tensor) -> None:
    pass


def fail(error: BaseException):
    def failing(*_: Any) -> None:
        raise error

    return failing


def in_success(model):
    flags = []
    with Collector(model, "*") as collector:
        collector.run(images(), lambda tap, features: flags.append(model.training))
        assert not any(module.training for module in model.modules())
        collector.run(images(), ignore)
    assert flags == [False] * 8


def in_a_bad_layer(model):
    with Collector(model, ["stem", "steam"]):
        pass


def in_a_bad_reducer(model):
    with Collector(model, "stem", reduce="media"):
        pass


def in_a_field_that_is_not_there(model):
    with Collector(model, ["stem", "noisy:out"]) as collector:
        collector.run(images(), ignore)


def in_forward(model):
    model.noisy.error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with Collector(model) as collector:
        collector.run(images(), ignore)


def in_ctrl_c(model):
    model.noisy.error = KeyboardInterrupt()
    with Collector(model) as collector:
        collector.run(images(), ignore)


def in_ctrl_c_within_the_sink(model):
    with Collector(model) as collector:
        collector.run(images(), fail(KeyboardInterrupt()))


def in_the_sink(model):
    with Collector(model) as collector:
        collector.run(images(), fail(ValueError("sink: went: wrong")))


def in_the_reducer(model):
    with Collector(model, reduce=fail(ZeroDivisionError("by zero"))) as collector:
        collector.run(images(), ignore)


def between_runs(model):
    with Collector(model) as collector:
        collector.run(images(), ignore)
        raise StopIteration


def in_eval(model):
    """`eval` itself fails half way."""
    model.drop.train = fail(OSError("no"))
    try:
        with Collector(model, "stem"):
            pass
    finally:
        del model.drop.train


ENDINGS = [
    (in_success, None), (in_a_bad_layer, ValueError), (in_a_bad_reducer, ValueError),
    (in_a_field_that_is_not_there, ValueError), (in_forward, RuntimeError),
    (in_ctrl_c, KeyboardInterrupt), (in_ctrl_c_within_the_sink, KeyboardInterrupt),
    (in_the_sink, ValueError), (in_the_reducer, ZeroDivisionError),
    (between_runs, StopIteration), (in_eval, OSError),
]  # fmt: skip


@pytest.mark.parametrize(
    ("ending", "error"), ENDINGS, ids=lambda value: value.__name__ if value else ""
)
def test_everything_is_as_before(model, ending, error):
    before = everything(model)
    if error is None:
        ending(model)
    else:
        with pytest.raises(error):
            ending(model)
    after = everything(model)
    for what in before:
        assert after[what] == before[what], what


def test_the_check_above_sees_what_a_plain_forward_changes(model):
    before = everything(model)
    model.eval()(images())
    after = everything(model)
    assert {what for what in before if before[what] != after[what]} == {
        "training", "torch", "numpy", "random",
    }  # fmt: skip


def test_random_numbers_go_on_between_batches(model):
    """Two batches see different noise: the state is put back at the end, not before each run."""
    seen = []
    with Collector(model, "noisy") as collector:
        for _ in range(2):
            collector.run(images(), lambda tap, features: seen.append(features.clone()))
    assert not torch.equal(*seen)


def test_networks_that_override_train_are_asked_to_go_back():
    class Merges(nn.Linear):
        """Merges its weights in eval mode, as LoRA layers do."""

        def train(self, mode: bool = True):
            if mode != self.training:
                self.weight.data += -1 if mode else 1
                self.flips = getattr(self, "flips", 0) + 1
            return super().train(mode)

    model = nn.Sequential(Merges(3, 3), nn.Sequential(Merges(3, 3), nn.Dropout())).train()
    model[1].eval()
    model[1][0].flips = 0
    nn.init.ones_(model[0].weight)  # so that merging is exact
    before = everything(model)
    with Collector(model, "0") as collector:
        collector.run(torch.ones(4, 3), ignore)
    assert everything(model) == before
    assert (model[0].flips, model[1][0].flips) == (2, 0)  # what was in eval mode is left alone


def test_a_norm_that_refuses_to_train_stays_frozen():
    class Frozen(nn.BatchNorm2d):
        def train(self, mode: bool = True):
            return super().train(False)

    model = nn.Sequential(nn.Conv2d(3, 3, 1), Frozen(3)).train()
    with Collector(model, "*") as collector:
        collector.run(images(), ignore)
    assert [module.training for module in model.modules()] == [True, True, False]


class FullError(Exception):
    def __str__(self):
        return "always the same"


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (ValueError("NaN features: 3 of 8: look"), ValueError,
         "NaN features: layer 'stem.0', 3 of 8: look"),
        (ValueError("boom"), ValueError, "boom: layer 'stem.0': while tapping it"),
        (TypeError("a: b"), TypeError, "a: layer 'stem.0', b"),
        (RuntimeError(), RuntimeError, "RuntimeError while tapping: layer 'stem.0': "),
        (KeyError("width"), KeyError, "'width': layer 'stem.0': while tapping it"),
        (OSError(28, "No space left"), OSError, "[Errno 28] No space left: layer 'stem.0'"),
        (ValueError("NaN: 'stem.0': look"), ValueError, "NaN: 'stem.0': look"),
        (FullError(1), RuntimeError, "FullError while tapping: layer 'stem.0': always the same"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", ["sink", "reducer"])
def test_an_error_in_sink_or_reducer_names_the_layer(model, raised, kind, message, where):
    args = raised.args
    reduce, sink = ("flatten", fail(raised)) if where == "sink" else (fail(raised), ignore)
    with pytest.raises(kind) as caught, Collector(model, "stem.*", reduce=reduce) as collector:
        collector.run(images(), sink)
    assert str(caught.value.args[0] if kind is KeyError else caught.value).startswith(message[:8])
    assert "layer 'stem.0'" in str(caught.value) or "'stem.0'" in message
    if kind is not KeyError:
        assert str(caught.value) == message
    assert caught.value is raised or caught.value.__cause__ is raised
    raised.args = args  # the same object serves both parameters of `where`
    if isinstance(raised, OSError):
        raised.strerror = args[1]


def test_collector_is_for_a_with_statement(model):
    collector = Collector(model, "stem")
    with pytest.raises(RuntimeError, match=r"^collector not entered: run: "):
        collector.run(images(), ignore)
    with collector, pytest.raises(RuntimeError, match=r"^collector entered twice: "), collector:
        pass
    with collector:  # and again
        collector.run(images(), ignore)
    assert list(collector.labels.values()) == ["stem"]


def test_two_collectors_on_one_network(model):
    counts = [0, 0]

    def counting(place: int):
        def sink(tap: Tap, features: Tensor) -> None:
            counts[place] += 1

        return sink

    before = everything(model)
    with Collector(model, "stem.*") as outer, Collector(model, "head") as inner:
        outer.run(images(), counting(0))
        inner.run(images(), counting(1))
    assert counts == [3, 1]
    assert everything(model) == before


def test_a_network_that_keeps_tensors_still_trains_afterwards():
    class Caches(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.cache = None

        def forward(self, x):
            if self.cache is None:
                self.cache = torch.linspace(0, 1, 3)
            return self.linear(x) * self.cache

    model = Caches()
    with Collector(model, "*") as collector:
        collector.run(torch.ones(4, 3), ignore)
    model(torch.ones(4, 3)).sum().backward()
    assert model.linear.weight.grad is not None


def test_a_forward_of_the_caller_is_not_collected(model):
    taps = []
    with Collector(model, "stem") as collector:
        model(images())
        collector.run(images(), lambda tap, features: taps.append(tap))
        model(images())
    assert taps == [Tap("stem", "", 0)]


def test_preserved_rng():
    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), float(torch.rand(()))  # noqa: NPY002

    with preserved_rng():
        first = draw()
        assert draw() != first
    with pytest.raises(KeyError), preserved_rng():  # noqa: PT012
        assert draw() == first
        raise KeyError
    assert draw() == first


def test_failing_module():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 9)), nn.ReLU())
    for wrapped in (model, nn.DataParallel(model, [0])):  # which puts it on a card, if any
        x = images().to(next(model.parameters()).device)
        with pytest.raises(RuntimeError) as caught:
            wrapped(x)
        assert failing_module(caught.value, wrapped) == "0.1"
    with pytest.raises(RuntimeError) as caught, Collector(model, "0.0") as collector:
        collector.run(x, ignore)
    assert failing_module(caught.value, model) == "0.1"
    with pytest.raises(TypeError) as caught:
        model()
    assert failing_module(caught.value, model) == ""
    assert failing_module(ValueError(), model) is None
    with pytest.raises(RuntimeError) as caught:
        nn.Linear(3, 3)(torch.ones(2, 5))
    assert failing_module(caught.value, model) is None  # a module, but not one of this network
