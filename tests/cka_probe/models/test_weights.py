import builtins

import pytest
import torch
from networks import refused, same, write_net
from safetensors.torch import save_file

from cka_probe.models.load import load_model


@pytest.fixture
def net(tmp_path):
    return write_net(tmp_path)


@pytest.fixture
def state(net):
    return load_model(net, seed=9).model.state_dict()


def save(state, path):
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("ending", ["safetensors", "pt", "pth", "bin"])
def test_a_state_dict_is_read_from_every_kind_of_file(net, state, tmp_path, ending):
    path = save(state, tmp_path / f"w.{ending}")
    loaded = load_model(net, path, seed=1)
    assert same(loaded.model, state)
    assert loaded.weights == f"w.{ending}"
    assert len(loaded.sha256) == 64
    assert load_model(net, str(path)).sha256 == loaded.sha256


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s},
        lambda s: {"model_state_dict": s, "optimizer": {"lr": 0.1}},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()}},
        lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()},
        lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
    ],
)
def test_wrapped_state_dicts_are_unwrapped(net, state, tmp_path, wrap):
    model = load_model(net, save(wrap(state), tmp_path / "w.pt"), seed=1).model
    for key, value in model.state_dict().items():
        assert value.dtype == state[key].dtype
        torch.testing.assert_close(value, state[key], atol=1e-3, rtol=1e-3)


def test_weights_that_do_not_fit_are_counted_with_an_example_each(net, state, tmp_path):
    changed = {k: v for k, v in state.items() if k not in ("0.weight", "0.bias")}
    changed |= {"head.x": torch.zeros(1), "2.weight": torch.zeros(7, 4)}
    assert refused(net, save(changed, tmp_path / "w.pt")) == (
        "weights do not fit: 'w.pt' for 'net.py:make' has 2 keys missing ('0.weight'), 1 keys "
        "unexpected ('head.x'), 1 keys of another shape ('2.weight', (7, 4) for (2, 4)): "
        "check --model and --model-arg"
    )


class Evil:
    def __reduce__(self):
        return builtins.exec, ("import builtins; builtins.HACKED = 1",)


def test_a_pickle_with_code_is_refused_and_not_run(net, state, tmp_path):
    path = save({"state_dict": state, "x": Evil()}, tmp_path / "w.pt")
    text = refused(net, path)
    assert text.startswith("checkpoint holds more than tensors: 'w.pt' needs ")
    assert text.endswith("exec: save model.state_dict() alone")
    assert not hasattr(builtins, "HACKED")


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
@pytest.mark.parametrize("fault", ["empty", "garbage", "text", "truncated"])
def test_a_checkpoint_that_is_none(net, state, tmp_path, ending, fault):
    path = save(state, tmp_path / f"w.{ending}")
    data = path.read_bytes()
    other = {"empty": b"", "garbage": bytes(range(256)) * 9, "text": b"hello\n" * 50}
    path.write_bytes(other.get(fault, data[: len(data) // 2]))
    text = refused(net, path)
    assert text.startswith(f"not a checkpoint: 'w.{ending}': give a .safetensors file")


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], {"state_dict": {}}, 7])
def test_a_checkpoint_without_weights(net, tmp_path, content):
    text = refused(net, save(content, tmp_path / "w.pt"))
    assert text.startswith("no weights in the checkpoint: 'w.pt' holds ")


def test_missing_weights_and_folders(net, tmp_path):
    for path in (tmp_path, tmp_path / "no.pt", "default"):
        text = refused(net, path)
        assert text.startswith("no such weights file: ")
        assert text.endswith("give a file, DEFAULT or none")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("2.weight", "nan"),
        ("2.weight", "inf"),
        ("2.weight", "-inf"),
        ("1.running_var", "nan"),
        ("1.running_var", "inf"),
    ],
)
def test_weights_that_are_not_finite_are_named(net, state, tmp_path, key, value):
    state[key].view(-1)[1] = float(value)
    text = refused(net, save(state, tmp_path / "w.pt"))
    count = f"1 of {state[key].numel()} values in {key!r} of net.py:make with w.pt"
    assert text == f"weights are not finite: {count}: give other weights"


def test_safetensors_may_state_the_normalisation(net, state, tmp_path):
    for metadata, mean, origin in [
        ({"mean": "(0.5, 0.5, 0.5)", "std": "[0.25, 0.25, 0.25]"}, 0.5, "weights file"),
        ({"mean": "(0.5, 0.5, 0.5)"}, 0.485, "ImageNet"),
        ({"mean": "x", "std": "os.system()"}, 0.485, "ImageNet"),
        (None, 0.485, "ImageNet"),
    ]:
        save_file(state, tmp_path / "w.safetensors", metadata)
        loaded = load_model(net, tmp_path / "w.safetensors")
        assert (loaded.mean[0], loaded.preprocessing) == (mean, origin)


CODES = {
    "int8": lambda x: (x * 100).to(torch.int8),
    "uint8": lambda x: (x * 100).to(torch.uint8),
    "int64": lambda x: (x * 100).long(),
    "bool": lambda x: x > 0,
    "float8_e4m3fn": lambda x: x.to(torch.float8_e4m3fn),
    "complex64": lambda x: x.to(torch.complex64),
    "sparse_coo": lambda x: x.to_sparse(),
    "sparse_csr": lambda x: x.to_sparse_csr(),
    "meta": lambda x: x.to("meta"),
    "qint8": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore")  # torch calls sparse CSR a beta, and quantised tensors old
@pytest.mark.parametrize("kind", CODES)
def test_codes_are_no_weights(net, state, tmp_path, kind):
    state["2.weight"] = CODES[kind](state["2.weight"])
    text = refused(net, save(state, tmp_path / "w.pt"))
    assert text.startswith("weights are no plain numbers: '2.weight' of 'w.pt' is ")
    assert kind in text
    assert text.endswith(f"(1 of {len(state)} tensors): save the weights as dense floats, "
                         "before they are quantised")  # fmt: skip


def test_counts_and_indices_keep_their_kind(net, state, tmp_path):
    key = next(key for key in state if key.endswith("num_batches_tracked"))
    narrow = {**state, key: state[key].to(torch.int32)}
    assert same(load_model(net, save(narrow, tmp_path / "w.pt")).model, state)
    text = refused(net, save({**state, key: torch.tensor(1.5)}, tmp_path / "w.pt"))
    assert f"{key!r} of 'w.pt' is torch.float32 for torch.int64" in text


def test_double_and_bfloat16_weights_load(net, state, tmp_path):
    for dtype, off in ((torch.float64, 0), (torch.bfloat16, 1e-2)):
        other = {k: x.to(dtype) if x.is_floating_point() else x for k, x in state.items()}
        model = load_model(net, save(other, tmp_path / "w.pt"), seed=1).model
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, state[key], atol=off, rtol=off)
