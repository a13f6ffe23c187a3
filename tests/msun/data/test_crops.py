"""Crops: the same at every scale, a function of (seed, epoch, image), antialiased once."""

import numpy as np
import pytest
import torch
from PIL import Image

from cka_probe.inputs.views import View, resize
from msun.data.crops import Augment, Crops, augmentation, shuffled
from msun.data.labelled import open_labelled


@pytest.fixture
def pair():
    return open_labelled((torch.rand(12, 3, 24, 20), [k % 3 for k in range(12)]))


def batches(*args, epoch=0, workers=0, rows=None, firsts=None, **kwargs):
    how = {"epoch": epoch, "workers": workers, "firsts": firsts}
    return list(Crops(*args, **kwargs).batches(rows or [[0, 5], [7]], **how))


def area_filter(length, side):
    """The antialiased triangle filter as a (side, length) matrix, pixel by pixel."""
    scale = length / side
    out = np.zeros((side, length))
    for i in range(side):
        for j in range(length):
            out[i, j] = max(0.0, 1 - abs((j + 0.5) - (i + 0.5) * scale) / max(scale, 1.0))
    return out / out.sum(1, keepdims=True)


def test_every_scale_shows_the_same_crop_resized_once(pair):
    augment = Augment(area=(0.2, 0.9), flip=True)
    ((looks, labels),) = batches(pair, (6, 9), augment, rows=[[3, 8, 1, 2]], seed=4)
    assert labels.tolist() == [0, 2, 1, 2]
    u = np.random.default_rng([4, 0, 1]).random((12, 5))
    flips = set()
    for place, i in enumerate([3, 8, 1, 2]):
        top, left, height, width = augment.box(u[i], 24, 20)
        crop = pair.load(i)[0][:, top : top + height, left : left + width].double().numpy()
        flips.add(bool(u[i, 4] < 0.5))
        if u[i, 4] < 0.5:
            crop = crop[:, :, ::-1]
        for side in (6, 9):
            want = area_filter(height, side) @ crop @ area_filter(width, side).T
            np.testing.assert_allclose(looks[side][place].numpy(), want, atol=1e-5)
    assert flips == {True, False}


def test_without_augmentation_it_is_the_view_of_the_probe(pair):
    for looks, _ in batches(pair, (8, 20), None, (0.5,) * 3, (0.2,) * 3, rows=[[0, 5]]):
        for side in (8, 20):
            view = View(side, mean=(0.5,) * 3, std=(0.2,) * 3)
            want = torch.stack([view(pair.load(i)[0]) for i in (0, 5)])
            assert torch.equal(looks[side], want)


