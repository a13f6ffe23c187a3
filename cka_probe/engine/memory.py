"""How much memory there is, and how much each estimator takes."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

SKETCH_WORK_BYTES = 32 * 2**20
TILE_BYTES = 128 * 2**20  # float64 numbers of one tile of every entry
_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_memory(text: str | int | None) -> int | None:
    """Bytes from a number of bytes or from text with a unit, "4GiB", "500 MB"; None stays None.

    Raises:
        ValueError: text without a unit, not an amount of memory, or not positive.
    """
    if text is None:
        return None
    if isinstance(text, str) and re.fullmatch(r"\s*[0-9.]+\s*", text):
        raise ValueError(f"memory without a unit: {text!r}: write it as 4GiB or 500MB")
    # a number, a unit and an optional B: "4GiB", "4 gi", "500MB"; an int is bytes
    match = re.fullmatch(r"\s*([0-9.]+)\s*(?:([kmgt]i?)b?|b)\s*", str(text).lower())
    try:
        amount = float(match[1]) * _UNITS.get(match[2] or "", 1) if match else float(text)
    except ValueError:
        amount = 0
    if not 1 <= amount < 2**63:
        raise ValueError(f"bad amount of memory: {text!r}: write it as 4GiB or 500MB")
    return int(amount)


def available_memory() -> int:
    """Bytes that can be taken without swapping, as far as the system says."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, OSError, ValueError):
        return 2**62


def free_memory(devices: Iterable[torch.device], share: int = 1) -> int:
    """Bytes that a run may take where its features are, unless the user says how many.

    Args:
        devices: of the networks. A CUDA card gives half of what it has free, at most, counting what
            torch holds there unused: networks and their maps want room on it, too.
        share: what the host has free is divided by it.
    """
    found = available_memory() // share
    for device in set(devices):
        if device.type != "cuda":
            continue
        try:
            free, _ = torch.cuda.mem_get_info(device)
            free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        except (RuntimeError, AssertionError):  # no such card: refused by name, when it is used
            continue
        found = min(found, int(free) // 2)
    return found


def readable(amount: float) -> str:
    """Bytes as "3.2 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def exact_bytes(n: int, sizes: Sequence[tuple[int, int]], *, groups: int = 20) -> int:
    """What `exact` takes with its features in memory.

    Args:
        n: images.
        sizes: features and bytes of one, entry by entry.
        groups: of images.
    """
    kept = sum(n * d * max(4, size) for d, size in sizes)
    # one entry while it is centred, and its chunk in float64
    once = max(n * d * max(4, size) + 16 * min(n * d, max(d, 2**22)) for d, size in sizes)
    return kept + once + _sums(n, len(sizes), groups) + 3 * min(TILE_BYTES, 8 * len(sizes) * n * n)


def sketch_bytes(
    n: int, sizes: Sequence[tuple[int, int]], size: int, batch: int, *, groups: int = 20
) -> int:
    """What `sketch` takes: k numbers an image and entry, and the work of projecting and summing."""
    widths = [min(d, size) for d, _ in sizes]
    m, widest = len(sizes), max(widths)
    kept = 4 * n * sum(widths)
    if over_images(n, sum(widths), m):
        work = 3 * min(SKETCH_WORK_BYTES, 80 * m * n * n)
    else:
        work = 2 * max(SKETCH_WORK_BYTES, groups * widest**2)
    project = 12 * 8 * batch * max(8192, size)
    return kept + 4 * n * widest + max(work, project) + _sums(n, m, groups + 16)


def over_images(n: int, width: int, m: int) -> bool:
    """Whether tiles of (n, n) Grams cost less than products of all pairs of sketched features.

    Args:
        n: images.
        width: numbers an image, of all entries together.
        m: entries.
    """
    return n * (width + 34 * m * m) < 2 * width * width


def minibatch_bytes(m: int, batch: int, *, rbf: bool = False) -> int:
    """What `minibatch` takes, whatever the number of images: Grams of a batch, sums of 32 groups.

    With the RBF kernel the first 256 images wait for their bandwidth.
    """
    waiting = 8 * m * batch * max(batch, 256) if rbf else 0
    return 8 * (5 * m * batch**2 + 6 * 32 * m**2) + waiting


def _sums(n: int, m: int, groups: int) -> int:
    return 8 * m * groups * (n + 2 * m)
