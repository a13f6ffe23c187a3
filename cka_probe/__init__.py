"""Layer by layer, how far a representation moves when the input changes: CKA with error bars."""

from cka_probe.interrupts import told

with told():
    from cka_probe.features import DegenerateWarning, cka, cka_matrix, permutation_test
    from cka_probe.hsic import cka_loss
    from cka_probe.probe import probe
    from cka_probe.report import Report

__all__ = [
    "DegenerateWarning",
    "Report",
    "cka",
    "cka_loss",
    "cka_matrix",
    "permutation_test",
    "probe",
]
