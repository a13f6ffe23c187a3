"""What commands write and print: the folder of --out, its files, tables, and lines about them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cka_probe.report import Report

__all__ = [
    "announcer",
    "file_backend",
    "output_folder",
    "print_comparison",
    "print_left_out",
    "staged",
    "table_lines",
    "write_report",
]

REPORT, STATE = "report.npz", "state.npz"  # cka_probe.probing.run and .state, sans their imports
OUTPUTS = (REPORT, "cka.csv", "heatmap.png", "curve.png", "grid.png", "report.html")
_STATE_FILES = (STATE, "state.rows")  # earlier versions wrote the second
_RESUME = "run again with --resume to continue"


@contextmanager
def output_folder(
    out: str | Path,
    outputs: Sequence[str],
    *,
    overwrite: bool,
    resume: bool | None = None,
    first: bool = True,
) -> Iterator[Path]:
    """The folder of --out, checked before any work; after a failure as it was before.

    What a run saved stays: state.npz, unless another try would fail alike, and report.npz once all
    batches were done, whatever fails while its pictures are drawn; --resume makes the other files.
    A KeyboardInterrupt then carries the hint to use it.

    Args:
        out: the value of --out.
        outputs: names of the files that the command writes there.
        overwrite: whether existing outputs, and the state of an interrupted run, are replaced.
        resume: whether a saved state is continued; None for a command that saves none.
        first: whether this process is rank 0, which alone looks after the folder.

    Raises:
        ValueError: outputs or a saved state are there, and neither overwrite nor resume is set.
        OSError: the folder cannot be made or written.
    """
    folder = Path(out)
    if not first:
        yield folder
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output is not a folder: {folder}: choose another --out")
    present = [name for name in outputs if (folder / name).exists()]
    if present and not (overwrite or resume):
        raise ValueError(
            f"a result is there already: {folder / present[0]}: add --overwrite, or choose another "
            "--out"
        )
    if resume is False:
        if overwrite:
            for name in _STATE_FILES:
                (folder / name).unlink(missing_ok=True)
        elif (folder / STATE).exists():
            raise ValueError(
                f"an interrupted run is there: {folder / STATE}: continue it with --resume, or "
                "start anew with --overwrite"
            )
    report = folder / REPORT
    old = report.read_bytes() if REPORT in present else b""
    folder.mkdir(parents=True, exist_ok=True)
    Path(mkdtemp(dir=folder, prefix=".writable-")).rmdir()  # raises where nothing can be written
    saved = [name for name in _STATE_FILES if (folder / name).exists()]
    try:
        yield folder
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt) and resume is not None
        gone = set(outputs) - set(present)
        if _is_bad_input(error):  # the next try would fail alike: its state is of no use
            gone |= set(_STATE_FILES) - set(saved)
        finished = report.exists() and REPORT in outputs and report.read_bytes() != old
        if finished and resume is not None:  # all forwards are done: it is never lost again
            # Pictures of the report that it replaced would belie it. Without such a report, what
            # was there before may be the user's.
            stale = set(present) if old and interrupted else set()
            gone = (gone | stale) - {REPORT}
        elif finished and old:
            from cka_probe.io import replacing

            with replacing(report) as temporary:
                temporary.write_bytes(old)
        for name in gone:
            (folder / name).unlink(missing_ok=True)
        for path in made:
            if path.exists() and not any(path.iterdir()):
                path.rmdir()
        if interrupted and (finished or (folder / STATE).exists()):
            raise KeyboardInterrupt(_RESUME) from None
        if finished and resume is not None and isinstance(error, OSError | MemoryError):
            from cka_probe.errors import RunFailedError, one_line

            reason = one_line(error) if isinstance(error, OSError) else "out of memory"
            raise RunFailedError(
                f"{reason}: the report is complete, {report}: run again with --resume to draw it"
            ) from error
        raise


def _is_bad_input(error: BaseException) -> bool:
    """Whether another try would fail alike: not where the system failed to read or write."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return False
        cause = cause.__cause__
    return isinstance(error, (ValueError, TypeError))


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A temporary folder in `folder`: its files move there on success and vanish otherwise."""
    temporary = Path(mkdtemp(dir=folder, prefix=".writing-"))
    try:
        yield temporary
        for path in sorted(temporary.iterdir()):
            if path.is_file():
                path.replace(folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_report(report: Report, folder: Path, pictures: Sequence[str]) -> None:
    """Write report.npz, cka.csv, report.html and the pictures; remove what an older run left.

    Args:
        report: the report.
        folder: the output folder.
        pictures: kinds of figures: "heatmap", "curve", "grid".
    """
    from cka_probe.html.page import save_page
    from cka_probe.plot import figures

    with staged(folder) as temporary:
        with file_backend():
            for kind in pictures:
                draw: Callable[..., Any] = getattr(figures, kind)
                figures.save_figure(draw(report), temporary / f"{kind}.png")
        report.to_frame().to_csv(temporary / "cka.csv", index=False)
        save_page(report, temporary / "report.html")
        report.save(temporary / REPORT)
        made = {path.name for path in temporary.iterdir()}
    for name in set(OUTPUTS) - made:
        (folder / name).unlink(missing_ok=True)


@contextmanager
def file_backend() -> Iterator[None]:
    """Matplotlib's backend for files inside, which needs no display."""
    import matplotlib as mpl

    with mpl.rc_context({"backend": "Agg"}):
        yield


def announcer(name: str) -> Callable[[str], None]:
    """A function that prints a run's announcements, the first one after the network's name."""
    prefixes = iter([f"{name}: "])

    def say(text: str) -> None:
        print(next(prefixes, "") + text, flush=True)

    return say


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table as lines of text, columns aligned on the left.

    Args:
        rows: cells by row; the titles are the first row.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def print_comparison(report: Report) -> None:
    """Print CKA with the reference view, layers x views."""
    print(f"\nCKA with view {report.reference}, same layer:")
    print(report.against().round(3).to_string())
    print()


def print_left_out(report: Report, program: str = "cka-probe") -> None:
    """Name on stderr the images that could not be read, and those that were dropped with them.

    Args:
        report: the report.
        program: the name that begins the line.
    """
    from cka_probe.errors import printable

    few = report.meta.get("left_out_readable", [])
    lost = [name for name in report.meta.get("left_out", []) if name not in set(few)]
    if lost:
        names = printable(", ".join(lost))
        print(f"{program}: left out, unreadable: {names}", file=sys.stderr)
    if few:  # a batch below 4 images has no unbiased HSIC
        print(
            f"{program}: left out, readable but with fewer than 4 such in their batch: "
            + printable(", ".join(few)),
            file=sys.stderr,
        )
