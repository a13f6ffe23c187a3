"""Reducers against numpy in float64, and what an output holds against plain reading of it."""

import math
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cka_probe.activations.outputs import leaves, usable
from cka_probe.activations.reduce import REDUCERS, get_reducer, reducer_name

SHAPES = {
    "vector": (5, 9),
    "tokens": (5, 7, 6),
    "map": (5, 6, 4, 4),
    "long map": (5, 6, 3, 8),
    "map of one position": (5, 6, 1, 1),
    "map as deep as wide": (5, 4, 4, 4),
    "map as deep as high": (5, 4, 4, 6),
    "signal": (5, 6, 8),
    "heads": (5, 3, 7, 2),
    "channels last": (5, 4, 4, 6),
    "channels last, one position": (5, 1, 1, 6),
    "video": (5, 6, 2, 4, 4),
    "video, channels last": (5, 2, 4, 4, 6),
}
CHANNELS_LAST = {"channels last", "channels last, one position", "video, channels last"}
AXES = {"tokens": (2,), "heads": (1, 3)} | dict.fromkeys(CHANNELS_LAST, (3,))
AXES["video, channels last"] = (4,)  # the others have (1,)


def random(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def numpy_mean(x: Tensor, axes: tuple[int, ...]) -> np.ndarray:
    """Position by position, in float64."""
    array = np.moveaxis(x.double().numpy(), axes, range(1, 1 + len(axes)))
    rows = array.reshape(len(array), math.prod(x.shape[a] for a in axes), -1)
    return np.stack([[sum(channel) / len(channel) for channel in row] for row in rows])


@pytest.mark.parametrize("name", SHAPES)
def test_mean_is_the_mean_over_positions(name):
    x, axes = random(SHAPES[name]), AXES.get(name, (1,))
    reduced = get_reducer("mean")(x, axes)
    np.testing.assert_allclose(reduced.numpy(), numpy_mean(x, axes), atol=1e-6)


@pytest.mark.parametrize("name", ["vector", "tokens", "map", "map as deep as high", "video"])
def test_mean_without_axes_reads_maps_channels_first_and_three_axes_as_tokens(name):
    x = random(SHAPES[name])
    expected = numpy_mean(x, AXES.get(name, (1,)))
    np.testing.assert_allclose(get_reducer("mean")(x).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_flatten_keeps_every_number_in_order(name):
    x = random(SHAPES[name])
    expected = np.stack([image.ravel() for image in x.numpy()])
    np.testing.assert_array_equal(get_reducer("flatten")(x).numpy(), expected)


def test_flatten_does_not_copy():
    x = random((4, 3, 5, 5))
    assert get_reducer("flatten")(x).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("side", [1, 2, 4])
@pytest.mark.parametrize("last", [False, True])
def test_grid_pools_blocks_of_a_map(side, last):
    x = random((3, 5, 8, 8))
    size = 8 // side
    expected = np.stack(
        [
            [
                channel[i * size : (i + 1) * size, j * size : (j + 1) * size].mean()
                for channel in image
                for i in range(side)
                for j in range(side)
            ]
            for image in x.double().numpy()
        ]
    )
    given, axes = (x.permute(0, 2, 3, 1), (3,)) if last else (x, (1,))
    reduced = get_reducer(f"grid={side}")(given, axes)
    np.testing.assert_allclose(reduced.numpy(), expected, atol=1e-6)


def test_grid_of_the_map_itself_is_flatten():
    x = random((3, 5, 6, 6))
    assert torch.equal(get_reducer("grid=6")(x), x.flatten(1))
    assert torch.equal(get_reducer("grid=6")(x.flatten(1)), x.flatten(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", ["mean", "grid=1"])
def test_half_precision_is_summed_in_float32(dtype, spec):
    x = (random((2, 3, 64, 64)) + 200).to(dtype)  # 64 * 64 * 200 overflows float16
    reduced = get_reducer(spec)(x)
    assert reduced.dtype == torch.float32
    np.testing.assert_allclose(reduced.numpy(), x.double().mean((2, 3)).numpy(), rtol=1e-6)


@pytest.mark.parametrize("spec", ["flatten", "mean", "grid=2", "tokens"])
def test_float64_stays(spec):
    x = random((3, 5, 6) if spec == "tokens" else (3, 5, 4, 4), dtype=torch.float64)
    assert get_reducer(spec)(x).dtype == torch.float64


def test_tokens_takes_tokens_alone():
    x = random((5, 7, 6))
    np.testing.assert_allclose(get_reducer("tokens")(x).numpy(), numpy_mean(x, (2,)), atol=1e-6)
    for shape in [(5, 6), (5, 6, 4, 4)]:
        with pytest.raises(ValueError, match=r"^reduce 'tokens' needs .*: \(5, 6.*\): use 'mean'"):
            get_reducer("tokens")(random(shape))


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        (
            "grid=4",
            (5, 7, 6),
            r"reduce 'grid=4' needs maps \(n, c, h, w\): \(5, 7, 6\): use 'mean'",
        ),
        ("grid=4", (5, 6, 3, 3), r"map smaller than the grid: 3x3 under 'grid=4': use 'grid=3' or"),
        ("grid=4", (5, 3, 3, 6), r"map smaller than the grid: 3x6 under 'grid=4': use 'grid=3' or"),
        ("grid=4", (5, 6, 8, 2), r"map smaller than the grid: 8x2 under 'grid=4': use 'grid=2' or"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(spec, shape, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        get_reducer(spec)(random(shape))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("flat", "unknown reducer: 'flat': use 'flatten', 'mean', 'tokens', 'grid=K'"),
        ("", "unknown reducer: '': use "),
        ("grid", "bad grid: 'grid': give a positive integer"),
        ("grid=", "bad grid: 'grid=': "),
        ("grid=0", "bad grid: 'grid=0': "),
        ("grid=-1", "bad grid: 'grid=-1': "),
        ("grid=2.5", "bad grid: 'grid=2.5': "),
        ("grid=2\n", "bad grid: "),
    ],
)
def test_bad_names(spec, message):
    with pytest.raises(ValueError, match=r"^(unknown reducer|bad grid)") as caught:
        get_reducer(spec)
    assert str(caught.value).startswith(message)
    assert str(caught.value).count(": ") == 2


def test_neither_name_nor_callable():
    with pytest.raises(TypeError, match=r"^reduce is neither a name nor a callable: int: use"):
        get_reducer(3)


def test_registry_and_lookup_agree():
    assert {name: get_reducer(name) for name in REDUCERS} == REDUCERS
    assert sorted(REDUCERS) == ["flatten", "mean", "tokens"]


def test_a_callable_is_used_and_its_result_checked():
    x = random((5, 6, 4, 4))
    assert torch.equal(get_reducer(lambda x: x.amax((2, 3)))(x), x.amax((2, 3)))
    with pytest.raises(ValueError, match=r"gave \(5, 6, 4, 4\) for \(5, 6, 4, 4\)"):
        get_reducer(lambda x: x)(x)
    with pytest.raises(ValueError, match=r"gave \(6, 5\) for"):
        get_reducer(lambda x: x.mean((2, 3)).T)(x)
    with pytest.raises(TypeError, match="returned no tensor: 'numpy_mean' gave ndarray"):
        get_reducer(partial_named := numpy_last)(x)
    assert reducer_name(partial_named) == "numpy_mean"
    assert reducer_name("grid=2") == "grid=2"
    assert reducer_name(partial(numpy_mean, axes=(1,))) == "partial"


def numpy_last(x: Tensor) -> np.ndarray:
    return numpy_mean(x, (1,))


numpy_last.__name__ = "numpy_mean"

Pair = namedtuple("Pair", ["mean", "spread"])


@dataclass
class Output:
    logits: Any
    hidden: Any = None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, {"": 1}),
        (None, {}),
        ((1, 2), {"0": 1, "1": 2}),
        ([1, None, 3], {"0": 1, "2": 3}),
        ({"out": 1, "aux": None, 7: 2}, {"out": 1, "7": 2}),
        (OrderedDict(out=1, low=(2, 3)), {"out": 1, "low.0": 2, "low.1": 3}),
        (Pair(1, [2]), {"mean": 1, "spread.0": 2}),
        (Output(1), {"logits": 1}),
        (Output(1, {"a": (2, Pair(3, 4))}), {"logits": 1, "hidden.a.0": 2, "hidden.a.1.mean": 3,
                                            "hidden.a.1.spread": 4}),
        ((), {}),
    ],
)  # fmt: skip
def test_leaves_of_an_output(value, expected):
    found = list(leaves(value))
    assert found == list(expected.items())  # in order too


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (3, "output is int, not a tensor"),
        (torch.zeros(4, 5, dtype=torch.int64), "output is int64, not floating point"),
        (torch.zeros(4, 5, dtype=torch.bool), "output is bool, not floating point"),
        (torch.zeros(4, 5, dtype=torch.complex64), "output is complex64, not floating point"),
        (torch.zeros(4, 5).to_sparse(), "output is a nested or sparse tensor"),
        (torch.zeros(4), "output has 1 axes, fewer than 2"),
        (torch.zeros(()), "output has 0 axes, fewer than 2"),
        (torch.zeros(7, 5), "first axis is 7, not the batch of 4"),
        (torch.zeros(4, 0), "output is empty"),
    ],
)
def test_what_is_no_feature_is_refused_with_its_reason(value, reason):
    assert usable(value, 4, nn.Identity(), "", False) == (None, reason)


