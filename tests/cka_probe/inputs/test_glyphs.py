import itertools
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.ft2font import FT2Font
from torch.nn import functional
from torch.utils.data import DataLoader

from cka_probe.inputs import glyphs
from cka_probe.inputs.glyphs import CLASSES, TEST_FACES, TRAIN_FACES, Glyphs, draw, tensor


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


def coarse(face):
    """The characters of a face without detail, brightness and weight: (62, 256)."""
    blurred = functional.avg_pool2d(glyphs._masters(face).float()[:, None], 8).flatten(1)
    return functional.normalize(blurred - blurred.mean(1, keepdim=True))


def agreement(face):
    """Share of a face's characters that are most like the same character of all other faces."""
    others = sum(coarse(other) for other in TEST_FACES if other != face)
    found = (coarse(face) @ functional.normalize(others).T).argmax(1)
    return (found == torch.arange(62)).float().mean().item()


def test_faces_agree_and_symbol_fonts_do_not():
    shares = {face: agreement(face) for face in TEST_FACES}
    assert min(shares.values()) > 0.45
    assert np.mean(list(shares.values())) > 0.85
    assert agreement("cmsy10.ttf") < 0.3  # has all 62 in its character map, and draws symbols


def test_capitals_stand_on_one_line_at_one_height():
    for face in TEST_FACES:
        rows = glyphs._masters(face)[CLASSES.index("H")].amax(1).nonzero()
        top, bottom = rows.min().item(), rows.max().item()
        assert abs(top - 40) <= 2
        assert abs(bottom - 87) <= 2


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


@pytest.mark.parametrize(("turned", "sheared"), [(0, 0), (1, 0), (0, 1), (1, 1), (-1, 1)])
def test_warping_moves_and_turns_as_said(turned, sheared):
    """A blot lands where the matrices of a shear and a turn put it, and keeps its area."""
    ink = torch.zeros(1, 128, 128)
    ink[0, 24:32, 84:92] = 1  # centre (28, 88): 24 right of and 36 above the middle
    u = torch.tensor([0.5, 0.5, (1 + turned) / 2, (1 + sheared) / 2, 0.5])
    out = glyphs._warp(ink, u[:, None], 64)[0]
    rows, columns = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    x, y = ((out * grid).sum() / out.sum() - 32 for grid in (columns, rows))
    turn = np.deg2rad(10 * turned)
    back = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    shear = np.array([[1, -0.15 * sheared], [0, 1]])
    np.testing.assert_allclose([x, y], back @ shear @ [12, -18], atol=0.05)
    assert out.sum() == pytest.approx(16, rel=0.01)


def told(size_px):
    """Accuracy of the nearest template, each training face, each shift: who knows all."""
    n = 186
    images = (tensor("test", n)[0][:, :1] + 1) / 2
    masters = torch.cat([glyphs._masters(face) for face in TRAIN_FACES]).float()[:, None]
    masters = functional.avg_pool2d(masters, 2)  # (17 * 62, 1, 64, 64)

    def seen(pictures):
        flat = functional.avg_pool2d(pictures, 64 // size_px).flatten(1)
        return functional.normalize(flat - flat.mean(1, keepdim=True))

    best = torch.zeros(n, len(masters))
    for shift in itertools.product(range(-4, 5, 2), repeat=2):
        template = seen(torch.roll(masters, shift, (2, 3)))
        best = torch.maximum(best, (seen(images) @ template.T).abs())
    return (best.argmax(1) % 62 == torch.arange(n) % 62).float().mean().item()


def test_classes_can_be_told_at_64_px_and_many_not_at_8():
    assert told(64) > 0.85  # chance: 0.016
    assert told(8) < 0.8


def test_nearest_class_mean_beats_chance():
    images, labels = tensor("train", 62 * 20)
    means, test = (part[:, 0].flatten(1) for part in (images, tensor("test", 620)[0]))
    means, test = ((part - part.mean(1, keepdim=True)).abs() for part in (means, test))
    means = functional.normalize(means.view(20, 62, -1).mean(0))
    assert ((test @ means.T).argmax(1) == labels[:620]).float().mean() > 0.15  # chance: 0.016


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
