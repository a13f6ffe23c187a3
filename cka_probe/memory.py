"""How much memory there is, and whether what an estimator keeps fits in it."""

import os
import re
from pathlib import Path
from typing import Any

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_memory(text: str | int | None) -> int | None:
    """Bytes from a number or from text such as "4GiB", "500 MB"; None stays None.

    Raises:
        ValueError: not an amount of memory, or not positive.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]i?)?b?\s*", str(text).lower())
    try:
        amount = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    except ValueError:
        amount = 0
    if amount <= 0:
        raise ValueError(f"bad amount of memory: {text!r}: write it as 4GiB or 500MB")
    return amount


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


def readable(amount: float) -> str:
    """Bytes as "3.2 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def check_features(estimator: Any, n: int, budget: int | None) -> None:
    """After the first batch: refuse where the features of all n images would not fit.

    Args:
        estimator: an `Exact` that holds one batch.
        n: images in the run.
        budget: bytes; None for what is available, plus what is held already.

    Raises:
        ValueError: they do not fit; the message says how much they take.
    """
    need = 0
    for parts in estimator.features.values():
        x = parts[0][1]
        need += n * (x[0].numel() * (x.element_size() + 4))  # as put, and once more centred
    limit = available_memory() if budget is None else budget
    if need > limit:
        raise ValueError(
            f"exact does not fit in memory: {readable(need)} of features, {readable(limit)} to "
            "use: use estimator 'minibatch', reduce 'mean', or fewer layers or images"
        )
