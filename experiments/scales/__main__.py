"""Does a multi-scale network win at equal cost? Runs that can stop and go on anywhere.

python -m experiments.scales run --data ../shared/data --work out/scales [--minutes 60]
                                        # one core; start it once for each core
python -m experiments.scales unread --work out/scales
                                        # the verdict once more on further test images
python -m experiments.scales time       # latency, on a quiet machine
python -m experiments.scales why        # CKA and gradients of trained networks in --work
python -m experiments.scales draw       # tables and figures from results/ alone
python -m experiments.scales list       # what has run and what is left
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout

from experiments.scales.execute import Bench
from experiments.scales.ledger import Ledger
from experiments.scales.manifest import Run, larger, manifest, unread
from experiments.scales.tasks import TASKS

HERE = Path(__file__).resolve().parent


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.scales", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("what", choices=("run", "unread", "time", "why", "draw", "list"))
    parser.add_argument("--data", type=Path, help="folder with images/ (CIFAR-10)")
    parser.add_argument("--work", type=Path, default=Path("out/scales"), help="working files")
    parser.add_argument("--minutes", type=float, default=float("inf"),
                        help="begin no further run after so many")  # fmt: skip
    parser.add_argument("--tier", choices=("usual", "larger"), default="usual",
                        help="larger: MobileNetV2 with ImageNet weights, for a GPU")  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu, cuda")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="runs whose name holds one of these"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(HERE / "results", args.work / "ledger.lock")
    every = larger() if args.tier == "larger" else manifest()
    runs = [run for run in every if any(word in run.key for word in args.only)]
    if args.what == "time":
        from experiments.scales.latency import timed

        rows = [row for net in ("residual", "depthwise") for row in timed("glyphs", net)]
        ledger.rewrite("latency", pd.DataFrame(rows))
        return
    if args.what == "draw":
        from experiments.scales.draw import draw

        draw(ledger, HERE)
        return
    done = ledger.done()
    left = [run for run in runs if run.left(done)]
    print(f"{len(runs) - len(left)} of {len(runs)} runs are in the ledger", flush=True)
    if args.what == "list":
        print("\n".join(run.key for run in left))
        return
    bench = Bench(args.work, ledger, TASKS, data=args.data, device=args.device,
                  say=lambda text: print(time.strftime("%H:%M:%S"), text, flush=True))  # fmt: skip
    if args.what == "why":
        from experiments.scales.why import look

        task = TASKS["glyphs"]
        images = [bench.images(task, split) for split in ("train", "val")]
        rows = look(task, "residual", *images, args.work / "runs")
        ledger.rewrite("why", rows.round(4))
        return
    until = time.monotonic() + 60 * args.minutes
    if args.what == "unread":
        reread(bench, unread(), until=until)
        return
    work_through(bench, runs, until=until)


def reread(bench: Bench, runs: Sequence[Run], *, until: float = float("inf")) -> None:
    """Read further test images once with each of these, but for those in hand elsewhere.

    Args:
        bench: where.
        runs: in order.
        until: a time of the monotonic clock after which no further one begins.
    """
    claims = bench.work / "claims"
    claims.mkdir(parents=True, exist_ok=True)
    for run in runs:
        if time.monotonic() > until or (bench.work / "stop").exists():
            bench.say("stopped; the same command goes on")
            return
        try:
            with FileLock(claims / f"unread-{run.key}", blocking=False):
                bench.reread(run)
        except Timeout:
            continue


def work_through(bench: Bench, runs: Sequence[Run], *, until: float = float("inf"),
                 pause_s: float = 10.0) -> None:  # fmt: skip
    """Execute what is left, the first run first that no other process has in hand.

    Args:
        bench: where.
        runs: in order.
        until: a time of the monotonic clock after which no further run begins.
        pause_s: seconds between looks at what other processes have in hand.
    """
    claims = bench.work / "claims"
    claims.mkdir(parents=True, exist_ok=True)
    while True:
        done = bench.ledger.done()
        left = [run for run in runs if run.left(done)]
        if not left:
            return
        for run in (one for main in left for one in bench.needs(main) or [main]):
            if time.monotonic() > until or (bench.work / "stop").exists():
                bench.say("stopped; the same command goes on")
                return
            try:
                with FileLock(claims / run.key, blocking=False):
                    if run.left(bench.ledger.done()):
                        bench.execute(run)
            except Timeout:
                continue
            break  # the ledger is another now, and with it what is needed
        else:
            time.sleep(pause_s)  # all that could run now is in hand elsewhere


if __name__ == "__main__":
    main()
