"""Arguments that several commands share, and the network that they name."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cka_probe.cli.options import add_model as add_plain_model
from cka_probe.cli.options import load_network, positive

if TYPE_CHECKING:
    from cka_probe.models.load import LoadedModel

__all__ = ["add_model", "load"]


def add_model(parser: argparse.ArgumentParser, *, weights: str | None = "DEFAULT") -> None:
    """Add --model, --weights, --model-arg and --classes.

    Args:
        parser: the command's parser.
        weights: the default of --weights.
    """
    add_plain_model(parser, weights=weights)
    parser.add_argument("--classes", type=positive, metavar="N", help="replace the classifier (the "
                        "last layer) by a new one for N classes of your own")  # fmt: skip


def load(args: argparse.Namespace, weights: str | None = None) -> LoadedModel:
    """The network that --model, --weights, --model-arg and --classes name.

    Args:
        args: the parsed command line.
        weights: instead of --weights.
    """
    import msun

    loaded = load_network(args, args.model, args.weights if weights is None else weights)
    classes = getattr(args, "classes", None)
    if classes is None:
        return loaded
    return msun.replace_classifier(loaded, classes, seed=getattr(args, "seed", 0))
