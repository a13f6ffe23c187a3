"""What a probe costs: time against the bare forwards and against the libraries in use, with errors.

    pip install -e '.[bench]'
    python experiments/bench_probe.py [JOB ...] [--repeats 7] [--threads 1,2]

Contenders of a job take turns within one process, so that a busy machine slows all of them alike;
a row gives the ratio of the best times of all turns, by the clock and by CPU seconds (the steadier
one where the cores are shared), the CPU seconds of this machine, the peak memory of one call above
that of its inputs (in a process of its own; of a contender that is timed once, in that call), and
the largest error of the matrix against float64 (tests/oracle.py). Rows are written to
results/bench_probe.csv after each job. Random weights and noise images: nothing here depends on
values. `bare` is the forward passes alone under `inference_mode`.
"""

import argparse
import csv
import json
import math
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_jobs import JOBS, Call

RESULTS = Path(__file__).resolve().parent / "results" / "bench_probe.csv"
FIELDS = ("job", "threads", "contender", "against", "clock_ratio", "cpu_ratio", "cpu_s", "peak_mib",
          "max_error", "repeats", "torch")  # fmt: skip


def timed(call: Call) -> tuple[float, float, Any]:
    """Seconds by the clock and of CPU, and what came out."""
    clock, cpu = time.perf_counter(), time.process_time()
    out = call()
    return time.perf_counter() - clock, time.process_time() - cpu, out


def measure(name: str, threads: int, repeats: int) -> list[dict[str, Any]]:
    """One job: warm-up, turns, ratios of minima."""
    torch.set_num_threads(threads)
    job = JOBS[name]()
    best: dict[str, tuple[float, float]] = {}
    peaks: dict[str, float] = {}
    matrices: dict[str, Any] = {}
    for turn in range(repeats + 1):
        for who, call in job.calls.items():
            if who in job.once:
                if turn == 0:
                    before = held_mib(fresh=True)
                    clock, cpu, matrices[who] = timed(call)
                    best[who] = (clock, cpu)
                    peaks[who] = held_mib() - before
                continue
            clock, cpu, matrices[who] = timed(call)
            if turn:  # the first one warms up
                low = best.get(who, (math.inf, math.inf))
                best[who] = (min(low[0], clock), min(low[1], cpu))
    truth, rows = job.truth(), []
    for who in job.calls:
        if who not in peaks:
            peaks[who] = peak_mib(name, who, threads)
        error = ""
        if matrices[who] is not None and who != "linear":
            error = f"{np.abs(np.asarray(matrices[who], dtype=float) - truth).max():.1e}"
        turns = 1 if who in job.once else repeats
        for other in job.against if who == "cka-probe" else job.against[:1]:
            ratio = [f"{a / b:.3f}" for a, b in zip(best[who], best[other], strict=True)]
            rows.append([name, threads, who, other, *ratio, f"{best[who][1]:.3f}",
                         f"{peaks[who]:.0f}", error, turns, torch.__version__])  # fmt: skip
    return [dict(zip(FIELDS, row, strict=True)) for row in rows]


def peak_mib(name: str, who: str, threads: int) -> float:
    """Peak memory of one call above what the process held before it, in a process of its own."""
    words = [sys.executable, __file__, "--peak", json.dumps([name, who, threads])]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def print_peak(name: str, who: str, threads: int) -> None:
    torch.set_num_threads(threads)
    call = JOBS[name]().calls[who]
    before = held_mib(fresh=True)
    call()
    print(held_mib() - before)


def held_mib(*, fresh: bool = False) -> float:
    """The most memory that this process has held; `fresh` counts from here (Linux)."""
    if fresh:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def write(rows: list[dict[str, Any]]) -> None:
    """Put rows in the place of those of the same job and threads."""
    new = {(row["job"], str(row["threads"])) for row in rows}
    keep = []
    if RESULTS.exists():
        with RESULTS.open(newline="") as file:
            keep = [r for r in csv.DictReader(file) if (r["job"], r["threads"]) not in new]
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows([*keep, *rows])


def table() -> str:
    """The ratios of cka-probe as Markdown, from the file of results."""
    with RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = ["| job | threads | against | clock | CPU | peak, MiB (theirs) | error (theirs) |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        if row["contender"] == "cka-probe":
            same = [row["job"], row["threads"], row["against"]]
            other = next(r for r in rows if [r["job"], r["threads"], r["contender"]] == same)
            cells = [*same, f"{row['clock_ratio']}x", f"{row['cpu_ratio']}x"]
            cells.append(f"{row['peak_mib']} ({other['peak_mib']})")
            cells.append(f"{row['max_error']} ({other['max_error'] or 'none'})")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jobs", nargs="*", metavar="JOB", help="part of a name; all where none")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", default="1", help="such as 1,2")
    parser.add_argument("--table", action="store_true", help="print the results so far, only")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.peak:
        print_peak(*json.loads(args.peak))
        return
    if args.table:
        print(table())
        return
    for threads in map(int, args.threads.split(",")):
        for name in JOBS:
            if not args.jobs or any(word in name for word in args.jobs):
                rows = measure(name, threads, args.repeats)
                write(rows)
                for row in rows:
                    print(" | ".join(str(value) for value in row.values()), flush=True)


if __name__ == "__main__":
    main()
