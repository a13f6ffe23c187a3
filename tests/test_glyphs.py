from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.ft2font import FT2Font
from torch.nn import functional
from torch.utils.data import DataLoader

from cka_probe import glyphs
from cka_probe.glyphs import CLASSES, TEST_FACES, TRAIN_FACES, Glyphs, draw, tensor


def test_classes_and_faces():
    assert len(CLASSES) == len(set(CLASSES)) == 62
    assert "".join(CLASSES).isalnum()
    assert set(TRAIN_FACES) < set(TEST_FACES)
    assert len(TEST_FACES) == len(set(TEST_FACES)) == 21


@pytest.mark.parametrize("face", TEST_FACES)
def test_a_face_draws_62_different_whole_characters(face):
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", face)
    assert {ord(character) for character in CLASSES} <= FT2Font(str(path)).get_charmap().keys()
    pictures = glyphs._masters(face)
    assert pictures.shape == (62, 128, 128)
    flat = pictures.flatten(1).double() / 255
    assert flat.sum(1).min() > 100  # none is empty
    apart = torch.cdist(flat, flat) / flat.norm(dim=1)
    assert (apart + torch.eye(62)).min() > 0.2  # boxes of a last resort face are 0 apart
    border = torch.cat([pictures[:, [0, -1]].flatten(), pictures[:, :, [0, -1]].flatten()])
    assert border.max() == 0  # none is cut off


def test_faces_agree_with_each_other():
    """A face with symbols in the places of letters would be unlike all others there."""
    blurred = torch.stack([glyphs._masters(face) for face in TEST_FACES]).float()
    blurred = functional.avg_pool2d(blurred, 16).flatten(2)  # (faces, 62, 64)
    right = torch.zeros(len(TEST_FACES))
    for k in range(len(TEST_FACES)):
        others = torch.cat([blurred[:k], blurred[k + 1 :]]).mean(0)
        right[k] = (torch.cdist(blurred[k], others).argmin(1) == torch.arange(62)).float().mean()
    assert right.min() > 0.5
    assert right.mean() > 0.75


def test_capitals_stand_on_one_line_at_one_height():
    for face in TEST_FACES:
        rows = glyphs._masters(face)[CLASSES.index("H")].amax(1).nonzero()
        top, bottom = rows.min().item(), rows.max().item()
        assert abs(top - 34) <= 2
        assert abs(bottom - 93) <= 2


@pytest.mark.parametrize(("split", "seed"), [("train", 0), ("test", 0), ("train", 3)])
def test_one_by_one_in_any_order_is_the_batch(split, seed):
    images, labels = tensor(split, 300, seed)
    data = Glyphs(split, 300, seed=seed)
    for k in (299, 0, 256, 255, 17, 17):
        image, label = data[k]
        torch.testing.assert_close(image, images[k], rtol=0, atol=0)
        assert label == labels[k]
    again = draw([5, 4, 299], split, seed=seed)
    torch.testing.assert_close(again, draw(range(300), split, seed=seed)[[5, 4, 299]])
    assert torch.equal(data[-1][0], images[299])


def test_workers_change_nothing():
    data = Glyphs("train", 24)
    one = torch.cat([image for image, _ in DataLoader(data, 8)])
    two = torch.cat([image for image, _ in DataLoader(data, 8, num_workers=1)])
    assert torch.equal(one, two)


def test_the_number_of_images_changes_none():
    assert torch.equal(tensor("test", 10)[0], tensor("test", 70)[0][:10])


def test_global_random_state_is_neither_read_nor_moved():
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = tensor("train", 5)[0]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    assert torch.equal(tensor("train", 5)[0], first)


def test_no_image_is_in_two_splits_or_seeds():
    seen = set()
    for split, seed in [("train", 0), ("test", 0), ("train", 1), ("test", 1)]:
        seen |= {picture.numpy().tobytes() for picture in draw(range(500), split, seed=seed)}
    assert len(seen) == 2000


def test_only_the_test_split_uses_the_unseen_faces(monkeypatch):
    used = set()
    masters = glyphs._masters
    monkeypatch.setattr(glyphs, "_masters", lambda face: used.add(face) or masters(face))
    draw(range(1000), "train", size_px=8)
    assert used == set(TRAIN_FACES)
    used.clear()
    draw(range(1000), "test", size_px=8)
    assert used == set(TEST_FACES)


