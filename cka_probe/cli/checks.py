"""Words of the command line that no command can use, refused by name before any work."""

import argparse

SEEDS = 2**63


def check_words(args: argparse.Namespace) -> None:
    """Refuse empty values, counts of nothing and seeds that torch cannot take.

    Raises:
        ValueError: the option and what was given.
    """
    for name, value in vars(args).items():
        option = name if name == "report" else f"--{name.replace('_', '-')}"
        values = value if isinstance(value, list) else [value]
        if any(isinstance(word, str) and not word.strip() for word in values):
            raise ValueError(f"empty value: {option} '': give one, or leave the option out")
    seed = getattr(args, "seed", 0)
    if not -SEEDS <= seed < SEEDS:
        raise ValueError(f"seed out of range: {seed}: give a whole number below 2**63")
    size = getattr(args, "size", None)
    if size is not None and size <= 0:
        raise ValueError(f"bad size: {size}: a side is at least 1 pixel")
    kind, against = getattr(args, "kind", "grid"), getattr(args, "against", None)
    if against is not None and kind in ("heatmap", "curve"):
        raise ValueError(f"--against is for a grid: {against!r} with --kind {kind}: use --view")
