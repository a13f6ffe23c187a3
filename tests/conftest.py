"""What every test shares: threads, and where the real data lies."""

import os
import shutil
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real weights and images; skips, naming it, where there is none."""
    folder = Path(os.environ.get("CKA_PROBE_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set CKA_PROBE_DATA")
    return folder


@pytest.fixture
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """`experiments` is a package of the repository alone: imported from there."""
    monkeypatch.syspath_prepend(str(REPOSITORY))


torch.set_num_threads(1)  # two threads on two busy cores wait for each other most of the time


@pytest.fixture(params=[1, 2])
def threads(request):
    """Run a test with 1 and with 2 threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def float32_convolutions():
    """Convolutions of CUDA in float32 proper, as on the CPU: cuDNN takes TF32 where it may."""
    cudnn = torch.backends.cudnn
    conv = getattr(cudnn, "conv", None)  # torch from 2.9 on
    home, name, off = (cudnn, "allow_tf32", False) if conv is None else (
        conv, "fp32_precision", "ieee"
    )  # fmt: skip
    before = getattr(home, name)
    setattr(home, name, off)
    yield
    setattr(home, name, before)


SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update",
            "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium; skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on the path: install Debian's package chromium")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=chromium, args=SWITCHES)
        yield running
        running.close()
