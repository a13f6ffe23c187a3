"""The metadata of a report: the fingerprint that a resumed run must match, and the estimator's."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from cka_probe.activations.layers import unwrap
from cka_probe.engine.estimator import Result
from cka_probe.engine.kernels import KERNELS, get_kernel
from cka_probe.engine.projection import BLOCKS
from cka_probe.inputs.source import Files, Source
from cka_probe.inputs.views import Transform
from cka_probe.probing.choose import AUTO, Choice
from cka_probe.probing.fingerprint import described
from cka_probe.probing.options import ProbeOptions
from cka_probe.provenance import model_sha256

__all__ = ["estimator_meta", "repeated_options", "run_fingerprint"]

# Entries of the fingerprint that stand at the top level of the meta as well: readers of reports
# written before the fingerprint existed expect them there.
_REPEATED = ("reference", "kernel", "bandwidth", "reduce", "resize", "estimator", "batch_size",
             "seed", "antialias")  # fmt: skip


def run_fingerprint(
    options: ProbeOptions,
    models: Mapping[str, nn.Module],
    transforms: Mapping[str, Transform],
    reference: str,
    source: Source,
    choice: Choice,
) -> dict[str, Any]:
    """All that could change a number of the report, as JSON: names, values and SHA-256 sums.

    Args:
        options: the user's options.
        models: view -> network. A wrapper (DataParallel, torch.compile) changes no number and is
            taken off, so that a run can be resumed with and without it.
        transforms: view -> input transform.
        reference: the name of the reference view.
        source: the images.
        choice: the estimator and its size.
    """
    shas = {id(model): model_sha256(unwrap(model)) for model in models.values()}
    return {
        "views": {
            name: {"model": shas[id(model)], "transform": described(transforms[name])}
            for name, model in models.items()
        },
        "reference": reference,
        "images": _images_meta(source),
        "n_images": len(source),
        "layers": described(options.layers),
        "resize": options.resize,
        "antialias": options.antialias,
        "kernel": _kernel_name(options.kernel),
        "bandwidth": 1.0 if options.bandwidth is None else options.bandwidth,
        "reduce": described(options.reduce),
        **({} if options.layout is None else {"layout": options.layout}),
        "estimator": choice.estimator,
        **({"sketch_size": choice.size} if choice.estimator == "sketch" else {}),
        "batch_size": options.batch_size,
        "seed": options.seed,
        "amp": bool(options.amp),
        "skip_bad": bool(options.skip_bad),
    }


def repeated_options(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of the fingerprint that the meta repeats at its top level."""
    return {name: fingerprint[name] for name in _REPEATED}


def estimator_meta(options: ProbeOptions, choice: Choice, result: Result) -> dict[str, Any]:
    """Why "auto" chose its estimator; the size of a sketch and its own standard error per cell."""
    meta: dict[str, Any] = {}
    if options.estimator == AUTO:
        meta["estimator_why"] = choice.why
    if result.sketch_stderr is not None:
        # four digits: an error of an error needs no more, and the meta is JSON text
        rounded = [[float(f"{cell:.4g}") for cell in row] for row in result.sketch_stderr]
        meta["sketch"] = {"size": choice.size, "blocks": BLOCKS, "stderr": rounded}
    return meta


def _images_meta(source: Source) -> dict[str, Any]:
    """Name and SHA-256 of the images: of a folder's names and sizes, of other sources' content.

    A run that saves a report replaces it by one over the content of all files.
    """
    if isinstance(source, Files):
        return {"name": source.name, "sha256": source.listing(), "of": "names and sizes"}
    return {"name": source.name, "sha256": source.fingerprint()}


def _kernel_name(given: Any) -> str:
    """The name of a kernel of this package; a user's own is described as well."""
    if callable(given):
        return str(described(given))
    kernel = get_kernel(given)
    return (
        kernel.name
        if KERNELS.get(kernel.name) is kernel
        else f"{kernel.name} ({described(kernel.base)})"
    )