def test_what_is_a_feature_comes_back_detached():
    value = random((4, 3, 2)).requires_grad_()
    tensor, reason = usable(value, 4, nn.Identity(), "", False)
    assert reason == ""
    assert torch.equal(tensor, value)
    assert not tensor.requires_grad
    assert tensor.data_ptr() == value.data_ptr()


@pytest.mark.parametrize("steps", [3, 4])  # 4 is the batch: the axes must not be mistaken
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_outputs_are_put_batch_first(kind, batch_first, steps):
    net = kind(5, 6, num_layers=4, batch_first=batch_first)
    x = random((4, steps, 5))  # image, step, feature
    with torch.no_grad():
        output = net(x if batch_first else x.transpose(0, 1))
        alone = [
            net(x[i : i + 1] if batch_first else x[i : i + 1].transpose(0, 1)) for i in range(4)
        ]
    found = {field: usable(v, 4, net, field, True)[0] for field, v in leaves(output)}
    assert found.keys() == ({"0", "1.0", "1.1"} if kind is nn.LSTM else {"0", "1"})
    for i, one in enumerate(alone):  # each row is what the image alone gives
        for field, value in leaves(one):
            np.testing.assert_allclose(
                found[field][i].flatten().numpy(), value.flatten().numpy(), atol=1e-6
            )


def test_state_of_a_call_without_a_batch_is_refused():
    net = nn.LSTM(5, 6, num_layers=4)
    _, (state, _) = net(random((4, 5)))  # one sequence of four steps
    assert state.shape == (4, 6)
    assert usable(state, 4, net, "1.0", True)[0] is None


def test_attention_output_is_put_batch_first_and_its_weights_are_left():
    x = random((7, 4, 8))
    net = nn.MultiheadAttention(8, 2)
    output, weights = net(x, x, x)
    assert torch.equal(usable(output, 4, net, "0", True)[0], output.transpose(0, 1))
    assert torch.equal(usable(weights, 4, net, "1", True)[0], weights)


def test_square_tokens_in_a_time_first_network_are_refused():
    x = random((4, 4, 8))
    tensor, reason = usable(x, 4, nn.Identity(), "", True)
    assert tensor is None
    assert "axes 0 and 1 are both 4" in reason
    assert usable(x, 4, nn.Identity(), "", False)[0] is not None
    assert usable(random((4, 4, 8, 8)), 4, nn.Identity(), "", True)[0] is not None  # a map
