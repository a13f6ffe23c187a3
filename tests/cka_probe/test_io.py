import contextlib
import errno
import os
import resource
import stat
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from cka_probe import io as files
from cka_probe.io import load_npz, load_torch, plain, replacing, save_npz, save_torch


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    assert text.count(": ") >= 2
    return text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_replacing_renames_only_what_was_written_whole(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("old")
    with replacing(path) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".csv"
        temporary.write_text("new")
        assert path.read_text() == "old"
        reader = path.open()
    with reader:  # renamed, not copied over: one who reads meanwhile reads on in the old file
        assert reader.read() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.csv"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_keeps_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "a.csv"
    path.write_text("old")

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.csv"]


def test_a_disk_that_fills_late_is_a_failure(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"), replacing(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert names(tmp_path) == []


def test_two_writers_do_not_share_a_temporary_file(tmp_path):
    with replacing(tmp_path / "a") as one, replacing(tmp_path / "a") as two:
        assert one != two
        one.write_text("1")
        two.write_text("2")


def test_the_file_has_the_rights_that_open_gives(tmp_path):
    (tmp_path / "plain").write_text("x")
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("x")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "a")]
    assert modes[0] == modes[1]


def test_npz_round_trip(tmp_path):
    arrays = {"x": np.array([[1.5, np.nan]]), "names": np.array(["層", "a"])}
    save_npz(tmp_path / "no_suffix", arrays, {"k": [1, None]}, version=3)
    assert names(tmp_path) == ["no_suffix"]
    found, meta = load_npz(tmp_path / "no_suffix", ("x", "names"), version=3)
    assert meta == {"k": [1, None]}
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_a_write_error_halfway_leaves_nothing(tmp_path):
    path = tmp_path / "a.npz"
    save_npz(path, {"x": np.arange(3)}, {}, version=1)
    before = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = np.random.default_rng(0).random(100_000)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))  # as a disk that is full
        with pytest.raises(OSError, match="too large"):
            save_npz(path, {"x": noise}, {}, version=1)
        with pytest.raises(OSError, match="too large"):
            save_npz(tmp_path / "b.npz", {"x": noise}, {}, version=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before
    assert names(tmp_path) == ["a.npz"]


def test_objects_are_not_pickled(tmp_path):
    with pytest.raises(ValueError, match="allow_pickle"):
        save_npz(tmp_path / "a", {"x": np.array([{}])}, {}, version=1)
    assert names(tmp_path) == []


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load_npz(tmp_path / "a.npz", ("x",), version=1)
    assert "a.npz" in one_line(error)


@pytest.mark.parametrize("content", [b"", b"P", b"hello\n", b"\x93NUMPY", b"PK", b"PK\x03\x04junk"])
def test_what_is_no_npz_is_refused(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=r"not a state|state cut short") as error:
        load_npz(tmp_path / "a", ("x",), version=1, what="state")
    one_line(error)


def test_an_array_file_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(3))
    with pytest.raises(ValueError, match="nor any"):
        load_npz(tmp_path / "a.npy", ("x",), version=1)


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "a"
    save_npz(path, {"x": np.arange(30.0)}, {"a": 1}, version=1)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r": .*: ") as error:
            load_npz(path, ("x",), version=1)
        one_line(error)


def test_no_flipped_byte_gives_other_numbers(tmp_path):
    path = tmp_path / "a"
    arrays = {"x": np.arange(30.0)}
    save_npz(path, arrays, {"a": 1}, version=1)
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            found, meta = load_npz(path, ("x",), version=1)
        except ValueError:
            refused += 1
        else:
            np.testing.assert_array_equal(found["x"], arrays["x"])
            assert meta == {"a": 1}
    assert refused > 100


def test_a_pickle_inside_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    evil = np.empty((), object)
    evil[()] = Trap()
    np.savez(tmp_path / "a.npz", x=np.arange(3), meta=evil, format=1)
    with pytest.raises(ValueError, match="damaged"):
        load_npz(tmp_path / "a.npz", ("x",), version=1)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"y": 1}, "but no report"),
        ({"x": 1, "meta": "{}", "format": "1"}, "but no report"),
        ({"x": 1, "meta": "{}", "format": [1]}, "but no report"),
        ({"x": 1, "meta": "{}", "format": 2}, r"newer format \(2\)"),
        ({"meta": "{}", "format": 1}, "lacks x"),
        ({"x": 1, "format": 1}, "lacks meta"),
        ({"x": 1, "meta": "{", "format": 1}, "no JSON"),
    ],
)
def test_other_npz_files_are_refused(tmp_path, arrays, match):
    np.savez(tmp_path / "a.npz", **{name: np.array(value) for name, value in arrays.items()})
    with pytest.raises(ValueError, match=match) as error:
        load_npz(tmp_path / "a.npz", ("x",), version=1)
    assert "a.npz" in one_line(error)


def test_a_zip_of_something_else_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x", "text")
        archive.writestr("format", "text")
    with pytest.raises(ValueError, match="but no report"):
        load_npz(tmp_path / "a.zip", ("x",), version=1)


