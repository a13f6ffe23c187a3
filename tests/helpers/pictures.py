"""Small images whose grey level tells which one they are."""

from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset

from cka_probe.inputs.batches import iterate_batches


def write(folder, n, size=(6, 6)):
    """Image k has the one grey level k: a row tells which image it is."""
    for k in range(n):
        path = folder / f"{'abc'[k % 3]}/{k:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (k, k, k)).save(path)
    return folder


def level(row):
    return round(float(row.flatten()[0]) * 255)


def level_of(name):
    return int(Path(name).stem)


def every(source, transforms, **options):
    return list(iterate_batches(source, transforms, **{"batch_size": 8, "seed": 0, **options}))


def assert_same(first, second):
    assert [(b.index, b.ids, b.bad, b.left_out) for b in first] == [
        (b.index, b.ids, b.bad, b.left_out) for b in second
    ]
    for a, b in zip(first, second, strict=True):
        assert a.views.keys() == b.views.keys()
        assert all(torch.equal(a.views[v], b.views[v]) for v in a.views)


class Items(Dataset):
    def __init__(self, items):
        self.items = items
        self.asked = []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.asked.append(index)
        item = self.items[index]
        return item() if callable(item) else item
