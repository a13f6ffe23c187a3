"""Find the valid cuts of a network, and cut it into two halves."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from cka_probe.activations.layers import module_paths, unwrap
from msun.cutting.dataflow import Flow
from msun.cutting.halves import Part, share, split_graph
from msun.cutting.trace import trace_graph
from msun.cutting.verify import has_inplace_dropout, last_inside, overwrites, run_example

__all__ = ["Cut", "cut", "cut_points", "example_images", "find_cuts", "heads"]


class Cut(NamedTuple):
    """A valid cut.

    Attributes:
        name: path of the module after which the cut lies, the outermost that ends there.
        names: paths of all modules that end there.
        shape: shape of the map that crosses the cut, (n, c, h, w), or (n, h, w, c) in
            channels-last networks.
        parameters: number of parameters before the cut.
    """

    name: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    parameters: int


def cut_points(model: nn.Module, example: Tensor | None = None) -> list[str]:
    """The modules after which a network can be cut, in order of execution.

    A cut is valid if, in training mode and in eval mode, later steps need only one 4-D tensor whose
    first axis is the batch axis, and no parameter is used on both sides. Sizes that later steps
    read from earlier tensors do not count. A container and its last child are the same cut, listed
    once under the outermost name. So are an identity or a dropout and the module before it.

    The network runs twice on the example, in eval mode, so hooks on its modules fire. It is left
    unchanged.

    Args:
        model: a network that takes one image tensor.
        example: images (n, c, h, w); None for noise with the channels of the first convolution, at
            the input size in the configuration of a timm network, else 224 px.

    Returns:
        Module paths, at least one.

    Raises:
        TypeError: not a network, or a scripted one.
        ValueError: no valid cut, with the reason; a network that fx cannot trace, that cannot take
            the example, or that has hooks on a container.

    >>> from torchvision.models import resnet18
    >>> cut_points(resnet18())[:4]
    ['conv1', 'bn1', 'relu', 'maxpool']
    """
    return [found.name for found in find_cuts(model, example)]


@torch.inference_mode(False)  # inference tensors lack the version counter that shows writes
def find_cuts(model: nn.Module, example: Tensor | None = None) -> list[Cut]:
    """The valid cuts of a network, with all names, the shape of the map and the parameters.

    Args:
        model: a network that takes one image tensor.
        example: as for `cut_points`.

    Returns:
        The cuts in order of execution, at least one.

    Raises:
        TypeError: as for `cut_points`.
        ValueError: as for `cut_points`.
    """
    return _Survey(model, example).cuts()


@torch.inference_mode(False)
def cut(model: nn.Module, at: str, example: Tensor | None = None) -> tuple[nn.Module, nn.Module]:
    """Cut a network in two after a module: `tail(head(x))` is `model(x)`, to the bit in eval mode.

    Head and tail share the leaf modules and parameters of the network; nothing is copied. The
    network still works, and a change of a parameter, buffer or training flag shows in both. So move
    or convert the network before cutting it, or cut `copy.deepcopy(model)`. Each parameter is in
    one of the halves, under its own path; unused parameters are in the tail.

    The halves have no containers. Their forwards are recorded, one for training mode and one for
    eval mode, and `train()` and `eval()` switch between them. A `train` method that a container
    overrides, for example to keep a norm frozen, is lost. The tail never overwrites its input.

    A tail may need sizes besides the map (DeepLab resizes its output to the size of the input).
    Then `tail.needs_sizes` is true, and the head stores them as `z.cut_sizes`. Operations on z drop
    them: then call `tail(z, sizes)`.

    Args:
        model: a network that takes one image tensor.
        at: path of the module to cut after, such as "layer2" or "features.23"; after its last run
            if it runs several times.
        example: as for `cut_points`.

    Returns:
        (head, tail), in the mode of the network.

    Raises:
        TypeError: as for `cut_points`.
        ValueError: an unknown module, with similar names; a module without a valid cut after it,
            with the reason; and as for `cut_points`.

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
    """The heads of several cuts of one network, which is traced once.

    Args:
        model: the network.
        names: names of valid cuts, as from `cut_points`.
        example: as for `cut_points`.

    Yields:
        (name, head), with the head that `cut` returns.
    """
    survey = _Survey(model, example)
    for name in names:
        yield name, survey.halves(name)[0]


