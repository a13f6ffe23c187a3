"""A process of its own that probes a small network, or only runs it: prints its peak memory.

    python peak.py '{"estimator": "exact", "n": 800, ...}'      estimator null: the bare forwards

Prints JSON: peak (bytes), what meta says, how long it took.
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from torch import nn

from cka_probe import probe


class Images(torch.utils.data.Dataset):
    """n images of one side, made when they are asked for."""

    def __init__(self, n, side):
        self.n, self.side = n, side

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        g = torch.Generator().manual_seed(i)
        coarse = torch.randn(1, 3, 4, 4, generator=g)
        noise = 0.3 * torch.randn(3, self.side, self.side, generator=g)
        return nn.functional.interpolate(coarse, self.side)[0] + noise, 0


def peak_bytes():
    """The most memory that this program held; not what it was forked from, as getrusage counts."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def network(width, layers):
    torch.manual_seed(0)
    blocks = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
    for _ in range(layers - 1):
        blocks += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def main():
    import torch._dynamo  # what a forecast on the meta device loads, in every process

    ask = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    n, side, estimator = ask.pop("n"), ask.pop("side"), ask.pop("estimator")
    images, net = Images(n, side), network(ask.pop("width"), ask.pop("layers")).eval()
    batch, began, meta, said = ask.pop("batch_size"), time.perf_counter(), {}, []
    if estimator is None:
        with torch.inference_mode():
            for start in range(0, n, batch):
                stop = min(start + batch, n)
                net(torch.stack([images[i][0] for i in range(start, stop)]))
    else:
        names = [str(i) for i, block in enumerate(net) if isinstance(block, nn.Conv2d)]
        meta = probe(
            net, images, layers=names, estimator=estimator, batch_size=batch, progress=False,
            say=said.append, **ask,
        ).meta  # fmt: skip
    peak = peak_bytes()
    kept = {key: meta.get(key) for key in ("estimator", "estimator_why", "n_images")}
    seconds = time.perf_counter() - began
    print(json.dumps({"peak": peak, "seconds": seconds, "said": said, **kept}))


if __name__ == "__main__":
    main()
