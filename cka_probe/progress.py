"""One progress bar for everything that takes long."""

import sys
from typing import Any

from tqdm.auto import tqdm


def progress_bar(total: int, *, desc: str, unit: str, initial: int = 0, show: bool = True) -> Any:
    """A tqdm bar: units per second and time left.

    In a terminal and in a notebook it shows at once. Where stderr is a file or a pipe it writes a
    line every half minute and nothing in the first ten seconds, so that logs stay readable and an
    early error stands alone. It is cleared when it ends early; set `bar.leave = True` at the end.

    Args:
        total: units to do.
        desc: a word in front.
        unit: what is counted, singular.
        initial: units done already (a resumed run).
        show: False for no bar.
    """
    live = _in_notebook() or bool(getattr(sys.stderr, "isatty", bool)())
    pace: dict[str, Any] = {} if live else {"delay": 10.0, "mininterval": 30.0}
    return tqdm(
        total=total,
        initial=initial,
        desc=desc,
        unit=unit,
        disable=not show,
        dynamic_ncols=True,
        smoothing=0.1,
        leave=False,
        **pace,
    )


def _in_notebook() -> bool:
    """Whether this code runs in a notebook's kernel; that ipykernel was imported is no proof."""
    get = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return getattr(get() if get else None, "kernel", None) is not None
