"""What a probe costs: time against the bare forwards and against the libraries in use, with errors.

    pip install -e '.[bench]'
    python experiments/bench_probe.py [JOB ...] [--repeats 7] [--threads 1,2] [--device cuda]

Contenders of a job take turns within one process, so that a busy machine slows all of them alike;
a row gives the ratio of the best times of all turns, by the clock and by CPU seconds (the steadier
one where the cores are shared), the CPU seconds of this machine, the peak memory of one call above
that of its inputs (in a process of its own; of a contender that is timed once, in that call), and
the largest error of the matrix against float64 (tests/helpers/oracle.py). Rows are written to
results/bench_probe.csv after each job. Random weights and noise images: nothing here depends on
values. `bare` is the forward passes alone under `inference_mode`.

With `--device cuda` the jobs are those of bench_card.py, calls end when the card is done, memory is
the card's (the most that a call after the first had allocated above what was there before it), and
rows go to results/bench_probe_cuda.csv with the card's name. The truth is then float64 code of
bench_card.py, on the card and from the outputs as they are there: tests/helpers/oracle.py would
take minutes. tests/experiments/test_bench_card.py holds the one against the other.
"""

import argparse
import csv
import json
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_card import card_jobs
from bench_jobs import JOBS, Call, Job

RESULTS = Path(__file__).resolve().parent / "results" / "bench_probe.csv"
FIELDS = ("job", "threads", "contender", "against", "clock_ratio", "cpu_ratio", "cpu_s", "peak_mib",
          "max_error", "repeats", "torch")  # fmt: skip
CARD_RESULTS = RESULTS.with_name("bench_probe_cuda.csv")
CARD_FIELDS = (*FIELDS, "clock_s", "device")


def timed(call: Call, device: str = "cpu") -> tuple[float, float, Any]:
    """Seconds by the clock and of CPU, and what came out."""
    wait(device)
    clock, cpu = time.perf_counter(), time.process_time()
    out = call()
    wait(device)
    return time.perf_counter() - clock, time.process_time() - cpu, out


def wait(device: str) -> None:
    """Until a card has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure(
    name: str, make: Callable[[], Job], threads: int, repeats: int,
    device: str = "cpu", without: tuple[str, ...] = (),
) -> list[dict[str, Any]]:  # fmt: skip
    """One job: warm-up, turns, ratios of minima; memory the most of all turns."""
    torch.set_num_threads(threads)
    job = make()
    on_card, fields = device == "cuda", CARD_FIELDS if device == "cuda" else FIELDS
    held = card_mib if on_card else held_mib
    calls = {who: call for who, call in job.calls.items() if who not in without}
    against = [other for other in job.against if other in calls]
    best, peaks, matrices = dict[str, tuple[float, float]](), dict[str, float](), dict[str, Any]()
    for turn in range(repeats + 1):
        for who, call in calls.items():
            once = who in job.once
            if turn and once:
                continue
            here = on_card or once  # or else in a process of its own
            before = held(fresh=True) if here else 0.0
            clock, cpu, matrices[who] = timed(call, device)
            if turn or once:  # the first one warms up
                if here:
                    peaks[who] = max(peaks.get(who, 0.0), held() - before)
                low = best.get(who, (math.inf, math.inf))
                best[who] = (min(low[0], clock), min(low[1], cpu))
    truth, rows = job.truth(), []
    for who in calls:
        if who not in peaks:
            peaks[who] = peak_mib(name, who, threads)
        error = ""
        if matrices[who] is not None and who != "linear":
            found = torch.as_tensor(matrices[who]).double().cpu().numpy()
            error = f"{np.abs(found - truth).max():.1e}"
        turns = 1 if who in job.once else repeats
        on = [f"{best[who][0]:.4f}", torch.cuda.get_device_name()] if on_card else []
        for other in against if who.startswith("cka-probe") else against[:1]:
            ratio = [f"{a / b:.3f}" for a, b in zip(best[who], best[other], strict=True)]
            rows.append([name, threads, who, other, *ratio, f"{best[who][1]:.3f}",
                         f"{peaks[who]:.0f}", error, turns, torch.__version__, *on])  # fmt: skip
    return [dict(zip(fields, row, strict=True)) for row in rows]


def card_mib(*, fresh: bool = False) -> float:
    """The most memory that tensors have had on the card; `fresh` counts from here."""
    if fresh:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated() / 2**20


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


def write(rows: list[dict[str, Any]], results: Path, fields: tuple[str, ...]) -> None:
    """Put rows in the place of those of the same job and threads."""
    new = {(row["job"], str(row["threads"])) for row in rows}
    keep = []
    if results.exists():
        with results.open(newline="") as file:
            keep = [r for r in csv.DictReader(file) if (r["job"], r["threads"]) not in new]
    with results.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows([*keep, *rows])


def table(results: Path) -> str:
    """The ratios of cka-probe as Markdown, from the file of results."""
    with results.open(newline="") as file:
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
    parser.add_argument("--repeats", type=int, help="default: 7, on a card 5")
    parser.add_argument("--threads", default="1", help="such as 1,2")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--without", default="torch-cka", metavar="NAME,...",
                        help="on a card: contenders to leave out")  # fmt: skip
    parser.add_argument("--within", type=float, default=math.inf, metavar="S",
                        help="begin no job after so many seconds")  # fmt: skip
    parser.add_argument("--table", action="store_true", help="print the results so far, only")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.peak:
        print_peak(*json.loads(args.peak))
        return
    on_card = args.device == "cuda"
    results, fields = (CARD_RESULTS, CARD_FIELDS) if on_card else (RESULTS, FIELDS)
    if args.table:
        print(table(results))
        return
    began, jobs = time.perf_counter(), card_jobs(args.device) if on_card else JOBS
    without = tuple(args.without.split(",")) if on_card else ()
    repeats = args.repeats or (5 if on_card else 7)
    for threads in map(int, args.threads.split(",")):
        for name in jobs:
            late = time.perf_counter() - began > args.within
            if late or (args.jobs and not any(word in name for word in args.jobs)):
                continue
            rows = measure(name, jobs[name], threads, repeats, args.device, without)
            write(rows, results, fields)
            for row in rows:
                print(" | ".join(str(value) for value in row.values()), flush=True)


if __name__ == "__main__":
    main()
