"""Layer by layer, how far a representation moves when its input changes: CKA with error bars.

Names are loaded when they are first used (PEP 562): `import cka_probe` costs what `import torch`
costs, and the command line's `--help` less.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cka_probe import plot as plot
    from cka_probe.functional import DegenerateWarning as DegenerateWarning
    from cka_probe.functional import cka as cka
    from cka_probe.functional import cka_loss as cka_loss
    from cka_probe.functional import cka_matrix as cka_matrix
    from cka_probe.functional import permutation_test as permutation_test
    from cka_probe.probing.api import probe as probe
    from cka_probe.report import Report as Report

    __version__: str

# public name -> the module that defines it
_HOMES = {
    "DegenerateWarning": "cka_probe.functional",
    "Report": "cka_probe.report",
    "cka": "cka_probe.functional",
    "cka_loss": "cka_probe.functional",
    "cka_matrix": "cka_probe.functional",
    "permutation_test": "cka_probe.functional",
    "probe": "cka_probe.probing.api",
}
_MODULES = ("distributed", "inputs", "models", "plot")  # reached as attributes, too
__all__ = [
    "DegenerateWarning",
    "Report",
    "__version__",
    "cka",
    "cka_loss",
    "cka_matrix",
    "permutation_test",
    "plot",
    "probe",
]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value: Any = version("cka-probe")
        except PackageNotFoundError:  # run from a folder that was never installed
            value = "unknown"
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    elif name in _MODULES:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, and no module that happens to be loaded."""
    return sorted(__all__)
