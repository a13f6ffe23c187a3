"""A network in a file, and what its loading says."""

import pytest
import torch

from cka_probe.models.load import load_model

NET = """
import torch
from torch import nn

def make(width=4, classes=2):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Linear(width, classes))

def number():
    return 5

def broken():
    raise RuntimeError("first: second\\nthird")

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))
        self.register_buffer("mask", torch.full((2,), float("-inf")))

ready = nn.Linear(2, 2)
"""


def write_net(folder):
    (folder / "net.py").write_text(NET)
    return str(folder / "net.py") + ":make"


def refused(*args, error=ValueError, **options):
    """The one line that a bad call gives."""
    with pytest.raises(error) as caught:
        load_model(*args, **options)
    text = str(caught.value)
    assert text.count(": ") == 2, text
    assert "\n" not in text
    return text


def same(model, state):
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[k], state[k]) for k in own)
