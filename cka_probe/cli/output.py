"""Where the commands write: the folder of --out, its files, and what is said about them."""

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import matplotlib as mpl

from cka_probe.distributed.ranks import Ranks
from cka_probe.html.page import save_page
from cka_probe.io import replacing
from cka_probe.plot import figures as plots
from cka_probe.probing.run import REPORT
from cka_probe.probing.state import ROWS, STATE
from cka_probe.report import Report

OUTPUTS = (REPORT, "cka.csv", "heatmap.png", "curve.png", "grid.png", "report.html")


@contextmanager
def output_folder(args: argparse.Namespace) -> Iterator[Path]:
    """The folder of --out, checked before any work; after a failure as it was before.

    What an interrupted run saved stays: state.npz, or report.npz where all batches were through.

    Raises:
        ValueError: a report is there already, and neither --overwrite nor --resume was given.
        OSError: the folder cannot be made or written.
    """
    folder = Path(args.out)
    if not getattr(args, "ranks", Ranks()).first:  # rank 0 looks after it
        yield folder
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output is not a folder: {folder}: choose another --out")
    present = [name for name in OUTPUTS if (folder / name).exists()]
    if (REPORT in present) and not (args.overwrite or args.resume):
        raise ValueError(f"a report is there already: {folder / REPORT}: add --overwrite, or "
                         "choose another --out")  # fmt: skip
    report = folder / REPORT
    old = report.read_bytes() if REPORT in present else b""
    folder.mkdir(parents=True, exist_ok=True)
    probe_dir = mkdtemp(dir=folder, prefix=".writable-")
    Path(probe_dir).rmdir()
    if args.overwrite and not args.resume:
        for name in (STATE, ROWS):
            (folder / name).unlink(missing_ok=True)
    saved = [name for name in (STATE, ROWS) if (folder / name).exists()]
    try:
        yield folder
    except BaseException as error:
        gone = set(OUTPUTS) - set(present)
        if _is_bad_input(error):  # no use in going on with that
            gone |= {STATE, ROWS} - set(saved)
        if report.exists() and report.read_bytes() != old:  # the forwards were done
            if isinstance(error, KeyboardInterrupt):
                gone = set(OUTPUTS) - {REPORT}  # --resume draws the rest
                args.kept = True
            elif old:
                with replacing(report) as temporary:
                    temporary.write_bytes(old)
        for name in gone:
            (folder / name).unlink(missing_ok=True)
        for path in made:
            if path.exists() and not any(path.iterdir()):
                path.rmdir()
        raise


def _is_bad_input(error: BaseException) -> bool:
    """Whether another try would fail alike: not where the system failed to read or write."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return False
        cause = cause.__cause__
    return isinstance(error, (ValueError, TypeError))


def write(report: Report, folder: Path, pictures: tuple[str, ...]) -> None:
    """All files of a run, whole or none: made in a folder beside, then moved."""
    temporary = Path(mkdtemp(dir=folder, prefix=".writing-"))
    try:
        with backend():
            for kind in pictures:
                draw: Callable[..., Any] = getattr(plots, kind)
                plots.save_figure(draw(report), temporary / f"{kind}.png")
        report.to_frame().to_csv(temporary / "cka.csv", index=False)
        save_page(report, temporary / "report.html")
        report.save(temporary / REPORT)
        made = {path.name for path in temporary.iterdir()}
        for name in sorted(made):
            (temporary / name).replace(folder / name)
        for name in set(OUTPUTS) - made:  # of the run that was there before
            (folder / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def backend() -> Iterator[None]:
    """Pictures go to files: no display is needed."""
    with mpl.rc_context({"backend": "Agg"}):
        yield


def table(report: Report) -> None:
    """Print CKA with the reference, layers x views."""
    print()
    print(f"CKA with view {report.reference}, same layer:")
    print(report.against().round(3).to_string())
    print()


def left_out(report: Report) -> None:
    """Name the images that could not be read, and those that were dropped with them."""
    few = report.meta.get("left_out_readable", [])
    lost = [name for name in report.meta.get("left_out", []) if name not in set(few)]
    if lost:
        print(f"cka-probe: left out, unreadable: {', '.join(lost)}", file=sys.stderr)
    if few:
        print(
            "cka-probe: left out, readable but with fewer than 4 such in their batch: "
            + ", ".join(few),
            file=sys.stderr,
        )


def wrote(folder: Path, pictures: tuple[str, ...]) -> None:
    """Say what lies where."""
    shown = ", ".join(f"{kind}.png" for kind in pictures)
    print(f"wrote {folder}/: report.npz, cka.csv, {shown}, report.html")
