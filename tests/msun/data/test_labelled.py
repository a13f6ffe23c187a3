"""Labelled images: folders, glyphs, datasets and pairs of tensors, and what is refused."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder

from cka_probe.inputs import decode, glyphs
from msun.data.labelled import open_labelled


def save(path, colour, size=(5, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "zoo"
    save(root / "dog" / "b.png", (0, 0, 255))
    save(root / "dog" / "deep" / "a.png", (0, 255, 0))
    save(root / "cat" / "z.png", (255, 0, 0))
    save(root / ".hidden" / "x.png", (9, 9, 9))
    (root / "ape").mkdir()
    return root


def test_a_folder_has_a_class_per_sub_folder_also_an_empty_one(folder):
    data = open_labelled(folder)
    assert (data.name, data.classes, data.is_pixels, len(data)) == (
        "zoo", ("ape", "cat", "dog"), True, 3
    )  # fmt: skip
    pictures = [data.load(i) for i in range(3)]
    assert [label for _, label in pictures] == [1, 2, 2]
    assert [x[:, 0, 0].tolist() for x, _ in pictures] == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert pictures[0][0].shape == (3, 4, 5)
    assert data.mean == pytest.approx((0.485, 0.456, 0.406))
    assert data.stacked([0, 1]) is None


def test_a_folder_agrees_with_torchvision(folder):
    (folder / "ape" / "k.png").write_bytes((folder / "cat" / "z.png").read_bytes())
    (folder / ".hidden" / "x.png").unlink()
    (folder / ".hidden").rmdir()
    ours, theirs = open_labelled(folder), ImageFolder(folder)
    assert ours.classes == tuple(theirs.classes)
    got = sorted((x.sum().item(), label) for x, label in map(ours.load, range(len(ours))))
    want = sorted(
        (decode.from_pil(x, "").sum().item(), label)
        for x, label in map(theirs.__getitem__, range(len(theirs)))
    )
    assert got == want


def test_a_split_is_a_sub_folder(folder):
    root = folder.parent / "both"
    root.mkdir()
    folder.rename(root / "train")
    assert len(open_labelled(root, split="train")) == 3
    assert len(open_labelled(root / "train")) == 3
    with pytest.raises(ValueError, match="no such split: 'test' in "):
        open_labelled(root, split="test")
    with pytest.raises(ValueError, match="folder of splits, not of classes: train: "):
        open_labelled(root)


def test_what_a_folder_refuses(folder, tmp_path):
    save(folder / "loose.png", (1, 1, 1))
    with pytest.raises(ValueError, match=r"image outside any class: 'loose.png' in "):
        open_labelled(folder)
    with pytest.raises(ValueError, match="no such folder: "):
        open_labelled(tmp_path / "none")
    (folder / "loose.png").unlink()
    with pytest.raises(ValueError, match="more images asked for than there are: 9 of the 3"):
        open_labelled(folder, n_images=9)
    (folder / "cat" / "z.png").write_bytes(b"no picture")
    with pytest.raises(decode.ImageError, match=r"cannot read image: 'cat/z.png': "):
        open_labelled(folder).load(0)


def test_the_fingerprint_of_a_folder_notices_names_sizes_and_classes(folder):
    seen = {open_labelled(folder).fingerprint()}
    (folder / "bee").mkdir()
    seen.add(open_labelled(folder).fingerprint())
    (folder / "dog" / "b.png").rename(folder / "dog" / "c.png")
    seen.add(open_labelled(folder).fingerprint())
    save(folder / "dog" / "c.png", (0, 0, 255), size=(50, 40))
    seen.add(open_labelled(folder).fingerprint())
    assert len(seen) == 4
    assert open_labelled(folder).fingerprint() in seen


def test_the_fingerprint_of_a_folder_notices_an_edit_of_equal_size(folder):
    file = folder / "dog" / "b.png"
    before, content = open_labelled(folder).fingerprint(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert open_labelled(folder).fingerprint() != before


def test_glyphs_are_those_of_the_other_package():
    data = open_labelled("glyphs", n_images=70, seed=3)
    images, labels = glyphs.tensor("train", 70, 3)
    got, told = data.stacked([69, 0, 5])
    assert torch.equal(got, images[[69, 0, 5]])
    assert torch.equal(told, labels[[69, 0, 5]])
    image, label = data.load(63)
    assert torch.equal(image, images[63])
    assert label == 1
    assert (data.is_pixels, data.mean, data.std, data.classes) == (
        False, None, None, glyphs.CLASSES
    )  # fmt: skip
    other = open_labelled("glyphs", split="test", n_images=70, seed=3)
    assert data.fingerprint() != other.fingerprint()
    assert data.fingerprint() == open_labelled("glyphs", n_images=70, seed=3).fingerprint()
    with pytest.raises(ValueError, match="unknown split: 'dev'"):
        open_labelled("glyphs", split="dev")


def test_a_pair_of_tensors_and_its_subsets():
    images = torch.arange(5 * 3 * 2 * 2).float().view(5, 3, 2, 2)
    data = open_labelled((images, [0, 2, 1, 1, 0]))
    assert data.classes == ("0", "1", "2")
    assert torch.equal(data.load(1)[0], images[1])
    assert data.load(1)[1] == 2
    part = open_labelled((images, [0, 2, 1, 1, 0]), n_images=1, seed=1)
    assert part.classes == data.classes, "the classes are those of the whole"
    larger = open_labelled((images, [0, 2, 1, 1, 0]), n_images=3, seed=1)
    held = [larger.load(i)[0].sum() for i in range(3)]
    assert part.load(0)[0].sum() in held
    changed = images.clone()
    changed[4, 2, 1, 1] += 1
    assert open_labelled((changed, [0, 2, 1, 1, 0])).fingerprint() != data.fingerprint()
    assert open_labelled((images, [0, 2, 1, 1, 2])).fingerprint() != data.fingerprint()


@pytest.mark.parametrize("labels", [[0, 1], torch.eye(3), torch.rand(3), [True, False, True]])
def test_labels_that_do_not_fit(labels):
    with pytest.raises(ValueError, match="labels do not fit the images: "):
        open_labelled((torch.zeros(3, 1, 2, 2), labels))


def test_negative_labels_and_integer_images_are_refused():
    with pytest.raises(ValueError, match=r"bad label: -1 of item '1' in "):
        open_labelled((torch.zeros(3, 1, 2, 2), [0, -1, 1]))
    with pytest.raises(TypeError, match="images are not float"):
        open_labelled((torch.zeros(3, 1, 2, 2, dtype=torch.uint8), [0, 1, 1]))


class Pictures(Dataset):
    """Pixels with labels that nothing states."""

    def __init__(self, labels, item=None):
        self.told, self.asked, self.item = labels, [], item

    def __len__(self):
        return len(self.told)

    def __getitem__(self, k):
        self.asked.append(k)
        if self.item is not None:
            return self.item
        return Image.new("RGB", (4 + k, 3), (k, 0, 0)), self.told[k]


def test_a_dataset_is_asked_for_its_classes_or_else_for_every_label():
    data = open_labelled(Pictures([0, 3, 1]))
    assert data.classes == ("0", "1", "2", "3")
    assert data.is_pixels
    image, label = data.load(2)
    assert image.shape == (3, 3, 6)
    assert label == 1
    named = Pictures([0, 3, 1])
    named.classes = ["a", "b", "c", "d"]
    assert open_labelled(named).classes == ("a", "b", "c", "d")
    assert named.asked == [0]
    stated = Pictures([0, 3, 1])
    stated.targets = torch.tensor([0, 3, 1])
    assert len(open_labelled(stated).classes) == 4
    assert stated.asked == [0]
    assert len(open_labelled(Subset(stated, [1, 2])).classes) == 4
    assert len(open_labelled(Subset(named, [2])).classes) == 4


def test_tensor_datasets_are_used_as_they_are():
    images = torch.randn(4, 2, 3, 3)
    data = open_labelled(TensorDataset(images, torch.tensor([1, 0, 1, 0])))
    assert not data.is_pixels
    assert data.mean is None
    assert torch.equal(data.load(2)[0], images[2])
    both = ConcatDataset([TensorDataset(images, torch.tensor([1, 0, 5, 0]))] * 2)
    assert len(open_labelled(both).classes) == 6


def test_what_a_dataset_refuses():
    with pytest.raises(TypeError, match=r"item without a label: '0' of Pictures is tuple: "):
        open_labelled(Pictures([0], (Image.new("L", (2, 2)),)))
    few = Pictures([0, 9])
    few.classes = ["a", "b"]
    with pytest.raises(ValueError, match=r"bad label: 9 of item '1' in 'Pictures': give 0 to 1"):
        open_labelled(few).load(1)
    words = Pictures([0, "dog"])
    words.classes = ["a", "b"]
    with pytest.raises(ValueError, match="label is a word: 'dog' of item '1'"):
        open_labelled(words).load(1)
    with pytest.raises(TypeError, match="no labelled images: int: "):
        open_labelled(3)
    with pytest.raises(TypeError, match="no labelled images: Tensor: "):
        open_labelled(torch.zeros(3, 1, 2, 2))
    with pytest.raises(ValueError, match="split of something without splits: 'test': "):
        open_labelled(Pictures([0]), split="test")
    with pytest.raises(ValueError, match="too few images: 0 in "):
        open_labelled(Pictures([]))


def test_mappings_numpy_labels_and_pickles():
    item = {"image": np.full((2, 2), 255, np.uint8), "label": np.int64(1)}
    data = open_labelled(Pictures([0, 1], item))
    assert data.load(1)[1] == 1
    assert data.load(0)[0].tolist() == torch.ones(3, 2, 2).tolist()
    again = pickle.loads(pickle.dumps(data))
    assert again.fingerprint() == data.fingerprint()


class Noisy(Dataset):
    """Random transforms inside."""

    classes = ("a",)

    def __len__(self):
        return 3

    def __getitem__(self, k):
        return torch.rand(1, 2, 2), 0


def test_random_transforms_draw_from_seed_image_and_epoch_alone():
    data = open_labelled(Noisy(), seed=1)
    first = data.load(1)[0]
    torch.rand(7)
    assert torch.equal(data.load(1)[0], first)
    before = torch.get_rng_state()
    others = [data.load(2)[0], data.load(1, epoch=1)[0], open_labelled(Noisy()).load(1)[0]]
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(torch.equal(first, x) for x in others)


def test_what_was_opened_comes_back():
    data = open_labelled(Noisy())
    assert open_labelled(data) is data


def stating(labels):
    """A dataset that states its labels beside its images, as torchvision's do."""
    made = Pictures(labels)
    made.targets = labels
    return made