def test_crops_are_normalised(pair):
    plain = batches(pair, (8,), Augment(), seed=2)
    other = batches(pair, (8,), Augment(), (0.1, 0.2, 0.3), (0.5, 1.0, 2.0), seed=2)
    for (a, _), (b, _) in zip(plain, other, strict=True):
        mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 1.0, 2.0])
        want = (a[8] - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        torch.testing.assert_close(b[8], want)


def test_a_crop_depends_on_seed_epoch_and_image_alone(pair):
    (a, _), (b, _) = batches(pair, (8,), Augment(), seed=1)
    ((c, _),) = batches(pair, (8,), Augment(), seed=1, rows=[[7, 5, 0]])
    assert torch.equal(torch.cat([a[8], b[8]]), c[8][[2, 1, 0]])
    ((d, _),) = batches(pair, (8,), Augment(), seed=1, epoch=1, rows=[[7, 5, 0]])
    ((e, _),) = batches(pair, (8,), Augment(), seed=2, rows=[[7, 5, 0]])
    assert not torch.equal(c[8], d[8])
    assert not torch.equal(c[8], e[8])


def test_memory_and_dataset_give_the_same():
    from torch.utils.data import TensorDataset

    images, labels = torch.rand(5, 3, 16, 16), torch.tensor([0, 1, 0, 1, 0])
    stacked, listed = open_labelled((images, labels)), open_labelled(TensorDataset(images, labels))
    assert listed.stacked([0]) is None
    normal = ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    for how in ((Augment(),), (None,), (Augment(), *normal), (None, *normal)):
        got = batches(stacked, (4, 8), *how, rows=[[4, 2]])
        want = batches(listed, (4, 8), *how, rows=[[4, 2]])
        for (a, x), (b, y) in zip(got, want, strict=True):
            assert torch.equal(a[4], b[4])
            assert torch.equal(a[8], b[8])
            assert torch.equal(x, y)


def test_an_image_looks_the_same_alone_and_among_others():
    from torch.utils.data import TensorDataset

    torch.manual_seed(0)
    many = torch.rand(12, 3, 20, 20)
    many[3:6] = many[3:6, :1]  # grey, in memory of their own
    labels = torch.arange(12) % 2
    grey = [(x[:1].expand(3, -1, -1) if k in (0, 4) else x, int(y))
            for k, (x, y) in enumerate(zip(many, labels, strict=True))]  # fmt: skip
    many[0] = many[0, :1]
    for data in ((many, labels), TensorDataset(many, labels), grey):
        opened = open_labelled(data)
        for how in (None, Augment(), Augment(area=(0.8, 1), ratio=(1, 1))):
            ((whole, _),) = batches(opened, (8, 20), how, rows=[range(12)])
            alone = batches(opened, (8, 20), how, rows=[[k] for k in range(12)])
            for side in (8, 20):
                assert torch.equal(whole[side], torch.cat([look[side] for look, _ in alone]))


def test_a_scale_also_sees_the_sizes_that_it_serves():
    data = open_labelled((torch.rand(200, 1, 40, 40), torch.zeros(200, dtype=torch.int64)))
    rows = [[k, 0, 1] for k in range(200)]
    served = ((8, 15), (16, 30), (31, 40))
    how = dict(augment=Augment(area=(1, 1), ratio=(1, 1), flip=False), seed=3)
    plain = batches(data, (8, 24, 40), **how, rows=rows)
    mixed = batches(data, (8, 24, 40), **how, served=served, rows=rows)
    seen = set()
    for k, ((a, _), (b, _)) in enumerate(zip(plain, mixed, strict=True)):
        assert torch.equal(a[8], b[8])  # what is larger than the scale is not shrunk first
        image = data.stacked(rows[k])[0]
        same = [s for s in range(16, 25) if torch.equal(b[24], resize(resize(image, s), 24))]
        assert len(same) == 1
        seen |= set(same)
    assert seen == set(range(16, 25))
    half = batches(data, (8, 24, 40), **how, served=served, between=0.5, rows=rows)
    sharp = [torch.equal(a[40], b[40]) for (a, _), (b, _) in zip(plain, half, strict=True)]
    assert 80 <= sum(sharp) <= 140  # half of 200, and where 40 px were drawn
    again = batches(data, (8, 24, 40), **how, served=served, rows=rows[7:9])
    assert torch.equal(again[1][0][40], mixed[8][0][40])  # the batch alone decides, not its place
    part = batches(data, (8, 24, 40), **how, served=served, rows=[rows[7][1:]], firsts=[7])
    assert torch.equal(part[0][0][40], mixed[7][0][40][1:])  # of a part, the whole batch


def test_a_native_scale_keeps_the_sizes_that_it_serves():
    data = open_labelled((torch.rand(60, 1, 40, 40), torch.zeros(60, dtype=torch.int64)))
    rows = [[k, 0, 1] for k in range(60)]
    how = dict(augment=Augment(area=(1, 1), ratio=(1, 1), flip=False), seed=3, rows=rows,
               served=((8, 15), (16, 30), (31, 44)))  # fmt: skip
    resized = batches(data, (8, 24, 40), **how)
    native = batches(data, (8, 24, 40), **how, native=(24, 40))
    seen = {24: set(), 40: set()}
    for k, ((a, _), (b, _)) in enumerate(zip(resized, native, strict=True)):
        assert torch.equal(a[8], b[8])
        for scale, sides in seen.items():
            side = b[scale].shape[-1]
            sides.add(side)
            assert torch.equal(b[scale], resize(data.stacked(rows[k])[0], side))
    assert min(seen[24]) == 16
    assert 28 <= max(seen[24]) <= 30  # above the scale as well
    assert min(seen[40]) == 31
    assert 42 <= max(seen[40]) <= 44


def test_grey_glyphs_are_resized_once_and_equal_to_three_channels():
    data = open_labelled("glyphs", n_images=62)
    whole = open_labelled((data.stacked(range(62))[0].contiguous(), data.stacked(range(62))[1]))
    for how in (augmentation("auto", data), None):
        ((looks, _),) = batches(data, (16, 64), how, rows=[[1, 40]])
        ((want, _),) = batches(whole, (16, 64), how, rows=[[1, 40]])
        assert looks[16].shape == (2, 3, 16, 16)
        for side in (16, 64):
            assert torch.equal(looks[side], want[side])


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(8):
        path = tmp_path / "pictures" / "ab"[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (20 + k, 30 - k, 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return tmp_path / "pictures"


def test_workers_change_nothing(folder):
    data = open_labelled(folder)
    rows = [[0, 7, 3], [1, 2], [6, 5]]
    here = batches(data, (8, 12), Augment(), data.mean, data.std, rows=rows)
    there = batches(data, (8, 12), Augment(), data.mean, data.std, rows=rows, workers=2)
    assert len(here) == len(there) == 3
    for (a, x), (b, y) in zip(here, there, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(a[8], b[8])
        assert torch.equal(a[12], b[12])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_cannot_be_read_is_named(folder, workers):
    (folder / "a" / "2.png").write_bytes(b"")
    data = open_labelled(folder)
    with pytest.raises(ValueError, match=r"^cannot read image: 'a/2.png': "):
        batches(data, (8,), Augment(), rows=[[0, 1, 2, 3]], workers=workers)


def test_boxes_lie_inside_and_have_the_area_that_was_asked_for():
    rng = np.random.default_rng(1)
    augment = Augment(area=(0.3, 0.8), ratio=(0.5, 2.0))
    shares, ratios = [], []
    for _ in range(2000):
        h, w = rng.integers(40, 90, 2).tolist()
        top, left, height, width = augment.box(rng.random(5), h, w)
        assert 0 <= top <= h - height
        assert 0 <= left <= w - width
        assert min(height, width) >= 1
        if h == w or min(h, w) * 2**0.5 <= max(h, w):
            continue
        ratios.append(width / height)
        shares.append(height * width / min(h, w) ** 2)
    assert min(ratios) == pytest.approx(0.5, abs=0.1)
    assert max(ratios) == pytest.approx(2.0, abs=0.2)
    assert max(shares) <= 0.85
    centre = Augment(area=(1.0, 1.0), ratio=(1.0, 1.0)).box(np.array([0.3, 0.3, 0.5, 0.5, 0]), 9, 5)
    assert centre == (2, 0, 5, 5)
    assert Augment(area=(0.01, 0.01)).box(np.full(5, 0.999), 3, 3)[2:] == (1, 1)


def test_augmentation_by_data(pair, folder):
    photographs = augmentation("auto", open_labelled(folder))
    assert photographs.flip
    assert augmentation("auto", pair) == Augment(area=(0.85, 1.0), ratio=(1.0, 1.0), flip=False)
    assert augmentation("auto", pair, flip=True).flip
    assert augmentation("auto", pair, area=[0.5, 0.7]).area == (0.5, 0.7)
    assert augmentation("none", pair) is None
    with pytest.raises(ValueError, match="unknown augmentation: 'some': "):
        augmentation("some", pair)
    with pytest.raises(ValueError, match="crop options without crops: "):
        augmentation("none", pair, flip=False)
    for area in ([0.5], [0.0, 1.0], [0.7, 0.5], [0.5, 1.5], [float("nan"), 1.0]):
        with pytest.raises(ValueError, match="bad crop area: "):
            augmentation("auto", pair, area=area)
    with pytest.raises(ValueError, match="bad crop ratio: "):
        Augment(ratio=(2.0, 1.0))


def test_the_order_of_an_epoch():
    first = shuffled(100, 3, 0)
    assert sorted(first.tolist()) == list(range(100))
    assert first.tolist() == shuffled(100, 3, 0).tolist()
    assert first.tolist() != shuffled(100, 3, 1).tolist()
    assert first.tolist() != shuffled(100, 4, 0).tolist()
