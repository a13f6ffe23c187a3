import contextlib
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from pictures import Items, every, level, level_of, write
from PIL import Image
from shell import LISTENING
from torchvision.transforms import v2

from cka_probe.inputs.batches import iterate_batches, open_images
from cka_probe.inputs.decode import ImageError
from cka_probe.inputs.views import scale_transforms, view_transforms

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "data", 21)


def damage(folder, *levels):
    names = [f"{'abc'[k % 3]}/{k:03d}.png" for k in levels]
    for name in names:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
    return names


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_file_stops_the_run_in_one_line(folder, workers):
    damage(folder, 4)
    with pytest.raises(ImageError) as caught:
        every(open_images(folder), scale_transforms([3]), workers=workers)
    text = str(caught.value)
    assert text.startswith("cannot read image: 'b/004.png': ")
    assert "use skip_bad=True (--skip-bad)" in text
    assert "\n" not in text
    assert str(folder) not in text


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_bad_names_the_files_and_moves_no_other(folder, workers):
    views = scale_transforms([3])
    whole = every(open_images(folder), views)
    lost = damage(folder, 4, 11, 18)
    got = every(open_images(folder), views, skip_bad=True, workers=workers)
    assert sorted(name for b in got for name in b.bad) == sorted(lost)
    for before, after in zip(whole, got, strict=True):
        assert after.ids == [name for name in before.ids if name not in lost]
        assert [level(row) for row in after.views["3"]] == [level_of(name) for name in after.ids]


def test_a_batch_with_fewer_than_four_left_is_dropped_whole_and_named(folder):
    source = open_images(folder)
    ids = every(source, scale_transforms([3]), batch_size=5)[1].ids
    lost = damage(folder, *(level_of(name) for name in ids[:2]))
    batch = every(source, scale_transforms([3]), batch_size=5, skip_bad=True)[1]
    assert (batch.index, batch.ids, batch.views) == (1, [], {})
    assert (sorted(batch.bad), batch.left_out) == (sorted(lost), ids[2:])


def test_unreadable_items_of_a_dataset_can_be_skipped_but_its_faults_cannot():
    def gone():
        raise FileNotFoundError(2, "No such file or directory", "/secret/x.jpg")

    def fault():
        raise KeyError("k")

    good = [torch.rand(3, 4, 4)] * 7
    source = open_images(Items([gone, *good]))  # also where it is the first
    views = scale_transforms([4])
    with pytest.raises(
        ImageError, match=r"^cannot read image: '0': no such file or directory; use"
    ):
        every(source, views)
    assert every(source, views, skip_bad=True)[0].bad == ["0"]
    text = r"^dataset Items failed: item '7', KeyError \('k'\): check its __getitem__$"
    with pytest.raises(ValueError, match=text):
        every(open_images(Items([*good, fault])), views, skip_bad=True)
    with pytest.raises(ValueError, match=r"^no image can be read: 4 in Items"):
        open_images(Items([gone] * 4))


def test_warnings_of_pil_inside_a_dataset_stop_nothing(monkeypatch):
    def bomb():
        image = Image.new("RGB", (10, 10))
        Image._decompression_bomb_check(image.size)
        return image

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    assert len(every(open_images(Items([bomb] * 4)), scale_transforms([4]))[0].ids) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_a_faulty_transform_stops_the_run_in_one_line(folder, workers):
    views = view_transforms({"flat": lambda x: x.reshape(7, 7, 7)})
    with pytest.raises(
        ValueError, match=r"^view 'flat' failed: image '.*png', RuntimeError"
    ) as got:
        every(open_images(folder), views, workers=workers, skip_bad=True)
    assert "\n" not in str(got.value)
    with pytest.raises(TypeError, match=r"^view 'pil' gives no tensor: Image"):
        every(open_images(folder), view_transforms({"pil": v2.ToPILImage()}), workers=workers)


@pytest.mark.parametrize("workers", [-1, 1.5, True, "2"])
def test_bad_numbers_of_workers(folder, workers):
    with pytest.raises(ValueError, match=r"^bad number of workers: .*: give 0 or more"):
        iterate_batches(open_images(folder), {}, batch_size=8, seed=0, workers=workers)


class Dies(Items):
    def __getitem__(self, index):
        if multiprocessing.parent_process() is not None:
            os._exit(3)
        return super().__getitem__(index)


def test_a_worker_that_dies_is_one_line():
    source = open_images(Dies([torch.rand(3, 4, 4)] * 8))
    with pytest.raises(RuntimeError, match=r"^image workers failed: 2: .*; use fewer") as caught:
        every(source, scale_transforms([4]), workers=2)
    assert "\n" not in str(caught.value)
    assert multiprocessing.active_children() == []


def test_leaving_early_ends_the_workers(folder):
    stream = iterate_batches(
        open_images(folder), scale_transforms([3]), batch_size=4, seed=0, workers=2
    )
    with contextlib.closing(stream):
        next(stream)
        assert len(multiprocessing.active_children()) == 2
    assert multiprocessing.active_children() == []


def test_an_error_in_a_worker_ends_them_all(folder):
    damage(folder, *range(21))
    stream = iterate_batches(
        open_images(folder), scale_transforms([3]), batch_size=4, seed=0, workers=2
    )
    with pytest.raises(ImageError):
        next(stream)
    gc.collect()
    assert multiprocessing.active_children() == []


def test_workers_leave_interrupts_to_the_parent(folder):
    stream = iterate_batches(
        open_images(folder), scale_transforms([3]), batch_size=4, seed=0, workers=1
    )
    with contextlib.closing(stream):
        first = next(stream)
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGINT)
        rest = list(stream)
    assert [batch.index for batch in [first, *rest]] == [0, 1, 2, 3, 4]


@pytest.mark.skipif(os.name != "posix", reason="process groups")
def test_ctrl_c_leaves_no_process_and_no_noise(folder):
    program = """
        import contextlib, multiprocessing, sys, torch
        from cka_probe.inputs.batches import iterate_batches, open_images
        from cka_probe.inputs.views import scale_transforms
        source = open_images(sys.argv[1])
        try:
            while True:
                stream = iterate_batches(
                    source, scale_transforms([3]), batch_size=4, seed=0, workers=2
                )
                with contextlib.closing(stream):
                    for batch in stream:
                        pids = [p.pid for p in multiprocessing.active_children()]
                        print(*pids, flush=True)
                        stop = input()
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    """
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", LISTENING),
            *(sys.executable, "-W", "error", "-c", textwrap.dedent(program), str(folder)),
        ],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 2
        time.sleep(0.5)  # the workers have come to rest
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (out, err) == ("interrupted\n", "")
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_big_photograph_goes_through_every_scale(tmp_path):
    for k in range(4):
        Image.new("RGB", (2000, 1500), (k * 50, 0, 0)).save(tmp_path / f"{k}.jpg")
    batch = every(open_images(tmp_path), scale_transforms([32, 224]))[0]
    assert batch.views["224"].shape == (4, 3, 224, 224)
    levels = [round(float(row[0].mean()) * 255) for row in batch.views["32"]]
    assert levels == pytest.approx([int(Path(name).stem) * 50 for name in batch.ids], abs=3)
