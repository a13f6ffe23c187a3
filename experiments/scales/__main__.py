"""Does a multi-scale network win at equal cost? Runs that can stop and go on anywhere.

python -m experiments.scales run --data ../shared/data --work out/scales [--minutes 60]
python -m experiments.scales draw       # tables and figures from results/ alone
python -m experiments.scales list       # what has run and what is left
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from experiments.scales.execute import Bench
from experiments.scales.ledger import Ledger
from experiments.scales.manifest import manifest
from experiments.scales.tasks import TASKS

HERE = Path(__file__).resolve().parent


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.scales", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("what", choices=("run", "draw", "list"))
    parser.add_argument("--data", type=Path, help="folder with images/ (CIFAR-10)")
    parser.add_argument("--work", type=Path, default=Path("out/scales"), help="working files")
    parser.add_argument("--minutes", type=float, default=float("inf"),
                        help="begin no further run after so many")  # fmt: skip
    parser.add_argument("--only", default="", help="runs whose name holds this")
    args = parser.parse_args()
    ledger = Ledger(HERE / "results")
    runs = [run for run in manifest() if args.only in run.key]
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
    began = time.monotonic()
    bench = Bench(args.work, ledger, TASKS, data=args.data,
                  say=lambda text: print(time.strftime("%H:%M:%S"), text, flush=True))  # fmt: skip
    for run in left:
        if time.monotonic() - began > 60 * args.minutes or (args.work / "stop").exists():
            print("stopped; the same command goes on", flush=True)
            return
        bench.execute(run)


if __name__ == "__main__":
    main()
