"""Words that several commands share, and what they mean."""

import argparse
from typing import Any

from cka_probe.cli.main import MODEL_HELP, WEIGHTS_HELP
from cka_probe.models.load import LoadedModel, load_model, parse_model_args
from msun.network.classifier import replace_classifier

__all__ = ["add_model", "load"]


def add_model(parser: Any, *, weights: str | None = "DEFAULT") -> None:
    """Add --model, --weights and --model-arg.

    Args:
        parser: of a command.
        weights: the default of --weights.
    """
    parser.add_argument("--model", required=True, metavar="M", help=MODEL_HELP)
    parser.add_argument("--weights", metavar="W", default=weights, help=WEIGHTS_HELP)
    parser.add_argument("--model-arg", metavar="KEY=VALUE", action="append", default=[],
                        help="passed to the model's constructor")  # fmt: skip
    parser.add_argument("--classes", type=int, metavar="N",
                        help="draw the last layer anew, for N classes of your own")  # fmt: skip


def load(args: argparse.Namespace, weights: str | None = None) -> LoadedModel:
    """The network that --model and its companions name.

    Args:
        args: with model, model_arg, weights and, for random weights, seed.
        weights: instead of --weights.
    """
    seed = getattr(args, "seed", 0)
    loaded = load_model(
        args.model,
        args.weights if weights is None else weights,
        model_args=parse_model_args(args.model_arg),
        seed=seed,
    )
    classes = getattr(args, "classes", None)
    return loaded if classes is None else replace_classifier(loaded, classes, seed=seed)
