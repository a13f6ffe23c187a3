"""`msun demo`: every step on embedded images, with figures and a page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cka_probe.cli.options import positive, seed
from cka_probe.cli.output import REPORT, file_backend, output_folder, staged

if TYPE_CHECKING:
    import pandas as pd

    from msun.cli.demo_run import Demo

__all__ = ["add", "execute", "sentences"]

FILES = (REPORT, "report.html", "split.json", "split.png", "model.pt", "evaluation.csv",
         "evaluation.png", "pareto.png", "demo.html")  # fmt: skip
CAVEAT = (
    "What this does not show: characters of one kind, one seed and a short training say nothing of "
    "photographs or of other networks, and the single-scale network was given the same compute, "
    "not the best use of it (training at several sizes without subnets is such a use). Top-1 is on "
    "drawn test images, a fifth of them in faces that training never uses."
)


def add(commands: Any) -> None:
    """Add the command to the parser's sub-commands."""
    parser = commands.add_parser(
        "demo",
        help="every step on embedded images, in a few minutes",
        description="Probe a small network on drawn characters, suggest where to cut it, build a "
        "multi-scale network, train it beside the same backbone at one scale with equal compute, "
        f"and measure both at many sizes. Writes {', '.join(FILES)}. Needs no data.",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--steps", type=positive, default=150, metavar="N",
                        help="training steps of the multi-scale network (default 150)")  # fmt: skip
    parser.add_argument("--images", type=positive, default=1240, metavar="N",
                        help="test images (default 1240, 20 a class)")  # fmt: skip
    parser.add_argument("--seed", type=seed, default=0, metavar="S",
                        help="seeds everything (default 0)")  # fmt: skip
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing result in --out"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(call=execute)


def execute(args: argparse.Namespace) -> None:
    """Run every step, then write and print what was measured."""
    from msun.cli.demo_run import demo

    with (
        output_folder(args.out, FILES, overwrite=args.overwrite) as folder,
        staged(folder) as work,
    ):
        done = demo(
            work, steps=args.steps, images=args.images, seed=args.seed, say=_say,
            progress=not args.quiet,
        )  # fmt: skip
        _write(done, work)
    print()
    print(_table(done.evaluation).to_string(index=False))
    print()
    for line in sentences(done):
        print(line)
    print(f"wrote {folder}/: {', '.join(FILES)}")


def sentences(done: Demo) -> list[str]:
    """The results in words.

    Args:
        done: the demo.
    """
    top1 = done.evaluation.set_index(["arm", "size_px"])["top1"]
    gmacs = done.evaluation.set_index(["arm", "size_px"])["gmacs"]
    small, large = (pick(done.evaluation["size_px"]) for pick in (min, max))
    means = gmacs.groupby("arm", sort=False).mean() * 1e3
    accuracies = top1.groupby("arm", sort=False).mean()
    listed = "; ".join(f"{arm} {accuracies[arm]:.1%} at {means[arm]:.1f}" for arm in means.index)
    return [
        f"At {small} px the multi-scale network is right on {top1['lean', small]:.1%} of the test "
        f"images, the single-scale one on {top1['single', small]:.1%} fed as they are and "
        f"{top1['single, upsampled', small]:.1%} enlarged to {large} px; at {large} px "
        f"{top1['lean', large]:.1%} and {top1['single', large]:.1%}.",
        _where_it_loses(done),
        f"Mean over the sizes, with million MACs an image: {listed}.",
        f"Trained for {done.gmacs['lean']:.0f} and {done.gmacs['single']:.0f} GMACs forward, "
        f"{done.steps['lean']} and {done.steps['single']} steps.",
    ]


def _where_it_loses(done: Demo) -> str:
    """The sizes at which another arm has more right answers, in words."""
    wide = done.evaluation.pivot_table(index="size_px", columns="arm", values="top1", sort=False)
    better = [
        f"{side} px ({row.idxmax()} {row.max():.1%}, lean {row['lean']:.1%})"
        for side, row in wide.iterrows()
        if row.max() > row["lean"]
    ]
    if not better:
        return "No other arm is ahead of it at any of the sizes."
    return f"It is behind at {', '.join(better)}."


def _say(text: str) -> None:
    print(text, flush=True)


def _table(frame: pd.DataFrame) -> pd.DataFrame:
    """Top-1 in per cent, arms in columns, and what each costs."""
    wide = frame.pivot_table(index="size_px", columns="arm", values="top1", sort=False)
    table = (100 * wide).round(1).add_prefix("top-1 %, ")
    costs = frame.pivot_table(index="size_px", columns="arm", values="gmacs", sort=False)
    both: pd.DataFrame = table.join((1e3 * costs).round(1).add_prefix("MMACs, "))
    both.columns.name, both.index.name = None, "size, px"
    flat: pd.DataFrame = both.reset_index()
    return flat


def _write(done: Demo, work: Path) -> None:
    from cka_probe.html.page import save_page as save_report_page
    from cka_probe.plot.figures import save_figure
    from msun.cli.page import save_page
    from msun.plot.evaluation import accuracy, pareto
    from msun.plot.split import split_curve

    done.report.save(work / REPORT)
    save_report_page(done.report, work / "report.html")
    done.choice.save(work / "split.json")
    done.evaluation.to_csv(work / "evaluation.csv", index=False)
    with file_backend():
        save_figure(split_curve(done.choice), work / "split.png")
        save_figure(accuracy(done.evaluation), work / "evaluation.png")
        save_figure(pareto(done.evaluation), work / "pareto.png")
    save_page(
        work / "demo.html",
        "One network for characters of any size",
        [*sentences(done), f"The cut: {done.choice.why} {done.choice.rivalry}"],
        {
            "Where to cut": (work / "split.png", "CKA with the reference along the layers"),
            "Accuracy by size": (work / "evaluation.png", "top-1 against image side, every arm"),
            "Accuracy against cost": (work / "pareto.png", "top-1 against GMACs, every arm"),
        },
        _table(done.evaluation),
        [CAVEAT, "report.html has the whole comparison of layers; model.pt loads with msun.load."],
    )
