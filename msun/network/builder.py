"""A backbone, a cut and the scales -> a multi-scale network."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cka_probe.activations.layers import unwrap
from cka_probe.io import plain
from cka_probe.models.load import LoadedModel
from cka_probe.models.preprocessing import stated_constants
from msun.cutting.cuts import cut, example_images, find_cuts
from msun.cutting.dataflow import Part
from msun.network.functional_layers import with_functional_modules
from msun.network.kernel_resize import STARTS, resample_first
from msun.network.model import MSUN, Origin
from msun.network.norms import install
from msun.network.paper import Recipe, paper_recipe, paper_subnet
from msun.network.policy import RAW_TAU, Policy, check_scales, merge_grid, policy_of
from msun.network.shape_probe import ShapeProbe
from msun.network.stride_removal import remove_strides

__all__ = ["build", "fingerprint", "map_axes", "small_subnets"]


@torch.inference_mode(False)  # else the copied parameters could not be trained
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
    """A multi-scale network around a backbone, which is copied and left as it is.

    At the largest scale it is the backbone, to the bit, until it is trained; with one scale it is
    nothing else. Smaller scales get the head with as many strides taken out as their grid needs
    (`msun.network.stride_removal`); the preset "paper" has the hand-made subnets for the
    paper's four backbones at its cuts and scales, and `origin` says which of the two it is.

    Args:
        backbone: a network that takes one image tensor and gives logits (n, classes).
        at: the module after which the shared trunk begins, one of `msun.cut_points(backbone)`.
        scales: sides in pixels; the largest is the reference, which the backbone must take.
        preset: "lean" or "paper", or one that was registered.
        subnets: "own" or "shared" weights, in place of the preset's.
        merge: "full", "follow" or "native", in place of the preset's.
        norm: "shared" or "private" batch norms, in place of the preset's.
        inputs: "native", "small" or "scale" (see `Policy`), in place of the preset's.
        start: of the small subnets: "copied"; "resampled", the first kernel to their pixel scale;
            "dilated" where a stride was taken out, so that the old grid's pixels keep their values
            (then the last strides go, whatever the policy says).
        policy: in place of the preset's.
        spec: plain values that say how to make the backbone again; a `LoadedModel` brings them.

    Returns:
        The network, in the mode that the backbone is in.

    Raises:
        TypeError: no network, no policy, or scales that are no whole numbers.
        ValueError: a bad choice, no valid cut there, a scale that the head cannot take, or no
            logits.

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
    sides = check_scales(scales)
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
    recipe, why = None, ""
    if preset == "paper":
        recipe, why = _recipe(model, at, example, sides, policy, start)
    made, changes = small_subnets(head, sides, policy, recipe, start, example, axes)
    for own in made.values() if policy.subnets == "own" else ():
        install(own)
    install(tail, private)
    source = f"hand-made as in the paper: {recipe.name}" if recipe else "strides taken out"
    if recipe is not None and recipe.tau != RAW_TAU:
        known["tau"] = recipe.tau
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
    """SHA-256 of a network's structure: its class, its parts and what they are set to.

    Names and shapes of parameters and buffers; of each module without children its class and what
    steers a convolution, a pooling or a norm. What a container's forward does is not in it.
    """
    state = model.state_dict(keep_vars=True)
    lines = [f"{key} {tuple(x.shape)}" for key, x in sorted(state.items()) if isinstance(x, Tensor)]
    for path, module in model.named_modules():
        if not module._modules:
            told = [f"{name}={getattr(module, name)}" for name in _TOLD if hasattr(module, name)]
            lines.append(" ".join((path, type(module).__name__, *told)))
    return hashlib.sha256("\n".join([type(model).__name__, *lines]).encode()).hexdigest()