class _Survey:
    """The traces of a network in both modes, and their run on an example."""

    def __init__(self, model: nn.Module, example: Tensor | None, at: str | None = None) -> None:
        self.model = unwrap(model)
        self.names = module_paths(self.model)[1]
        self._check(at)
        self.traces = trace_graph(self.model)
        self.flows = {mode: Flow(self.model, traced) for mode, traced in self.traces.items()}
        self.outputs = self.traces[False].outputs
        self.sizes = {path: p.numel() for path, p in self.model.named_parameters()}
        x = example_images(self.model) if example is None else example
        x = x.clone() if x.is_inference() else x  # created by the caller in inference mode
        if x.ndim != 4:
            raise ValueError(
                f"the example is no batch of images: {tuple(x.shape)}: give a tensor (n, c, h, w)"
            )
        x = torch.cat((x, x)) if len(x) == 1 else x  # the batch axis must differ from axes of 1
        self.n = len(x)
        self.at = self._resolve(at, x) if at is not None else ""
        self.run = run_example(self.model, self.traces[False], x, self.outputs.get(self.at))
        self.overwritten = {False: self.run.overwritten, True: self.run.overwritten}
        traced = self.traces[True]
        if self.at in traced.outputs and has_inplace_dropout(self.model, traced):
            self.overwritten[True] |= overwrites(self.model, traced, x, self.value(self.at, True))

    def _check(self, at: str | None) -> None:
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        ready = ((name, x) for name, x in tensors if not is_lazy(x))  # lazy ones are refused later
        if made := next((name for name, x in ready if x.is_inference()), None):
            raise ValueError(
                f"a network created in inference mode: {made!r}: create or load it outside of "
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

    def _resolve(self, at: str, x: Tensor) -> str:
        """The path of a module in the graph."""
        at = self.names[at]
        if at not in self.outputs:
            parts = at.split(".")
            parents = (".".join(parts[:k]) for k in range(len(parts) - 1, 0, -1))
            whole = next((p for p in parents if p in self.outputs), None)
            if whole is not None and at in last_inside(self.model, whole, x):
                return whole
        return at

    def value(self, name: str, mode: bool) -> fx.Node:
        """The output of a module; for an identity, its input."""
        node = self.traces[mode].outputs[name]
        if not mode:
            return self.run.same.get(node, node)
        while node.op == "call_module":
            if not isinstance(self.model.get_submodule(str(node.target)), nn.Identity):
                break
            node = node.all_input_nodes[0]
        return node

    def obstacle(self, name: str) -> str:
        """The reason why there is no cut after a module; "" if there is one."""
        if name not in self.outputs:
            return "it does not run in eval mode, or returns no tensor"
        value = self.value(name, False)
        shape = self.run.shapes.get(value)
        if shape is None:
            return "its output is not a tensor"
        if len(shape) != 4 or shape[0] != self.n:
            return f"its output for {self.n} images has the shape {shape}, not (n, c, h, w)"
        if value.op == "placeholder":
            return "it returns the input unchanged"
        for mode, when in ((False, ""), (True, "in training mode ")):
            if name not in self.traces[mode].outputs:
                return f"{when}it does not run"
            flow, value = self.flows[mode], self.value(name, mode)
            if flow.can_cut(value):
                continue
            if not flow.content[value]:
                return f"{when}its output does not depend on the image"
            if not flow.is_used(value):
                return f"{when}nothing is computed from it"
            if others := flow.also_needed(value):
                return f"{when}later steps also need {self._describe(others[-1], mode)}"
            return f"{when}{flow.on_both_sides(value)[0]!r} is used before and after it"
        return ""

    def halves(self, at: str) -> tuple[nn.Module, nn.Module]:
        """Head and tail; raises ValueError if there is no valid cut after that module."""
        model = self.model
        if reason := self.obstacle(at):
            near = " or ".join(map(repr, self.near(at)))
            hint = f"cut after {near}" if near else "this network has no valid cut, use another"
            raise ValueError(f"no valid cut after this module: {at!r}, {reason}: {hint}")
        heads: dict[bool, fx.Graph] = {}
        tails: dict[bool, fx.Graph] = {}
        for mode, flow in self.flows.items():
            heads[mode], tails[mode] = split_graph(
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
                side = owner.get(id(tensor), tail)  # unused tensors belong to the tail
                if name not in names[side]:
                    share(side, model, name)
        return head, tail

    def _describe(self, node: fx.Node, mode: bool) -> str:
        """A value in words."""
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
                found.append(Cut(names[0], tuple(names), self.run.shapes[value], before))
        if not found:
            raise ValueError(f"no valid cut: {type(self.model).__name__}, {self._why_none()}")
        return found

    def _why_none(self) -> str:
        maps = [n for n in self.outputs if len(self.run.shapes.get(self.value(n, False), ())) == 4]
        if not maps:
            return "no module returns a 4-D map: use a network with 2-D feature maps"
        reason = (
            f"after {maps[0]!r}, the first of {len(maps)} 4-D outputs, {self.obstacle(maps[0])}"
        )
        return f"{reason}: use a network in which the later layers need only one map"

    def _parameters_before(self, name: str) -> int:
        before = set()
        for mode, flow in self.flows.items():
            k = flow.place[self.value(name, mode)]
            before |= {state for state, (start, _) in flow.states.items() if start <= k}
        return sum(self.sizes.get(state, 0) for state in before)

    def near(self, name: str) -> list[str]:
        """The last valid cut inside a module, else the nearest ones before and after it."""
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
        """Whether the first axis of each value whose size the tail reads is the batch axis."""
        read = self.flows[False].reads(self.value(at, False))
        shapes = [self.run.shapes.get(n.all_input_nodes[0], ()) for n in read]
        return all(shape[:1] == (self.n,) for shape in shapes)


def example_images(model: nn.Module, side_px: int | None = None) -> Tensor:
    """Noise images (2, c, side, side), on the device and in the dtype of the network.

    The number of channels is that of the first convolution, else that in the configuration of a
    timm network, else 3.

    Args:
        model: the network.
        side_px: side in pixels; None for the input size in the configuration, else 224.
    """
    cfg: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    size = tuple((cfg.get("input_size") if isinstance(cfg, Mapping) else None) or (3, 224, 224))
    size = (_channels(model) or size[0], *(size[1:] if side_px is None else (side_px, side_px)))
    noise = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    floats = (p for p in model.parameters() if p.is_floating_point())
    return noise if (like := next(floats, None)) is None else noise.to(like.device, like.dtype)


def _channels(model: nn.Module) -> int | None:
    """Input channels of the convolution that is registered first; None without convolutions."""
    return next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), None)
