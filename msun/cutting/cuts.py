"""Where a network can be cut in two, and the two halves."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from cka_probe.activations.layers import module_paths, unwrap
from msun.cutting.dataflow import Flow, Part, hold, part
from msun.cutting.trace import trace
from msun.cutting.verify import drops_in_place, last_inside, observe, overwrites

__all__ = ["Cut", "cut", "cut_points", "example_images", "find_cuts", "heads"]


class Cut(NamedTuple):
    """A place to cut.

    Attributes:
        name: the module after which it lies, the outermost of those that end there.
        names: all of those.
        shape: the map that crosses, (n, c, h, w), or (n, h, w, c) in channels-last networks.
        parameters: how many lie before it.
    """

    name: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    parameters: int


def cut_points(model: nn.Module, example: Tensor | None = None) -> list[str]:
    """The modules after which a network can be cut, in order of execution.

    A cut is valid where, in training and in eval mode, one 4-D tensor whose first axis is that of
    the images carries all that later steps need, and no parameter is used on both sides. Sizes
    read from earlier tensors do not count. Container and last child are one cut, listed once under
    the outermost name, and so are an identity, or a dropout, and what it passes on.

    The network runs twice on the example, in eval mode, so that hooks on its modules fire; it is
    left as it was.

    Args:
        model: a network that takes one image tensor.
        example: images (n, c, h, w); None for noise of the side that a timm network states, else
            of 224 px, with the channels of the first convolution.

    Returns:
        Module paths, never empty.

    Raises:
        TypeError: not a network, or a scripted one.
        ValueError: no valid cut, with the reason; a network that cannot be followed, that cannot
            take the example, or that has hooks on a container.

    >>> from torchvision.models import resnet18
    >>> cut_points(resnet18())[:4]
    ['conv1', 'bn1', 'relu', 'maxpool']
    """
    return [found.name for found in find_cuts(model, example)]


@torch.inference_mode(False)  # writes are counted, and inference tensors have no counter
def find_cuts(model: nn.Module, example: Tensor | None = None) -> list[Cut]:
    """As `cut_points`, with all names, the map and the parameters of each.

    Args:
        model: a network that takes one image tensor.
        example: as for `cut_points`.

    Returns:
        Never empty.

    Raises:
        TypeError: as for `cut_points`.
        ValueError: as for `cut_points`.
    """
    return _Survey(model, example).cuts()


@torch.inference_mode(False)
def cut(model: nn.Module, at: str, example: Tensor | None = None) -> tuple[nn.Module, nn.Module]:
    """Cut a network in two after a module: `tail(head(x))` is `model(x)`, to the bit in eval mode.

    Head and tail are new modules around the network's own leaf modules and parameters: nothing is
    copied, the network goes on working, and what is done to a parameter, a training flag or a
    buffer of a leaf shows on both. So move or convert the network before it is cut, or cut
    `copy.deepcopy(model)`. Each parameter is in one of the two, under its own path; those that no
    forward uses are in the tail. Containers are gone: what their forwards do is part of the two
    recorded ones, for training and for eval mode, between which `train()` and `eval()` switch; a
    `train` that a container overrides, to keep a norm frozen, is lost.
    The tail never writes into the map that it is given.

    Where the tail wants to know more sizes than the map tells (DeepLab resizes its output to the
    input's size), `tail.needs_sizes` is true and the head hangs them on the map as
    `z.cut_sizes`. They are lost when the map is changed: then call `tail(z, sizes)`.

    Args:
        model: a network that takes one image tensor.
        at: a module path, such as "layer2" or "features.23"; the cut lies after it, after its last
            run if it runs several times.
        example: as for `cut_points`.

    Returns:
        (head, tail), in the mode that the network is in.

    Raises:
        TypeError: as for `cut_points`.
        ValueError: an unknown module (the message has near names), one after which no cut is
            valid, with the reason; and as for `cut_points`.

    >>> from torchvision.models import resnet18
    >>> model, x = resnet18().eval(), torch.zeros(1, 3, 64, 64)
    >>> head, tail = cut(model, "layer2")
    >>> head(x).shape, torch.equal(tail(head(x)), model(x))
    (torch.Size([1, 128, 8, 8]), True)
    """
    survey = _Survey(model, example, at)
    return survey.halves(survey.at)


def heads(
    model: nn.Module, names: Iterable[str], example: Tensor | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """The heads of several cuts of one network, which is recorded once.

    Args:
        model: the network.
        names: of valid cuts, as `cut_points` gives them.
        example: as for `cut_points`.

    Yields:
        (name, head), as `cut` would give it.
    """
    survey = _Survey(model, example)
    for name in names:
        yield name, survey.halves(name)[0]


class _Survey:
    """A network, recorded in both modes and seen at work on an example."""

    def __init__(self, model: nn.Module, example: Tensor | None, at: str | None = None) -> None:
        self.model = unwrap(model)
        self.names = module_paths(self.model)[1]
        self._check(at)
        self.traces = trace(self.model)
        self.flows = {mode: Flow(self.model, traced) for mode, traced in self.traces.items()}
        self.outputs = self.traces[False].outputs
        self.sizes = {path: p.numel() for path, p in self.model.named_parameters()}
        x = example_images(self.model) if example is None else example
        x = x.clone() if x.is_inference() else x  # made by a caller in inference mode
        if x.ndim != 4:
            raise ValueError(
                f"the example is no batch of images: {tuple(x.shape)}: give (n, c, h, w)"
            )
        x = torch.cat((x, x)) if len(x) == 1 else x  # two images tell their axis
        self.n = len(x)
        self.at = self._resolved(at, x) if at is not None else ""
        self.seen = observe(self.model, self.traces[False], x, self.outputs.get(self.at))
        self.overwritten = {False: self.seen.overwritten, True: self.seen.overwritten}
        if self.at in self.traces[True].outputs and drops_in_place(self.model, self.traces[True]):
            value = self.value(self.at, True)
            self.overwritten[True] |= overwrites(self.model, self.traces[True], x, value)

    def _check(self, at: str | None) -> None:
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        # parameters of lazy modules have no such property yet; tracing names them later
        real = ((name, x) for name, x in tensors if not nn.parameter.is_lazy(x))
        if made := next((name for name, tensor in real if tensor.is_inference()), None):
            raise ValueError(
                f"a network made in inference mode: {made!r}: make or load it outside of "
                "torch.inference_mode()"
            )
        if not isinstance(at, str | None):
            raise TypeError(f"no module path: {type(at).__name__}: give a name such as 'layer2'")
        if at is not None and at not in self.names:
            close = difflib.get_close_matches(at, self.names, n=4, cutoff=0.5)
            known = close or [name for name in self.names if name and "." not in name][:8]
            hint = "did you mean" if close else "the network has"
            text = ", ".join(map(repr, known)) + ("?" if close else "")
            raise ValueError(f"unknown module: {at!r}: {hint} {text}")

    def _resolved(self, at: str, x: Tensor) -> str:
        """The path under which the graph knows a module."""
        at = self.names[at]
        if at not in self.outputs:
            parts = at.split(".")
            parents = (".".join(parts[:k]) for k in range(len(parts) - 1, 0, -1))
            whole = next((p for p in parents if p in self.outputs), None)
            if whole is not None and at in last_inside(self.model, whole, x):
                return whole
        return at

    def value(self, name: str, mode: bool) -> fx.Node:
        """What the module puts out; what an identity puts out is what it takes in."""
        node = self.traces[mode].outputs[name]
        if not mode:
            return self.seen.same.get(node, node)
        while node.op == "call_module":
            if not isinstance(self.model.get_submodule(str(node.target)), nn.Identity):
                break
            node = node.all_input_nodes[0]
        return node

    def obstacle(self, name: str) -> str:
        """Why there is no cut after a module; "" where there is one."""
        if name not in self.outputs:
            return "it is not run in eval mode, or puts out no tensor"
        value = self.value(name, False)
        shape = self.seen.shapes.get(value)
        if shape is None:
            return "its output is no tensor"
        if len(shape) != 4 or shape[0] != self.n:
            return f"its output for {self.n} images has the shape {shape}, not (n, c, h, w)"
        if value.op == "placeholder":
            return "it hands on the input as it is"
        for mode, when in ((False, ""), (True, "in training mode ")):
            if name not in self.traces[mode].outputs:
                return f"{when}it is not run"
            flow, value = self.flows[mode], self.value(name, mode)
            if flow.can_cut(value):
                continue
            if not flow.content[value]:
                return f"{when}its output does not depend on the image"
            if not flow.follows(value):
                return f"{when}nothing is computed from it"
            if others := flow.also_needed(value):
                return f"{when}later steps also need {self._described(others[-1], mode)}"
            return f"{when}{flow.on_both_sides(value)[0]!r} is used before and after it"
        return ""

    def halves(self, at: str) -> tuple[nn.Module, nn.Module]:
        """Head and tail; ValueError where there is no cut after that module."""
        model = self.model
        if reason := self.obstacle(at):
            near = " or ".join(map(repr, self.near(at)))
            way_out = f"cut after {near}" if near else "this network has no valid cut anywhere"
            raise ValueError(f"no valid cut after this module: {at!r}, {reason}: {way_out}")
        heads: dict[bool, fx.Graph] = {}
        tails: dict[bool, fx.Graph] = {}
        for mode, flow in self.flows.items():
            heads[mode], tails[mode] = part(
                flow,
                self.value(at, mode),
                batch_first=self.batch_first(at),
                copies=self.overwritten[mode],
            )
        constants = self.traces[True].constants | self.traces[False].constants
        head, tail = Part(model, heads, constants), Part(model, tails, constants)
        for kind in (nn.Module.named_parameters, nn.Module.named_buffers):
            names = {side: dict(kind(side, remove_duplicate=False)) for side in (head, tail)}
            owner = {id(tensor): side for side in (head, tail) for tensor in names[side].values()}
            for name, tensor in kind(model, remove_duplicate=False):
                side = owner.get(id(tensor), tail)  # the tail takes what no forward uses
                if name not in names[side]:
                    hold(side, model, name)
        return head, tail

    def _described(self, node: fx.Node, mode: bool) -> str:
        if node.op == "placeholder":
            return "the input"
        if node.op == "call_module":
            return f"the output of {str(node.target)!r}"
        return f"a value computed in {self.traces[mode].places[node] or '(model)'!r}"

    def cuts(self) -> list[Cut]:
        """All valid cuts, in order of execution."""
        groups: dict[fx.Node, list[str]] = {}
        for name in self.outputs:
            groups.setdefault(self.value(name, False), []).append(name)
        found = []
        for value in sorted(groups, key=self.flows[False].place.__getitem__):
            names = [name for name in groups[value] if not self.obstacle(name)]
            names.sort(key=lambda name: name.count("."))
            if names:
                before = self._parameters_before(names[0])
                found.append(Cut(names[0], tuple(names), self.seen.shapes[value], before))
        if not found:
            raise ValueError(f"no valid cut: {type(self.model).__name__}, {self._why_none()}")
        return found

    def _why_none(self) -> str:
        maps = [n for n in self.outputs if len(self.seen.shapes.get(self.value(n, False), ())) == 4]
        if not maps:
            return "no module puts out a 4-D map: take a network that keeps one"
        reason = (
            f"after {maps[0]!r}, the first of {len(maps)} 4-D outputs, {self.obstacle(maps[0])}"
        )
        return f"{reason}: take a network in which one map carries all that follows"

    def _parameters_before(self, name: str) -> int:
        before = set()
        for mode, flow in self.flows.items():
            k = flow.place[self.value(name, mode)]
            before |= {state for state, (start, _) in flow.states.items() if start <= k}
        return sum(self.sizes.get(state, 0) for state in before)

    def near(self, name: str) -> list[str]:
        """The valid cuts inside a module, the last one; else those around it."""
        try:
            cuts = [found.name for found in self.cuts()]
        except ValueError:
            return []
        if inside := [found for found in cuts if found.startswith(f"{name}.")]:
            return inside[-1:]
        if name not in self.outputs:
            return difflib.get_close_matches(name, cuts, n=2, cutoff=0) or cuts[-1:]
        place = self.flows[False].place
        places = {found: place[self.value(found, False)] for found in cuts}
        here = place[self.value(name, False)]
        before = [found for found in cuts if places[found] < here][-1:]
        return before + [found for found in cuts if places[found] > here][:1]

    def batch_first(self, at: str) -> bool:
        """Whether the values whose sizes the tail reads have the images' axis first."""
        read = self.flows[False].reads(self.value(at, False))
        shapes = [self.seen.shapes.get(n.all_input_nodes[0], ()) for n in read]
        return all(shape[:1] == (self.n,) for shape in shapes)


def example_images(model: nn.Module, side_px: int | None = None) -> Tensor:
    """Noise for two images, (2, c, side, side), on the network's device and of its type.

    Channels are those that its first convolution takes, else what a timm network states, else 3.

    Args:
        model: the network.
        side_px: None for the network's own input size, else 224.
    """
    cfg: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    size = tuple((cfg.get("input_size") if isinstance(cfg, Mapping) else None) or (3, 224, 224))
    size = (_channels(model) or size[0], *(size[1:] if side_px is None else (side_px, side_px)))
    noise = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    floats = (p for p in model.parameters() if p.is_floating_point())
    return noise if (like := next(floats, None)) is None else noise.to(like.device, like.dtype)


def _channels(model: nn.Module) -> int | None:
    """What the first convolution takes in, as they are registered; None where there is none."""
    return next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), None)
