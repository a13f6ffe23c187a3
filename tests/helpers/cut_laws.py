"""The laws of a cut: tail(head(x)) is model(x), to the bit, and both hold each parameter once."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import msun


def noise(n, side, seed=0):
    """Images (n, 3, side, side)."""
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def assert_same(a, b):
    """The same nest of equal tensors."""
    (a, kind_a), (b, kind_b) = tree_flatten(a), tree_flatten(b)
    assert kind_a == kind_b
    assert all(torch.equal(u, v) for u, v in zip(a, b, strict=True))


def assert_parted(model, head, tail):
    """Each parameter once, and the keys of a checkpoint as they were."""
    parts = [*head.parameters(), *tail.parameters()]
    assert sorted(map(id, parts)) == sorted(map(id, model.parameters()))
    keys = model.state_dict(keep_vars=True).keys()
    assert keys == head.state_dict().keys() | tail.state_dict().keys()
    assert not head.state_dict().keys() & tail.state_dict().keys()


@torch.no_grad()
def assert_law(model, at, *images, outputs=None):
    """In eval mode, for images of any of these sizes; `outputs` where they are known already."""
    head, tail = msun.cut(model, at, images[0])
    assert_parted(model, head, tail)
    for x, wanted in zip(images, outputs or map(model, images), strict=True):
        z = head(x)
        before = z.clone()
        assert_same(tail(z), wanted)
        assert torch.equal(z, before), "the tail wrote into its map"
        assert z.ndim == 4
        assert len(z) == len(x)
    return head, tail


@torch.no_grad()
def assert_law_in_training(model, head, tail, x):
    """In training mode, dropout drawn alike; batch norms as before afterwards."""
    with buffers_kept(model), torch.random.fork_rng(devices=[]):
        for net in (model, head, tail):
            net.train()
        torch.manual_seed(1)
        wanted = model(x)
        torch.manual_seed(1)
        assert_same(tail(head(x)), wanted)
    for net in (model, head, tail):
        net.eval()


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Statistics that a forward in training mode moves are as before afterwards."""
    before: list[tuple[Tensor, Tensor]] = [(b, b.clone()) for b in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)
