"""Multi-scale networks on a GPU, held against the CPU; skips where there is none."""

import copy
import csv
import math

import numpy as np
import pytest
import torch
from measured import Tiny, photographs, tensors
from torch import nn
from training import NET, SCALES, backbone, images, network, options, run

from cka_probe import probe
from msun import Predictions, build, calibrate, evaluate, find_cuts, recalibrated, suggest_split
from msun.cli import main as cli
from msun.network import checkpoint
from msun.network.policy import POLICIES, Policy
from msun.training.step import TrainingStep
from msun.training.trainer import train

CUDA = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("float32_convolutions"),
]
QUIET = {"progress": False}


def homes(net):
    return {x.device.type for x in net.state_dict().values()}


@torch.no_grad()
def logits(net, data):
    """In eval mode, on the CPU, at every side."""
    home = next(net.parameters()).device
    return [net.eval()(x.to(home)).cpu() for x in data]


def sides(*px):
    g = torch.Generator().manual_seed(3)
    return [torch.randn(3, 3, side, side, generator=g) for side in px]


def near(a, b, limit=1e-4):
    return all((x - y).abs().max() <= limit for x, y in zip(a, b, strict=True))


def losses(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    "policy", [*POLICIES.values(), Policy(subnets="shared"), Policy(norm="private")]
)
def test_a_network_moves_whole(policy):
    """Subnets that share weights too; and it can be built on the card."""
    made = build(backbone(), "stem", SCALES, policy=policy)
    data = sides(8, 11, 16)
    want = logits(made, data)
    there = build(backbone().to(CUDA), "stem", SCALES, policy=policy)
    assert homes(there) == {"cuda"}
    assert near(want, logits(there, data))
    assert near(want, logits(made.to(CUDA), data))
    mixed = [x[0].to(CUDA) for x in data]
    with torch.no_grad():
        assert near([made(mixed).cpu()], [torch.stack([x[0] for x in want])])
    assert near(want, logits(made.cpu(), data), 1e-6)
    assert near(want, logits(copy.deepcopy(made).to(CUDA), data))


def test_cuts_are_found_on_the_card():
    want = find_cuts(backbone(), images(2)[0])
    assert find_cuts(backbone().to(CUDA), images(2)[0].to(CUDA)) == want


@pytest.mark.parametrize("preset", ["lean", "paper"])
@pytest.mark.parametrize("amp", [None, "bf16", "fp16"])
@pytest.mark.parametrize("constraint", ["raw", "normalised", "cka"])
def test_it_learns_and_its_checkpoint_is_for_any_machine(tmp_path, amp, preset, constraint):
    model, path = run(tmp_path, preset=preset, constraint=constraint, amp=amp, device="cuda",
                      epochs=6, shards=1)  # fmt: skip
    assert homes(model) == {"cuda"}
    found = losses(tmp_path)
    assert found[-1] < found[0]
    assert all(math.isfinite(x) for x in found)
    assert not (tmp_path / "state.pt").exists()
    loaded = checkpoint.load(path, backbone=backbone())
    assert homes(loaded) == {"cpu"}
    data = sides(*SCALES, 12)
    assert near(logits(model, data), logits(loaded, data))
    kept = torch.load(path, weights_only=True)  # without map_location
    assert {x.device.type for x in kept["state"].values()} == {"cpu"}


def test_it_learns_as_on_the_cpu(tmp_path):
    how = {"dropout": 0.0, "epochs": 2}
    nets = [run(tmp_path / home, device=home, **how)[0].cpu() for home in ("cpu", "cuda")]
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), abs=1e-3)
    assert near(*(logits(net, sides(*SCALES)) for net in nets), limit=0.01)


@pytest.mark.parametrize(("amp", "then"), [(None, "cuda"), ("fp16", "cuda"), (None, "cpu")])
def test_it_goes_on_where_it_was_stopped(tmp_path, monkeypatch, amp, then):
    """Dropout draws on the card as if the run had been left alone; on a CPU it draws others."""
    before = torch.cuda.get_rng_state()
    whole, _ = run(tmp_path / "whole", device="cuda", amp=amp)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    descend, stop, made = TrainingStep.run, [7], []

    def interrupted(self, *args):
        if self.step in stop:
            raise KeyboardInterrupt
        made.append(self.step)
        return descend(self, *args)

    monkeypatch.setattr(TrainingStep, "run", interrupted)
    half = tmp_path / "half"
    with pytest.raises(KeyboardInterrupt):
        run(half, device="cuda", amp=amp, save_every_s=0)
    assert (half / "state.pt").exists()
    first = losses(half)
    assert len(first) == 1
    stop.clear()
    net = network()
    train(net, images(), options(half, device=then, amp=amp, resume=True))
    assert homes(net) == {then}
    assert made == list(range(15))  # 3 epochs of 5 steps, none of them twice
    found = losses(half)
    assert found[:1] == first
    assert len(found) == 3
    if then == "cuda":
        limit = 1e-2 if amp else 1e-3
        assert near(logits(whole, sides(*SCALES)), logits(net, sides(*SCALES)), limit)
    else:
        assert found[-1] < found[0]


