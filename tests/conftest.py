"""What every test shares: threads, and where the real data lies."""

import os
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


torch.set_num_threads(1)  # two threads on two busy cores wait for each other most of the time


# `python -c LISTENING program ...`: a process that hears Ctrl-C even where this one, started in the
# background, was told to ignore it
LISTENING = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


@pytest.fixture(params=[1, 2])
def threads(request):
    """Run a test with 1 and with 2 threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
