"""A network and both halves of a cut in a file, in a copy and in another process, bit for bit."""

import copy
import io
import multiprocessing
import pickle

import pytest
import torch
from torchvision.models import resnet18

import msun


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_torch(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def modules():
    """(module, an input that it takes): halves, own and shared subnets, calibrated norms."""
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = resnet18(num_classes=5).eval()
    head, tail = msun.cut(model, "layer1", x)
    own = msun.build(model, "layer1", [32, 64]).eval()
    shared = msun.build(model, "layer1", [32, 64], subnets="shared").eval()
    small = x[..., ::2, ::2].contiguous()
    return {"head": (head, x), "tail": (tail, head(x).detach()), "own": (own, small),
            "shared": (shared, small)}  # fmt: skip


@pytest.mark.parametrize("way", [through_pickle, through_torch, copy.deepcopy])
@pytest.mark.parametrize("name", ["head", "tail", "own", "shared"])
def test_a_copy_gives_the_same_bits(name, way):
    module, x = modules()[name]
    again = way(module)
    for mode in (False, True):
        torch.manual_seed(1)
        wanted = module.train(mode)(x)
        torch.manual_seed(1)
        assert torch.equal(again.train(mode)(x), wanted)
    assert [k for k, _ in again.named_parameters()] == [k for k, _ in module.named_parameters()]
    assert torch.equal(through_pickle(again).eval()(x), again.eval()(x))  # a copy of a copy


def outputs_of(jobs, queue):
    torch.set_num_threads(1)
    with torch.no_grad():
        queue.put({name: module(x).numpy() for name, (module, x) in jobs.items()})


def test_a_spawned_process_gets_them():
    torch.set_num_threads(1)
    jobs = modules()
    with torch.no_grad():
        wanted = {name: module(x).numpy() for name, (module, x) in jobs.items()}
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=outputs_of, args=(jobs, queue))
    process.start()
    found = queue.get(timeout=120)
    process.join(60)
    assert process.exitcode == 0
    assert all((found[name] == wanted[name]).all() for name in jobs)


def test_cuts_and_builds_inside_inference_mode():
    x = torch.randn(2, 3, 64, 64)
    model = resnet18(num_classes=5).eval()
    with torch.inference_mode():
        assert "layer1" in msun.cut_points(model, torch.randn(2, 3, 64, 64))
        head, tail = msun.cut(model, "layer1")
        assert torch.equal(tail(head(x)), model(x))
        net = msun.build(model, "layer1", [32, 64]).eval()
        inside = net(x)
        assert net.macs(64) > net.macs(32) > 0
        made = resnet18(num_classes=5)
        with pytest.raises(ValueError, match=r"inference mode: '.*': "):
            msun.cut_points(made)
    assert torch.equal(net(x), inside)
    assert not any(p.is_inference() for p in net.parameters())
    net.train()(x).sum().backward()
    assert net.tail.get_submodule("fc").weight.grad is not None  # norms of other scales get none


def test_a_state_dict_of_an_earlier_version_loads():
    model = resnet18(num_classes=5)
    net, other = (msun.build(model, "layer1", [32, 64]) for _ in range(2))
    old = {k.replace("subnets.", "heads.", 1): x + 1 for k, x in net.state_dict().items()}
    other.load_state_dict(old)
    assert all(torch.equal(x, net.state_dict()[k] + 1) for k, x in other.state_dict().items())