def test_classes_that_a_face_confuses_are_drawn_from_others():
    for split in ("train", "test"):
        for label, character in enumerate(CLASSES):
            faces = glyphs._faces_of(label, split)
            assert len(faces) >= 10
            if character in "Il":
                assert not {"DejaVuSans.ttf", "cmss10.ttf"} & set(faces)
            if character == "O":
                assert not {"DejaVuSansMono.ttf", "cmtt10.ttf"} & set(faces)


@pytest.mark.parametrize("n", [62, 100, 620])
def test_labels_are_balanced(n):
    images, labels = tensor("train", n, size_px=8)
    counts = torch.bincount(labels, minlength=62)
    assert counts.max() - counts.min() <= 1
    assert len(images) == len(labels) == n
    assert labels.dtype == torch.int64


def test_values():
    images, _ = tensor("train", 620)
    assert images.shape == (620, 3, 64, 64)
    assert images.dtype == torch.float32
    assert images.min() == -1
    assert images.max() == 1
    assert abs(images.mean()) < 0.1  # dark on light as often as light on dark
    assert 0.4 < images.std() < 0.8
    assert torch.equal(images[:, 0], images[:, 2])
    levels = (images[:, 0] + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)  # 8 bits
    assert images.flatten(1).std(1).min() > 0.05  # none is flat
    assert Glyphs(size_px=20)[0][0].shape == (3, 20, 20)


@pytest.mark.parametrize("angle", [0.0, 1.0])
def test_warping_moves_and_turns_as_said(angle):
    """Parameters in the middle change nothing; a turn agrees with the matrix of a turn."""
    ink = torch.zeros(1, 128, 128)
    ink[0, 24:32, 84:92] = 1  # centre (28, 88): 24 right of and 36 above the middle
    u = torch.full((5, 1), 0.5)
    u[2] = 0.5 + angle / 2
    out = glyphs._warp(ink, u, 64)[0]
    rows, columns = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    x, y = ((out * grid).sum() / out.sum() - 32 for grid in (columns, rows))
    turn = np.deg2rad(10 * angle)
    expected = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) @ [12, -18]
    np.testing.assert_allclose([x, y], expected, atol=0.1)
    assert out.sum() == pytest.approx(16, rel=0.05)


def nearest_mean(size_px):
    """Accuracy of the nearest class mean, polarity and contrast taken out; no training."""
    means, test = [], []
    for split, n, into in (("train", 62 * 20, means), ("test", 62 * 5, test)):
        images = tensor(split, n)[0][:, :1]
        small = functional.interpolate(images, size=size_px, mode="bilinear", antialias=True)
        flat = small.flatten(1) - small.flatten(1).median(1, keepdim=True).values
        into.append(flat.abs() / flat.norm(dim=1, keepdim=True))
    mean = means[0].view(20, 62, -1).mean(0)
    found = (test[0] @ functional.normalize(mean, dim=1).T).argmax(1)
    return (found == torch.arange(62 * 5) % 62).float().mean().item()


def test_classes_can_be_told_at_64_px_and_hardly_at_8():
    assert nearest_mean(64) > 0.3  # chance: 0.016
    assert nearest_mean(8) < 0.75 * nearest_mean(64)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: tensor("val", 5), "unknown split: 'val': use one of 'train', 'test'"),
        (lambda: Glyphs("val"), "unknown split"),
        (lambda: Glyphs(n=0), "too few images: 0"),
        (lambda: tensor("train", 5, -1), "negative: -1"),
        (lambda: Glyphs(size_px=3), "size out of range: 3 px"),
        (lambda: Glyphs(size_px=256), "size out of range"),
        (lambda: draw([0], "val"), "unknown split"),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match) as error:
        call()
    assert str(error.value).count(": ") == 2


def test_indices_end():
    data = Glyphs(n=3)
    assert len(data) == 3
    assert [label for _, label in data] == [0, 1, 2]
    for index in (3, -4):
        with pytest.raises(IndexError, match="there are 3"):
            data[index]


def test_a_missing_font_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(matplotlib, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=r"'none\.ttf': reinstall matplotlib"):
        glyphs._masters("none.ttf")
