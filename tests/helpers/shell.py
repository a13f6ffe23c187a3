"""A folder of images, networks in a file, and the command line: what its tests share."""

from pathlib import Path

import numpy as np
from PIL import Image

from cka_probe.cli.main import main

NET = '''
import torch
from torch import nn

def tiny(width=4, nan=False, slow=0.0):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 8, 3, stride=2), nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )
    if slow:
        import time
        net.register_forward_hook(lambda *a: time.sleep(slow))
    return net

def fixed():
    """Takes 16 px only."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 3))
'''

# `python -c LISTENING program ...`: a process that hears Ctrl-C even where this one, started in the
# background, was told to ignore it
LISTENING = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


def furnish(root):
    """A folder with 20 photographs of noise, and a file of networks."""
    rng = np.random.default_rng(0)
    (root / "photos" / "sub").mkdir(parents=True)
    for i in range(20):
        pixels = rng.integers(0, 255, (24, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((48, 40)).save(
            root / "photos" / f"{'sub/' * (i % 2)}{i}.png"
        )
    (root / "nets.py").write_text(NET)
    return root


def words(place, out, *more, command="run", scales="8,16", net="tiny"):
    return [
        command, "--model", f"{place / 'nets.py'}:{net}", "--data", str(place / "photos"),
        *(("--scales", scales) if command == "run" else ()), "--batch-size", "5",
        "--out", str(out), *more,
    ]  # fmt: skip


def refused(capsys, argv, out=None, status=2):
    """Run, expect one line on stderr and no output; return that line."""
    assert main(argv) == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert error.startswith("cka-probe: ")
    assert error.count(": ") >= 2, error
    assert "Traceback" not in error
    if out is not None:
        assert not Path(out).exists() or not list(Path(out).iterdir())
    return error
