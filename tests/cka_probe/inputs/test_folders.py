"""Which files of a folder are images, and what is said of the others."""

import os
import warnings

import numpy as np
import pytest
from PIL import Image, features
from torch import nn

from cka_probe import probe
from cka_probe.inputs.decode import ImageError, decode_image, readable_formats
from cka_probe.inputs.folders import list_folder
from cka_probe.inputs.source import Files
from msun.data.labelled import open_labelled


def test_files_are_found_nested_sorted_and_whatever_their_case(tmp_path):
    for name in ["b/2.JPEG", "b/1.png", "a.WebP", "b-/0.tif", "Z.gif", "c/d/e/f.bmp", "x.jpg.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in [".hidden.jpg", ".git/x.jpg", "b/.y.png", "labels.csv", "jpg", "b/notes"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    want = ["Z.gif", "a.WebP", "b-/0.tif", "b/1.png", "b/2.JPEG", "c/d/e/f.bmp"]
    assert list_folder(tmp_path).images == want


def test_links_are_followed_but_not_in_circles(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    data.mkdir()
    elsewhere.mkdir()
    (elsewhere / "x.jpg").touch()
    (data / "folder").symlink_to(elsewhere)
    (data / "file.jpg").symlink_to(elsewhere / "x.jpg")
    (data / "up").symlink_to(data)
    (elsewhere / "back").symlink_to(data)
    (data / "nowhere.jpg").symlink_to(tmp_path / "gone.jpg")
    assert list_folder(data).images == ["file.jpg", "folder/x.jpg", "nowhere.jpg"]


def test_folders_that_hold_no_images_say_what_is_wrong(tmp_path):
    (tmp_path / "x.jpg").touch()
    (tmp_path / "empty").mkdir()
    for name, what in [
        ("missing", "^no such folder: '.*missing': give"),
        ("x.jpg", "^not a folder: '.*x.jpg': give the folder"),
        ("empty", "^no images in folder: '.*empty': give one with files"),
    ]:
        with pytest.raises(ValueError, match=what):
            list_folder(tmp_path / name)


LEFT = ["__MACOSX/cat/._1.png", "@eaDir/1.png", "cat/@eaDir/1.png@SynoEAStream", "cat/Thumbs.db",
        "desktop.ini", "$RECYCLE.BIN/1.png", "cat/thumbnails/1.png", ".thumbnails/1.png",
        ".DS_Store", "cat/.DS_Store", "cat/.ipynb_checkpoints/1-checkpoint.png"]  # fmt: skip


def furnish(root, names):
    rng = np.random.default_rng(0)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        image.save(root / name, format="PNG")
    return root


def test_what_systems_leave_behind_is_neither_image_nor_class(tmp_path):
    real = [f"{name}/{k}.png" for name in ("cat", "dog") for k in range(2)]
    furnish(tmp_path, [*real, *LEFT])
    found = list_folder(tmp_path)
    assert found.images == real
    assert found.others == []
    assert "__MACOSX" in found.skipped()
    assert open_labelled(tmp_path).classes == ("cat", "dog")
    assert Files(tmp_path, None, 0).ids == real


def test_files_left_out_are_counted_and_named(tmp_path):
    furnish(tmp_path, [f"{k}.png" for k in range(8)])
    for name in ("labels.csv", "b", "c.txt", "d.json", "e.md"):
        (tmp_path / name).write_text("x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a table beside the images is no reason to warn
        skipped = Files(tmp_path, None, 0).skipped
    assert skipped == "'b', 'c.txt', 'd.json' and 2 more (no image files that Pillow reads here)"
    said = []
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    report = probe(net, tmp_path, None, batch_size=4, progress=False, say=said.append)
    assert f"files left out: {skipped}" in said
    assert report.meta["files_left_out"] == skipped
    (tmp_path / "f.heic").write_bytes(b"x")
    (tmp_path / "g.CR2").write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"^images left out: 'f.heic' and 1 more in .*pillow-heif"):
        Files(tmp_path, None, 0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "f.heic").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"^no images in folder: .* but 'f.heic' \(no image files"):
        list_folder(tmp_path / "empty")


@pytest.mark.parametrize("ending", ["avif", "jp2", "ppm", "tga", "qoi", "ico", "apng", "pcx"])
def test_whatever_pillow_reads_is_read(tmp_path, ending):
    if ending == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    if f".{ending}" not in readable_formats():
        pytest.skip(f"this Pillow does not read .{ending}")
    values = np.zeros((16, 16, 3), np.uint8)
    values[:, :8] = 255
    exact = {"quality": 100} if ending == "avif" else {}
    Image.fromarray(values).save(tmp_path / f"x.{ending}", **exact)
    assert list_folder(tmp_path).images == [f"x.{ending}"]
    image = decode_image(tmp_path / f"x.{ending}", "x")
    assert image.shape == (3, 16, 16)
    assert np.abs(image.numpy().transpose(1, 2, 0) * 255 - values).max() < 4


def test_a_plugin_is_asked_when_the_folder_is_read(tmp_path, monkeypatch):
    Image.init()
    monkeypatch.setitem(Image.EXTENSION, ".heic", "HEIF")
    (tmp_path / "x.heic").write_bytes(b"x")
    with pytest.raises(ValueError, match="no images"):  # an ending alone, without a reader
        list_folder(tmp_path)
    monkeypatch.setitem(Image.OPEN, "HEIF", Image.OPEN["PNG"])
    assert list_folder(tmp_path).images == ["x.heic"]


def test_no_format_without_a_signature_takes_a_broken_file(tmp_path):
    """TGA has none: its reader would make noise of almost any bytes."""
    Image.new("RGB", (8, 8), (250, 0, 0)).save(tmp_path / "x.tga")
    (tmp_path / "x.tga").rename(tmp_path / "x.jpg")
    with pytest.raises(ImageError, match="no image that Pillow reads"):
        decode_image(tmp_path / "x.jpg", "x")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
def test_a_pipe_is_left_out(tmp_path):
    furnish(tmp_path, ["a.png"])
    os.mkfifo(tmp_path / "b.png")  # a read of it would wait for ever
    found = list_folder(tmp_path)
    assert (found.images, found.others) == (["a.png"], ["b.png"])


def test_stubs_and_what_runs_other_programs_are_no_images():
    endings = readable_formats()
    assert not endings.keys() & {".eps", ".ps", ".h5", ".hdf", ".mpg", ".grib", ".emf", ".pdf"}
    assert endings.keys() >= {".jpg", ".png", ".webp", ".tif", ".gif", ".bmp"}