def plain(labels):
    return torch.zeros(len(labels), 3, 4, 4), labels


@pytest.mark.parametrize("kind", [Pictures, stating, plain])
@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (
            ["cat", "dog"],
            "label is a word: 'cat' of item '0' in '.*': give the number of its class",
        ),
        ([0, "dog"], "label is a word: 'dog' of item '1'"),
        (np.array(["cat", "dog"]), "label is a word: 'cat' of item '0'"),
        (
            [[0, 1], [1, 0]],
            r"label is no class: \[0, 1\] of item '0' in '.*': give one whole number",
        ),
        ([{"box": [0] * 99}] * 2, r"label is no class: {'box': \[0, .*\.\.\. of item '0'"),
        ([None, None], "label is no class: None of item '0'"),
        ([0.5, 1.0], "label is no class: 0.5 of item '0'"),
        ([0, float("nan")], "label is no class: nan of item '1'"),
        ([(0, 1), (1, 1)], r"label is no class: \(0, 1\) of item '0'"),
        ([0, 10**12], "bad label: 1000000000000 in '.*': give 0 to 999999 at most"),
    ],
    ids=str,
)
def test_labels_that_are_no_class_are_one_line_before_any_step(kind, labels, words):
    with pytest.raises(ValueError, match=f"^{words}") as caught:
        open_labelled(kind(labels))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("kind", [Pictures, stating, plain])
@pytest.mark.parametrize("make", [
    list, torch.tensor, np.array, lambda y: np.array(y, np.uint8),
    lambda y: torch.tensor(y)[:, None],
    lambda y: [torch.tensor(k) for k in y], lambda y: [np.int32(k) for k in y],
    lambda y: [float(k) for k in y],
])  # fmt: skip
def test_whole_numbers_of_any_kind_are_labels(kind, make):
    data = open_labelled(kind(make([0, 2, 1])))
    assert data.classes == ("0", "1", "2")
    assert [data.load(i)[1] for i in range(3)] == [0, 2, 1]


def test_a_stated_label_is_checked_though_the_classes_are_named():
    data = stating([0, 1, "cat"])
    data.classes = ["a", "b"]
    with pytest.raises(ValueError, match=r"^label is a word: 'cat' of item '2'"):
        open_labelled(data)
    data.target_transform = lambda label: 0  # what the items hold is another thing
    assert open_labelled(data).classes == ("a", "b")