@pytest.mark.parametrize("at", [None, "conv2"])
def test_evaluation_equals_that_of_the_cpu(tmp_path, at):
    net, found = Tiny(), {}
    for home in ("cpu", "cuda"):
        how = {"at": at, "batch_size": 8, "mixed": True, "predictions": tmp_path / home}
        frame = evaluate(net, tensors(), [8, 12, 16], device=home, **how, **QUIET)
        assert homes(net) == {"cpu"}
        found[home] = frame, Predictions.load(tmp_path / home)
    want, got = found["cpu"][0], found["cuda"][0]
    timed = [name for name in want if name.startswith("latency")]
    sized = got["size_px"].notna()
    assert (got.loc[sized, timed] > 0).all(axis=None)
    for name in want.columns.difference(timed):
        a, b = (x[name].to_numpy(float, na_value=np.nan) for x in (want, got))
        assert np.allclose(a, b, atol=1e-4, equal_nan=True), name
    assert np.array_equal(found["cpu"][1].rank, found["cuda"][1].rank)


def test_evaluation_where_the_network_is():
    made = network().to(CUDA)
    there = evaluate(made, images(), [8, 12, 16], latency=False, **QUIET)
    assert homes(made) == {"cuda"}
    here = evaluate(made, images(), [8, 12, 16], device="cpu", latency=False, **QUIET)
    assert homes(made) == {"cuda"}
    assert np.allclose(there["cka"], here["cka"], atol=1e-4)
    assert np.allclose(there["top1"], here["top1"])


def test_statistics_equal_those_of_the_cpu():
    data, wanted = images(), sides(8, 11, 12, 16)
    plain = [recalibrated(Tiny(), data, [8, 11], device=d, **QUIET) for d in ("cpu", "cuda")]
    scaled = [calibrate(network(), data, [8, 11], device=d, **QUIET) for d in ("cpu", "cuda")]
    for here, there in (plain, scaled):
        assert homes(there) == {"cpu"}
        assert near(logits(here, wanted), logits(there, wanted))
    there = recalibrated(Tiny().to(CUDA), data, [8, 11], **QUIET)
    assert homes(there) == {"cuda"}
    assert near(logits(plain[0], wanted), logits(there, wanted))
    calibrated = calibrate(network().to(CUDA), data, [8, 11], **QUIET)
    assert homes(calibrated) == {"cuda"}
    assert near(logits(scaled[0], wanted), logits(calibrated, wanted))
    assert near(logits(scaled[0], wanted), logits(calibrated.cpu(), wanted))


def test_a_split_is_suggested_as_on_the_cpu():
    net, data = backbone(), images()[0]
    layers = [cut.name for cut in find_cuts(net, data[:2])]
    chosen = []
    for home in ("cpu", "cuda"):
        report = probe(net, data, [8, 16], resize="restore", layers=layers, batch_size=8,
                       device=home, **QUIET)  # fmt: skip
        chosen.append(suggest_split(report, find_cuts(net, data[:2])).ranking)
    want, got = chosen
    assert want["layer"].tolist() == got["layer"].tolist()
    assert np.allclose(want["cka"], got["cka"], atol=1e-5)


def allocated(argv):
    """Bytes that a command takes on the card at most."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert cli.main([str(word) for word in argv]) == 0
    return torch.cuda.max_memory_allocated() - before


def test_the_command_line_takes_the_card_unless_told(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "photos").mkdir()
    photographs(tmp_path / "photos")
    net, data = f"{tmp_path / 'net.py'}:net", tmp_path / "photos"
    out = tmp_path / "out"
    commands = {
        "suggest": ["--model", net, "--data", data, "--scales", "8,16", "--batch-size", "5",
                    "--out", tmp_path / "split", "--quiet", "--overwrite"],
        "train": ["--model", net, "--at", "2", "--scales", "8,16", "--data", data, "--out", out,
                  "--batch-size", "8", "--epochs", "1", "--quiet", "--overwrite"],
        "eval": [out / "model.pt", "--data", data, "--sizes", "8,16",
                 "--out", tmp_path / "found", "--quiet", "--overwrite"],
    }  # fmt: skip
    for name, words in commands.items():
        told = [allocated([name, *words, "--device", "cpu"]), allocated([name, *words])]
        assert told[0] == 0 < told[1], name


def test_a_head_is_made_anew_on_the_card():
    from msun import replace_classifier

    made = replace_classifier(nn.Sequential(*backbone()).to(CUDA), 7)
    assert homes(made) == {"cuda"}
    assert logits(made, sides(16))[0].shape == (3, 7)
