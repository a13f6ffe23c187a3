"""Build a multi-scale network from a backbone, a cut and the scales."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cka_probe.activations.layers import unwrap
from cka_probe.activations.meta import detached_copy
from cka_probe.io import plain
from cka_probe.models.load import LoadedModel
from cka_probe.models.preprocessing import stated_constants
from msun.cutting.cuts import cut, example_images, find_cuts
from msun.cutting.halves import Part
from msun.network.functional_layers import with_functional_modules
from msun.network.kernel_resize import STARTS, resample_first
from msun.network.model import MSUN, Origin
from msun.network.norms import install
from msun.network.paper import PaperDesign, paper_design, paper_subnet
from msun.network.policy import RAW_TAU, Policy, merge_grid, policy_of, sorted_scales
from msun.network.shape_probe import ShapeProbe
from msun.network.stride_removal import remove_strides

__all__ = ["build", "fingerprint", "map_axes", "small_subnets"]


@torch.inference_mode(False)  # parameters copied in inference mode could not be trained
def build(
    backbone: nn.Module | LoadedModel,
    at: str,
    scales: Sequence[int],
    *,
    preset: str = "lean",
    subnets: str | None = None,
    merge: str | None = None,
    norm: str | None = None,
    inputs: str | None = None,
    start: str = "copied",
    policy: Policy | None = None,
    spec: Mapping[str, Any] | None = None,
) -> MSUN:
    """Build a multi-scale network from a copy of a backbone.

    Before training, the network equals the backbone to the bit at the largest scale. The subnets of
    smaller scales are copies of the head with some strides removed, so that the map of a small
    image keeps a larger grid (`msun.network.stride_removal`). The preset "paper" uses the paper's
    hand-made subnets where backbone, cut and scales are those of the paper; `origin` says which
    kind was built.

    Args:
        backbone: a network from one image tensor to logits (n, classes); left unchanged.
        at: path of the last module of the head, one of `msun.cut_points(backbone)`.
        scales: sides in pixels; the largest is the reference.
        preset: name of a policy: "lean" or "paper", or a registered one.
        subnets: weights of the subnets, "own" or "shared"; None for the policy's choice.
        merge: grid of the trunk, "full", "follow" or "native"; None for the policy's choice.
        norm: batch norms, "shared" or "private"; None for the policy's choice.
        inputs: input sizes, "native", "small" or "scale" (see `Policy`); None for the policy's
            choice.
        start: initial weights of the small subnets: "copied"; "resampled", with the first kernel
            resampled to their pixel scale; or "dilated", with layers dilated after a removed
            stride, so that the pixels of the old grid keep their values (this removes the last
            strides first, whatever the policy).
        policy: a policy, instead of a preset.
        spec: plain values that describe how to rebuild the backbone; a `LoadedModel` has its own.

    Returns:
        The network, in the mode of the backbone.

    Raises:
        TypeError: no network, no policy, or scales that are not whole numbers.
        ValueError: an unknown choice, an invalid cut, a scale that the head cannot take, or a
            backbone without logits.

    >>> import torch
    >>> from torchvision.models import resnet18
    >>> net = build(resnet18(num_classes=10), "layer1", [32, 64, 128]).eval()
    >>> images = [torch.zeros(3, 40, 32), torch.zeros(3, 128, 128)]
    >>> net(images).shape, [round(net.macs(side) / 1e6) for side in net.scales]
    (torch.Size([2, 10]), [148, 148, 592])
    """
    if not isinstance(policy, Policy | None):
        raise TypeError(f"not a policy: {policy!r}: give a Policy, or a preset by its name")
    policy = (policy or policy_of(preset)).but(
        subnets=subnets, merge=merge, norm=norm, inputs=inputs
    )  # fmt: skip
    sides = sorted_scales(scales)
    known = _spec(backbone, spec)
    model = unwrap(backbone.model if isinstance(backbone, LoadedModel) else backbone)
    if start not in STARTS:
        raise ValueError(f"unknown start: {start!r}: choose {', '.join(map(repr, STARTS))}")
    if policy.subnets == "shared" and start == "resampled":
        raise ValueError(
            "shared subnets cannot start resampled: 'resampled': their one kernel serves all "
            "scales, choose 'copied' or subnets='own'"
        )
    example = example_images(model, sides[-1])
    head, tail = _parts(model, at, example)
    axes = map_axes(head, example)
    private = sides if policy.norm == "private" and len(sides) > 1 else None
    if policy.subnets == "shared":
        install(head, private)
    design, why = None, ""
    if preset == "paper":
        design, why = _paper_design(model, at, example, sides, policy, start)
    made, changes = small_subnets(head, sides, policy, design, start, example, axes)
    for own in made.values() if policy.subnets == "own" else ():
        install(own)
    install(tail, private)
    source = f"hand-made as in the paper: {design.name}" if design else "strides taken out"
    if design is not None and design.tau != RAW_TAU:
        known["tau"] = design.tau
    net = MSUN(
        made,
        tail,
        at=at,
        preset=preset,
        policy=policy,
        spec=known,
        origin=Origin(
            type(model).__name__,
            fingerprint(model),
            f"{source} ({why})" if why else source,
            start,
            changes,
        ),
        channels=int(example.shape[1]),
        axes=axes,
    )
    _check_logits(net)
    return net


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the structure of a network, not of its weights.

    It covers the class of the network, the names and shapes of parameters and buffers, and the
    class and settings of each module without children. The code of forwards is not covered.

    Args:
        model: the network.

    Returns:
        The hash in hexadecimal.
    """
    state = model.state_dict(keep_vars=True)
    lines = [f"{key} {tuple(x.shape)}" for key, x in sorted(state.items()) if isinstance(x, Tensor)]
    for path, module in model.named_modules():
        if not module._modules:
            values = [f"{x}={getattr(module, x)}" for x in _SETTINGS if hasattr(module, x)]
            lines.append(" ".join((path, type(module).__name__, *values)))
    return hashlib.sha256("\n".join([type(model).__name__, *lines]).encode()).hexdigest()


