import random

import pytest
import torch
from pictures import assert_same, every, level, level_of, write
from PIL import Image
from torchvision.transforms import v2

from cka_probe.inputs import decode
from cka_probe.inputs.batches import open_images, order, plan
from cka_probe.inputs.views import scale_transforms, view_transforms


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "data", 21)


@pytest.mark.parametrize("batch_size", [4, 5, 8, 64])
@pytest.mark.parametrize("n", [*range(4, 30), 63, 64, 65, 67, 68, 129])
def test_a_plan_covers_all_images_once_in_batches_of_four_or_more(n, batch_size):
    parts = plan(n, batch_size)
    assert [i for part in parts for i in range(n)[part]] == list(range(n))
    sizes = [part.stop - part.start for part in parts]
    assert min(sizes) >= 4
    assert all(size == batch_size for size in sizes[:-1])
    assert sizes[-1] <= max(batch_size, 4) + 3


@pytest.mark.parametrize(("n", "batch_size"), [(3, 64), (0, 64), (64, 3), (64, 0)])
def test_fewer_than_four_are_refused(n, batch_size):
    with pytest.raises(ValueError, match=r": \d+: CKA needs at least 4"):
        plan(n, batch_size)


def test_the_order_is_a_seeded_shuffle():
    assert sorted(order(50, 1)) == list(range(50))
    assert order(50, 1) == order(50, 1) != order(50, 2)
    assert order(50, 1) != list(range(50))


@pytest.mark.parametrize("workers", [0, 2])
def test_every_view_of_an_image_stands_in_its_row(folder, workers):
    got = every(open_images(folder), scale_transforms([3, 6]), workers=workers)
    assert [b.index for b in got] == [0, 1, 2]
    for batch in got:
        want = [level_of(name) for name in batch.ids]
        assert [level(row) for row in batch.views["3"]] == want
        assert [level(row) for row in batch.views["6"]] == want
        assert batch.views["3"].shape == (len(want), 3, 3, 3)
    ids = [name for batch in got for name in batch.ids]
    source = open_images(folder)
    assert ids == [source.ids[i] for i in order(21, 0)]


def test_workers_give_the_same_values_and_leave_the_global_state(folder):
    noise = v2.Compose([v2.GaussianNoise(), v2.Resize(5)])
    transforms = scale_transforms([3, 6], mean=(0.5,) * 3, std=(0.2,) * 3)
    transforms |= view_transforms({"noise": noise})
    source = open_images(folder)
    torch.manual_seed(0)
    state, python_state = torch.get_rng_state(), random.getstate()
    assert_same(every(source, transforms), every(source, transforms, workers=2))
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state


def by_id(got, view):
    return {name: row for b in got for name, row in zip(b.ids, b.views[view], strict=True)}


def test_random_views_depend_neither_on_batch_size_nor_on_the_subset(folder):
    noise = view_transforms({"noise": lambda x: x + torch.rand(x.shape)})
    whole = by_id(every(open_images(folder), noise), "noise")
    for source, options in [
        (open_images(folder), {"batch_size": 5}),
        (open_images(folder, n_images=7), {}),
        (open_images(folder), {"start": 1}),
    ]:
        part = by_id(every(source, noise, **options), "noise")
        assert all(torch.equal(row, whole[name]) for name, row in part.items())
    other = by_id(every(open_images(folder), noise, seed=1), "noise")
    assert not any(torch.equal(other[name], whole[name]) for name in whole)


def test_the_order_of_images_does_not_depend_on_the_batch_size(folder):
    source = open_images(folder)
    runs = [every(source, scale_transforms([3]), batch_size=b) for b in (4, 7, 64)]
    ids = [[name for b in run for name in b.ids] for run in runs]
    assert ids[0] == ids[1] == ids[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_resumed_runs_take_whole_batches(folder, workers):
    source, views = open_images(folder), scale_transforms([3])
    whole = every(source, views, batch_size=4)
    ranks = [every(source, views, batch_size=4, start=r, step=2, workers=workers) for r in (0, 1)]
    assert_same(sorted(ranks[0] + ranks[1], key=lambda b: b.index), whole)
    assert_same(every(source, views, batch_size=4, start=2, stop=4, workers=workers), whole[2:4])
    assert every(source, views, batch_size=4, start=9, workers=workers) == []


def test_each_file_is_decoded_once_for_all_its_views(folder, monkeypatch):
    asked = []
    real = decode.decode_image
    monkeypatch.setattr(
        decode, "decode_image", lambda path, label: asked.append(label) or real(path, label)
    )
    source = open_images(folder)
    source.fingerprint()
    every(source, scale_transforms([2, 3, 6]) | view_transforms({"raw": None, "x": v2.Resize(2)}))
    assert sorted(asked) == source.ids


def test_pixels_are_normalised_and_tensors_are_not(folder):
    mean, std = (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)
    batch = every(open_images(folder), scale_transforms([6], mean=mean, std=std))[0]
    want = [(level_of(batch.ids[0]) / 255 - m) / s for m, s in zip(mean, std, strict=True)]
    torch.testing.assert_close(batch.views["6"][0, :, 0, 0], torch.tensor(want))
    images = torch.randn(5, 3, 6, 6)
    batch = every(open_images(images), scale_transforms([6]))[0]
    assert torch.equal(batch.views["6"], images[[int(i) for i in batch.ids]])


def test_a_transform_in_place_changes_neither_other_views_nor_the_tensor():
    images = torch.rand(4, 3, 5, 5)
    before = images.clone()
    views = {"zero": lambda x: x.zero_(), **scale_transforms([5])}
    batch = every(open_images(images), views)[0]
    assert torch.equal(images, before)
    assert batch.views["zero"].abs().max() == 0
    assert torch.equal(batch.views["5"], before[[int(i) for i in batch.ids]])


@pytest.mark.parametrize("workers", [0, 2])
def test_native_sizes_that_differ_name_two_images(folder, workers):
    Image.new("RGB", (6, 7)).save(folder / "b/004.png")
    text = r"'.*png' \(3, ., 6\) and '.*png' \(3, ., 6\) in view 'native': resize them"
    with pytest.raises(ValueError, match=text):
        every(open_images(folder), scale_transforms(None), workers=workers)