def test_plain_is_what_json_returns():
    given = {"a": (1, np.int64(2), np.float32(0.5)), "b": [float("nan"), -np.inf], "c": np.True_}
    assert plain(given) == {"a": [1, 2, 0.5], "b": [None, None], "c": True}
    assert type(plain(given)["a"][1]) is int


@pytest.mark.parametrize(
    ("value", "place"),
    [({"a": [{1}]}, r"meta\['a'\]\[0\]"), ({"a": {1: 2}}, r"meta\['a'\]"), (b"x", "meta")],
)
def test_plain_names_what_json_cannot_hold(value, place):
    with pytest.raises(TypeError, match=place) as error:
        plain(value)
    one_line(error)


def state():
    g = torch.Generator().manual_seed(0)
    return {"weights": {"a": torch.randn(9, 40, generator=g), "b": torch.zeros(0)}, "step": 3}


def test_flipped_bits_of_a_torch_file_are_noticed(tmp_path):
    """As torch.load does not: it reads 199 of these 400 files as other content."""
    path = tmp_path / "x.pt"
    save_torch(path, state())
    good, rng = path.read_bytes(), np.random.default_rng(0)
    silent = 0
    for _ in range(400):
        bad = bytearray(good)
        bad[rng.integers(len(good))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        found = None
        with contextlib.suppress(OSError, ValueError):
            found = load_torch(path)
        if found is None:
            continue
        silent += 1  # in what the archive does not use: padding, dates, attributes
        assert found["step"] == 3
        assert torch.equal(found["weights"]["a"], state()["weights"]["a"])
    assert silent < 300


def test_torch_files_have_checksums_whatever_the_user_set(tmp_path):
    before = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        save_torch(tmp_path / "x.pt", state())
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(before)
    assert load_torch(tmp_path / "x.pt")["step"] == 3


@pytest.mark.parametrize("content", [b"", b"PK", b"x" * 100, None])
def test_what_is_no_torch_file_is_one_line(content, tmp_path):
    path = tmp_path / "x.pt"
    if content is None:
        np.savez(path.with_suffix(".npz"), a=np.zeros(3))
        path = path.with_suffix(".npz")
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^file damaged, or of another kind: .*: make it again$"):
        load_torch(path)


@pytest.fixture
def full_disk():
    """Files cannot grow above 64 KiB, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_an_os_error_and_the_old_file_stays(tmp_path, full_disk):
    path = tmp_path / "x.pt"
    save_torch(path, state())
    before = path.read_bytes()
    with pytest.raises(OSError, match="File too large") as caught:
        save_torch(path, {"big": torch.zeros(2**20)})
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def member(header, payload=b""):
    """An .npy of any header."""
    text = header.encode("latin1")
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + payload


HOSTILE = {
    "a shape of petabytes": member("{'descr': '<f8', 'fortran_order': False, 'shape': (1<<50,)}"),
    "a shape of terabytes": member(
        "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }", b"x" * 8
    ),
    "a negative shape": member("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }"),
    "nested": member("(" * 9000),
    "an open bracket": member("{'descr': '<f8', 'fortran_order': False, 'shape': (L"),
    "tokens of Python 2": member("{'descr': '<f8', 'fortran_order': False, 'shape': (3L,)'''"),
    "objects": member("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"x" * 8),
    "no array": b"hello",
    "nothing": b"",
    "a longer payload": member(
        "{'descr': '<f8', 'fortran_order': False, 'shape': (1,), }", b"x" * 800
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("name", ["cka.npy", "other.npy"])
def test_hostile_archives_are_one_line_and_take_no_memory(kind, name, tmp_path):
    good, bad = tmp_path / "good.npz", tmp_path / "bad.npz"
    save_npz(good, {"cka": np.eye(3)}, {}, version=1)
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(bad, "w") as new:
        for info in old.infolist():
            if info.filename != name:
                new.writestr(info.filename, old.read(info))
        new.writestr(name, HOSTILE[kind])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"^report cut short or damaged: .*: make it again$"):
            load_npz(bad, ("cka",), version=1)
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()


def test_an_archive_that_unpacks_to_gigabytes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_BOMB_BYTES", 2**16)
    path = tmp_path / "x.npz"
    save_npz(path, {"cka": np.zeros(2**20)}, {}, version=1)  # 8 MiB in 8 KiB
    with pytest.raises(ValueError, match=r"^report cut short or damaged: "):
        load_npz(path, ("cka",), version=1)
    save_npz(path, {"cka": np.random.default_rng(0).normal(size=2**16)}, {}, version=1)
    assert load_npz(path, ("cka",), version=1)[0]["cka"].shape == (2**16,)


def test_nested_meta_is_one_line(tmp_path):
    path = tmp_path / "x.npz"
    deep = np.array("[" * 100_000)
    np.savez(path, cka=np.eye(3), meta=deep, format=np.array(1))
    with pytest.raises(ValueError, match=r"^report whose meta is no JSON: "):
        load_npz(path, ("cka",), version=1)


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_without_checksums_still_load(zipped, tmp_path):
    before = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        torch.save(state(), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(load_torch(tmp_path / "x.pt")["weights"]["a"], state()["weights"]["a"])