# Settings of convolutions, poolings and norms that change the output. Their order is part of the
# fingerprint, which checkpoints hold.
_SETTINGS = (
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "ceil_mode",
    "eps",
    "output_size",
)


def _spec(backbone: nn.Module | LoadedModel, spec: Mapping[str, Any] | None) -> dict[str, Any]:
    """How to rebuild the backbone, in plain values."""
    known: dict[str, Any] = {}
    if isinstance(backbone, LoadedModel):
        known = {"name": backbone.name, "model_args": {}}
        known |= {"mean": backbone.mean, "std": backbone.std, "weights": backbone.weights}
        # the key in checkpoints of format 1 for the number of classes
        known |= {} if backbone.classes is None else {"new_head": backbone.classes}
    elif not isinstance(backbone, nn.Module):
        raise TypeError(f"no network: {type(backbone).__name__}: give an nn.Module")
    else:
        known = dict(stated_constants(unwrap(backbone)))
    made: dict[str, Any] = plain({**known, **(spec or {})}, "spec")
    return made


def _parts(model: nn.Module, at: str, example: Tensor) -> tuple[Part, Part]:
    """Head and tail of a copy of the backbone."""
    head, tail = cut(detached_copy(model), at, example)
    assert isinstance(head, Part)
    assert isinstance(tail, Part)
    return with_functional_modules(head), tail