_TOLD = (
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
    """How to make the backbone again, in plain values."""
    known: dict[str, Any] = {}
    if isinstance(backbone, LoadedModel):
        known = {"name": backbone.name, "model_args": {}}
        known |= {"mean": backbone.mean, "std": backbone.std, "weights": backbone.weights}
        known |= {} if backbone.classes is None else {"new_head": backbone.classes}
    elif not isinstance(backbone, nn.Module):
        raise TypeError(f"no network: {type(backbone).__name__}: give an nn.Module")
    else:
        known = dict(stated_constants(unwrap(backbone)))
    made: dict[str, Any] = plain({**known, **(spec or {})}, "spec")
    return made


def _parts(model: nn.Module, at: str, example: Tensor) -> tuple[Part, Part]:
    """Head and tail of a copy."""
    head, tail = cut(copy.deepcopy(model), at, example)
    assert isinstance(head, Part)
    assert isinstance(tail, Part)
    return with_functional_modules(head), tail


def map_axes(head: Part, example: Tensor) -> tuple[int, int]:
    """Where rows and columns stand in the map: the axes that follow the image's size.

    Args:
        head: of the backbone.
        example: images that it takes, (n, c, h, w).
    """
    shape = (1, *example.shape[1:])
    shadow = ShapeProbe(head, shape)
    here, side = shadow.see(shape).shape, shape[-1]
    for other in (2 * side, side + 32, side + 64, side // 2):
        seen = shadow.see((*shape[:2], other, other))
        if seen.fault or len(seen.shape) != 4:
            continue
        moved = [axis for axis in (1, 2, 3) if seen.shape[axis] != here[axis]]
        if moved in ([1, 2], [2, 3]):
            return moved[0], moved[1]
    return (1, 2) if here[1] == here[2] != here[3] else (2, 3)


def _recipe(
    model: nn.Module,
    at: str,
    example: Tensor,
    sides: tuple[int, ...],
    policy: Policy,
    start: str,
) -> tuple[Recipe | None, str]:
    """The paper's own subnets, where it has them."""
    if policy.subnets == "shared" or start == "dilated":
        return None, "the paper's subnets have weights of their own and are not dilated"
    recipe, why = paper_recipe(model, (at,), sides)
    if recipe is None and "cuts" in why:  # the same cut may have other names
        names = next((c.names for c in find_cuts(model, example) if at in c.names), (at,))
        recipe, why = paper_recipe(model, names, sides)
    return recipe, why


def small_subnets(
    head: Part,
    sides: tuple[int, ...],
    policy: Policy,
    recipe: Recipe | None,
    start: str,
    example: Tensor,
    axes: tuple[int, int],
) -> tuple[dict[int, Part], dict[int, str]]:
    """The subnet of each scale, and what differs from the backbone's head.

    Args:
        head: of the backbone; that of the reference, the last of `sides`.
        sides: of the scales in pixels, ascending.
        policy: the choices.
        recipe: the paper's own subnets; None to take strides out.
        start: what the small ones start from.
        example: images at the reference scale, (n, c, h, w).
        axes: where rows and columns stand in the map.

    Raises:
        ValueError: a scale that the head cannot take.
    """
    reference = sides[-1]
    known = (1, *example.shape[1:])
    shadow = ShapeProbe(head, known)

    def grid(side: int) -> tuple[int, int]:
        seen = shadow.see((1, known[1], side, side))
        if seen.fault:
            full = grid(reference)
            return max(1, full[0] * side // reference), max(1, full[1] * side // reference)
        return seen.shape[axes[0]], seen.shape[axes[1]]

    made, changes = {reference: head}, {reference: ""}
    for side in sides[:-1]:
        own = copy.deepcopy(head) if policy.subnets == "own" else head
        if recipe is not None:
            made[side] = paper_subnet(recipe, own, side, resample=start == "resampled")
            changes[side] = recipe.told(side)
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
    """Every scale is served, and logits come out."""
    for side in net.scales:
        net.plan(side, scale=side)
    shape = net.output_shape
    if len(shape) != 2:
        raise ValueError(
            f"the backbone gives no logits (n, classes): {shape} for one image: build around a "
            "classifier"
        )
