"""The benchmark on a GPU, tried small on the CPU: its truth, its contenders, its memory."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import cka_matrix

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
NETWORKS = ["resnet18@64, 18 layers, 64 images", "8 scales x 17 blocks, 8 images"]
FEATURES = ["features, n = 32, 20 layers", "rbf features, n = 32, 20 layers"]


@pytest.fixture
def bench(monkeypatch):
    """A module of experiments/, which are scripts and import each other by name."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module


def tiny(bench, name):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return bench("bench_card").card_jobs("cpu", share=64)[name]()


def ours(job):
    calls = {who: call for who, call in job.calls.items() if who.startswith("cka-probe")}
    return {who: np.asarray(call()) for who, call in calls.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_truth_of_a_network_is_that_of_the_oracle(bench, name):
    job = tiny(bench, name)
    truth = job.truth()
    assert np.allclose(truth, bench("bench_jobs").truth_of(*job.given), rtol=0, atol=1e-11)
    found = ours(job)
    assert list(found) == ["cka-probe", "cka-probe, batches given"]
    for who, matrix in found.items():
        assert np.allclose(matrix, truth, rtol=0, atol=1e-6), who
    assert job.calls["bare"]() is None


def test_the_truth_weighs_batches_by_their_size(bench):
    g = torch.Generator().manual_seed(0)
    views = [torch.randn(20, 3, side, side, generator=g) for side in (4, 6)]
    given = torch.nn.Sequential(torch.nn.AvgPool2d(2), torch.nn.ReLU()), ["0", "1"], views, 8
    truth = bench("bench_card")._truth(*given, "cpu")
    assert np.allclose(truth, bench("bench_jobs").truth_of(*given), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", FEATURES)
def test_the_truth_of_features_is_that_of_the_oracle(bench, name):
    job = tiny(bench, name)
    truth, (features, kernel) = job.truth(), job.given
    assert kernel == ("rbf" if name.startswith("rbf") else "linear")
    want = cka_matrix([x.numpy() for x in features], kernel)
    assert np.allclose(truth, want, rtol=0, atol=1e-12)
    assert np.allclose(bench("bench_jobs").truth_of_features(*job.given), want, rtol=0, atol=1e-12)
    assert np.allclose(ours(job)["cka-probe"], truth, rtol=0, atol=1e-6)


def test_features_are_the_same_for_another_library(bench):
    pytest.importorskip("cka", reason="pytorch-cka is not installed: pip install -e '.[bench]'")
    job = tiny(bench, FEATURES[0])
    assert np.allclose(job.calls["pytorch-cka"](), job.truth(), rtol=0, atol=1e-4)


def test_the_names_are_those_of_the_committed_results(bench):
    names, probe = set(bench("bench_card").card_jobs("cuda")), bench("bench_probe")
    head, *lines = probe.CARD_RESULTS.read_text().splitlines()
    assert tuple(head.split(",")) == probe.CARD_FIELDS
    assert {line.split('"')[1] for line in lines} <= names


def test_memory_is_the_most_of_all_turns_after_the_first(bench, monkeypatch):
    jobs, probe = bench("bench_jobs"), bench("bench_probe")
    job = jobs.Job({"cka-probe": lambda: np.eye(2)}, ("cka-probe",), lambda: np.eye(2))
    peak = iter([14, 17, 12])
    monkeypatch.setattr(probe, "card_mib", lambda fresh=False: 10 if fresh else next(peak))
    monkeypatch.setattr(probe, "wait", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    (row,) = probe.measure("a job", lambda: job, torch.get_num_threads(), 3, "cuda")
    assert (row["peak_mib"], row["max_error"], row["device"]) == ("7", "0.0e+00", "a card")
    assert tuple(row) == probe.CARD_FIELDS