def map_axes(head: Part, example: Tensor) -> tuple[int, int]:
    """The axes of rows and columns in the map: the two axes that change with the size of the image.

    Args:
        head: the head of the backbone.
        example: images that it takes, (n, c, h, w).

    Returns:
        (2, 3), or (1, 2) for channels last.
    """
    shape = (1, *example.shape[1:])
    probe = ShapeProbe(head, shape)
    here, side = probe.run(shape).shape, shape[-1]
    # some networks refuse a size, so several are tried; 32 px is the usual total stride
    for other in (2 * side, side + 32, side + 64, side // 2):
        result = probe.run((*shape[:2], other, other))
        if result.fault or len(result.shape) != 4:
            continue
        moved = [axis for axis in (1, 2, 3) if result.shape[axis] != here[axis]]
        if moved in ([1, 2], [2, 3]):
            return moved[0], moved[1]
    return (1, 2) if here[1] == here[2] != here[3] else (2, 3)


def _paper_design(
    model: nn.Module,
    at: str,
    example: Tensor,
    sides: tuple[int, ...],
    policy: Policy,
    start: str,
) -> tuple[PaperDesign | None, str]:
    """The paper's hand-made subnets and "", or None and the reason why there are none."""
    if policy.subnets == "shared" or start == "dilated":
        return None, "the paper's subnets have weights of their own and are not dilated"
    design, why = paper_design(model, (at,), sides)
    if design is None and "cuts" in why:  # the same cut may have other names
        names = next((c.names for c in find_cuts(model, example) if at in c.names), (at,))
        design, why = paper_design(model, names, sides)
    return design, why


def small_subnets(
    head: Part,
    sides: tuple[int, ...],
    policy: Policy,
    design: PaperDesign | None,
    start: str,
    example: Tensor,
    axes: tuple[int, int],
) -> tuple[dict[int, Part], dict[int, str]]:
    """The subnet of each scale, and a text of its changes.

    Args:
        head: the head of the backbone, which is the subnet of the reference.
        sides: scales in pixels, ascending; the last is the reference.
        policy: the policy of the network.
        design: the paper's hand-made subnets; None to remove strides.
        start: initial weights of the small subnets, as in `build`.
        example: images at the reference scale, (n, c, h, w).
        axes: axes of rows and columns in the map.

    Returns:
        ({scale: subnet}, {scale: changes from the head as text, "" for none}).

    Raises:
        ValueError: a scale that the head cannot take.
    """
    reference = sides[-1]
    known = (1, *example.shape[1:])
    probe = ShapeProbe(head, known)

    def grid(side: int) -> tuple[int, int]:
        result = probe.run((1, known[1], side, side))
        if result.fault:  # too small for the head with all strides: in proportion to the reference
            full = grid(reference)
            return max(1, full[0] * side // reference), max(1, full[1] * side // reference)
        return result.shape[axes[0]], result.shape[axes[1]]

    made, changes = {reference: head}, {reference: ""}
    for side in sides[:-1]:
        own = detached_copy(head) if policy.subnets == "own" else head
        if design is not None:
            made[side] = paper_subnet(design, own, side, resample=start == "resampled")
            changes[side] = design.describe(side)
            continue
        wanted = merge_grid(
            policy,
            side,
            side,
            scale=side,
            reference=reference,
            full=grid(reference),
            native=lambda side=side: grid(side),  # type: ignore[misc]
        )
        taken = remove_strides(
            own,
            side,
            wanted,
            known=known,
            axes=axes,
            dilated=start == "dilated",
            first=policy.strides == "first" and start != "dilated",
        )
        if start == "resampled":
            resample_first(taken.head, side / reference)
        made[side] = taken.head
        changes[side] = ", ".join(f"{p} stride {a} -> {b}" for p, (a, b) in taken.changes.items())
    return made, changes


def _check_logits(net: MSUN) -> None:
    """Raise where a scale cannot be run, or the output is not logits (n, classes)."""
    for side in net.scales:
        net.plan(side, scale=side)
    shape = net.output_shape
    if len(shape) != 2:
        raise ValueError(
            f"the backbone gives no logits (n, classes): {shape} for one image: build around a "
            "classifier"
        )
