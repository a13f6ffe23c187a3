import itertools

import numpy as np
import pytest
import torch
from pictures import Items, assert_same, every, level, level_of, write
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchvision.datasets import FakeData, ImageFolder
from torchvision.transforms import v2

from cka_probe.inputs.batches import open_images
from cka_probe.inputs.views import scale_transforms

FLOATS = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "data", 21)


def test_a_folder_is_sorted_named_by_its_base_and_made_of_pixels(folder):
    source = open_images(folder)
    assert source.ids == sorted(f"{'abc'[k % 3]}/{k:03d}.png" for k in range(21))
    assert (len(source), source.name, source.is_pixels) == (21, "data", True)
    assert level(source.load(0)) == level_of(source.ids[0])
    assert open_images(str(folder) + "/").name == "data"
    assert open_images(folder / "a" / "..").name == "data"


def test_a_folder_given_by_a_dot_has_a_name(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert open_images(".").name == "data"


@pytest.mark.parametrize("kind", ["folder", "tensor", "dataset"])
def test_a_subset_is_seeded_sorted_and_nested(folder, kind):
    images = {"folder": folder, "tensor": torch.rand(21, 3, 4, 4), "dataset": FakeData(21)}[kind]
    everything = open_images(images).ids
    few, more = (open_images(images, n_images=n, seed=3) for n in (6, 12))
    assert few.ids == open_images(images, n_images=6, seed=3).ids
    assert few.ids != open_images(images, n_images=6, seed=4).ids
    assert set(few.ids) < set(more.ids) < set(everything)
    assert few.ids == [i for i in everything if i in few.ids]
    assert open_images(images, n_images=21).ids == everything


@pytest.mark.parametrize(
    ("n_images", "text"),
    [(22, "more images asked for than there are: 22 of the 21 in '.*data'"), (3, "too small: 3")],
)
def test_more_images_than_there_are_is_an_error(folder, n_images, text):
    with pytest.raises(ValueError, match=text):
        open_images(folder, n_images=n_images)


def test_a_folder_of_three_images_is_too_small(tmp_path):
    write(tmp_path, 3)
    with pytest.raises(ValueError, match=r"^too few images: 3 in '.*': CKA needs at least 4$"):
        open_images(tmp_path)


def test_the_fingerprint_of_a_folder_follows_names_and_bytes(folder):
    first = open_images(folder).fingerprint()
    assert open_images(folder).fingerprint() == first
    assert open_images(folder, n_images=20).fingerprint() != first
    source = open_images(folder)
    (folder / "a/000.png").rename(folder / "a/x.png")
    assert open_images(folder).fingerprint() != first
    assert source.fingerprint() != first  # the file has gone: noticed, not raised
    (folder / "a/x.png").rename(folder / "a/000.png")
    assert open_images(folder).fingerprint() == first
    content = (folder / "a/000.png").read_bytes()
    (folder / "a/000.png").write_bytes(content[:-1] + b"x")  # of equal size
    assert open_images(folder).fingerprint() != first


def test_a_tensor_is_used_as_it_is():
    images = torch.randn(5, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    source = open_images(images)
    assert (source.name, source.is_pixels) == ("tensor 5x2x3x4", False)
    assert torch.equal(source.load(4), images[4])
    assert not source.load(4).requires_grad
    changed = images.detach().clone()
    changed[4, 0, 0, 0] += 1
    assert open_images(changed).fingerprint() != source.fingerprint()
    assert open_images(images.detach().clone()).fingerprint() == source.fingerprint()
    assert open_images(images[:4]).fingerprint() != source.fingerprint()


def test_datasets_say_by_their_first_item_whether_they_are_pixels(folder):
    assert open_images(FakeData(4)).is_pixels
    assert open_images(ImageFolder(folder)).is_pixels
    assert not open_images(FakeData(4, transform=FLOATS)).is_pixels
    assert not open_images(TensorDataset(torch.rand(4, 3, 4, 4))).is_pixels
    assert open_images([np.zeros((4, 4, 3), np.uint8)] * 4).is_pixels
    assert open_images(Items([{"image": torch.rand(3, 4, 4)}] * 4)).name == "Items"


def test_an_image_folder_equals_the_folder(folder):
    ours, theirs = open_images(folder), open_images(ImageFolder(folder))
    for i in range(21):
        assert torch.equal(ours.load(i), theirs.load(i))


def test_each_item_of_a_dataset_is_asked_for_once():
    data = Items([torch.rand(3, 4, 4) for _ in range(9)])
    source = open_images(data)
    source.fingerprint()
    every(source, scale_transforms([2, 3, 4]))
    assert sorted(data.asked) == list(range(9))
    again = every(source, scale_transforms([4]))
    assert torch.equal(again[0].views["4"][0], data.items[int(again[0].ids[0])])


@pytest.mark.parametrize("n", [5, 16])
def test_the_fingerprint_of_a_small_dataset_follows_every_image(n):
    items = [torch.rand(3, 4, 4) for _ in range(n)]
    first = open_images(Items(items)).fingerprint()
    assert open_images(Items(items)).fingerprint() == first
    for k in range(n):
        other = [*items[:k], items[k] + 1, *items[k + 1 :]]
        assert open_images(Items(other)).fingerprint() != first


def test_the_fingerprint_of_a_large_dataset_samples_all_of_it():
    items = [torch.rand(3, 2, 2) for _ in range(1000)]
    data = Items(items)
    first = open_images(data, seed=3).fingerprint()
    asked = sorted(set(data.asked))
    assert len(asked) == 16
    assert (asked[0], asked[-1]) == (0, 999)
    assert max(b - a for a, b in itertools.pairwise(asked)) < 150
    assert open_images(data, seed=3).fingerprint() == first
    for k in (0, asked[7], 999):
        other = [*items[:k], items[k] + 1, *items[k + 1 :]]
        assert open_images(Items(other), seed=3).fingerprint() != first


def test_items_of_two_kinds_are_refused():
    data = Items([torch.rand(3, 4, 4)] * 4 + [Image.new("RGB", (4, 4))])
    with pytest.raises(TypeError, match=r"'4' is pixels, the first a float tensor: return one"):
        every(open_images(data), scale_transforms([4]))


class Endless(IterableDataset):
    def __iter__(self):
        yield torch.rand(3, 4, 4)


class NoLength(Dataset):
    def __len__(self):
        raise NotImplementedError

    def __getitem__(self, index):
        return torch.rand(3, 4, 4)


@pytest.mark.parametrize(
    ("images", "error", "text"),
    [
        (torch.zeros(4, 3, 4, 4, dtype=torch.uint8), TypeError, r"not float: .*: convert them"),
        (torch.zeros(4, 3, 4), ValueError, r"wrong shape: .* is \(4, 3, 4\): give \(n, c, h, w\)"),
        (torch.zeros(3, 3, 4, 4), ValueError, r"too few images: 3 in 'tensor 3x3x4x4'"),
        (DataLoader(FakeData(8)), TypeError, r"cannot be numbered: DataLoader: give a folder"),
        (Endless(), TypeError, r"cannot be numbered: Endless"),
        (NoLength(), TypeError, r"without a length: NoLength"),
        ({"a": 1}, TypeError, r"cannot be numbered: dict"),
        (iter([]), TypeError, r"cannot be numbered: list_iterator"),
        (None, TypeError, r"cannot be numbered: NoneType"),
        (Items([3] * 4), TypeError, r"item is no image: '0' is int"),
        ("/nowhere/at/all", ValueError, r"no such folder: '/nowhere/at/all'"),
    ],
)
def test_what_cannot_be_opened_is_refused_in_three_parts(images, error, text):
    with pytest.raises(error, match=text) as caught:
        open_images(images)
    assert str(caught.value).count(": ") == 2


def test_random_transforms_inside_a_dataset_do_not_touch_the_global_state():
    crop = v2.Compose([v2.RandomCrop(4), FLOATS])
    data = FakeData(12, (3, 9, 9), transform=crop)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = every(open_images(data), scale_transforms(None))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert_same(first, every(open_images(data), scale_transforms(None), workers=2))
    other = every(open_images(data, seed=1), scale_transforms(None))
    assert not torch.equal(other[0].views["native"], first[0].views["native"])
