"""A process of its own that probes a small network, or only runs it: prints its peak memory.

    python peak.py '{"estimator": "exact", "n": 800, ...}'      estimator null: the bare forwards

Prints JSON: peak (bytes), what meta says, how long it took.
"""

import json
import resource
import sys
import threading
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


class Peak(threading.Thread):
    """The most memory of its own that this program held, sampled every millisecond.

    Pages of shared libraries do not count: how many of them lie in memory depends on what other
    programs have read, and the kernel's own high-water mark (VmHWM) counts them.
    """

    def __init__(self):
        super().__init__(daemon=True)
        self.done, self.most = threading.Event(), 0

    def run(self):
        page, file = resource.getpagesize(), Path("/proc/self/statm")
        if not file.exists():  # not Linux: the high-water mark, at the end
            return
        while not self.done.wait(0.001):
            _, resident, shared, *_ = file.read_text().split()
            self.most = max(self.most, (int(resident) - int(shared)) * page)

    def stop(self):
        """The peak in bytes."""
        self.done.set()
        self.join()
        return self.most or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
    peak = Peak()
    peak.start()
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
    kept = {key: meta.get(key) for key in ("estimator", "estimator_why", "n_images")}
    seconds = time.perf_counter() - began
    print(json.dumps({"peak": peak.stop(), "seconds": seconds, "said": said, **kept}))


if __name__ == "__main__":
    main()
