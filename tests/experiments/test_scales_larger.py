"""The larger tier of experiments/scales: a pretrained network, and the images that it is given."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.usefixtures("at_the_root")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder as the shared one: weights of a random network, ten classes of small files."""
    root = tmp_path_factory.mktemp("data")
    torch.manual_seed(0)
    net = timm.create_model("mobilenetv2_100", pad_type="same")
    for name, x in net.state_dict().items():
        if "running" in name:
            x.uniform_(0.5, 1.5)
    path = root / "weights" / "mobilenet_v2_qat.timm_same.safetensors"
    path.parent.mkdir()
    save_file({k: v for k, v in net.state_dict().items() if "tracked" not in k}, path)
    known = {f"n{c:02}": [7 * c + 3, f"class {c}"] for c in range(10)}
    for split, count in (("train", 4), ("val", 2)):
        for c, name in enumerate(known):
            folder = root / "images" / "imagenette224" / split / name
            folder.mkdir(parents=True)
            for k in range(count):
                value = 20 * c + 3 * k + (100 if split == "val" else 0)
                pixels = np.full((224, 224, 3), value % 256, dtype=np.uint8)
                image = Image.fromarray(pixels)
                image = image.convert("L") if k == 1 else image  # some are grey
                image.save(folder / f"{k}.png")
    (root / "images" / "imagenet_classes.json").write_text(json.dumps(known))
    return root, net.eval()


def test_the_stages_are_the_published_network(data):
    from experiments.scales.arms import ARMS, made, plain_net
    from experiments.scales.tasks import TASKS, small

    root, net = data
    task = small(TASKS["imagenette"], (20, 20, 20), (224,))
    mine = made(ARMS["single"], task, "mobilenetv2", at="layer3", seed=3, data=root).eval()
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = net(x)[:, [7 * c + 3 for c in range(10)]]
        assert torch.allclose(mine(x), wanted, atol=1e-5 * float(wanted.abs().max()))
    y, shapes = x, []
    plain = plain_net(ARMS["single"], task, "mobilenetv2", seed=3).eval()
    with torch.no_grad():
        for name in ("stem", "layer1", "layer2", "layer3", "layer4"):
            y = plain.get_submodule(name)(y)
            shapes.append((y.shape[1], y.shape[-1]))
    assert shapes == [(32, 112), (24, 56), (32, 28), (96, 14), (320, 7)]  # where it can be cut
    # and a small subnet starts from it as well: the same weights under other strides
    many = made(ARMS["lean+small"], task, "mobilenetv2", at="layer1", seed=3, data=root)
    state, own = many.state_dict(), net.state_dict()
    stems = [v for k, v in state.items() if v.shape == own["conv_stem.weight"].shape]
    assert len(stems) == 3
    assert all(torch.equal(x, own["conv_stem.weight"]) for x in stems)


def test_weights_that_are_not_there_or_of_another_network_are_named(data, tmp_path):
    from experiments.scales import pretrained
    from experiments.scales.arms import ARMS, made
    from experiments.scales.tasks import TASKS

    with pytest.raises(ValueError, match=r"no weights: .*--data"):
        made(ARMS["single"], TASKS["imagenette"], "mobilenetv2", at="layer1", seed=0, data=tmp_path)
    root, _ = data
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))
    with pytest.raises(ValueError, match="weights do not fit"):
        pretrained.load_pretrained(net, root)
    with pytest.raises(ValueError, match="not MobileNetV2: 1 channels"):
        pretrained.mobilenetv2(1, 10, (2, 2))


def test_images_are_split_by_class_and_no_split_meets_another(data, tmp_path):
    from experiments.scales import pretrained
    from experiments.scales.tasks import TASKS, held, small

    root, _ = data
    counts = (20, 10, 10)
    found = {s: pretrained.imagenette(s, root, counts) for s in ("train", "val", "test")}
    for (images, labels), n in zip(found.values(), counts, strict=True):
        assert images.shape == (n, 3, 224, 224)
        assert images.dtype == torch.uint8
        assert labels.bincount().tolist() == [n // 10] * 10
    value = {s: images[:, 0, 0, 0].tolist() for s, (images, _) in found.items()}
    assert value["train"][:2] == [0, 3]  # the first of a class's files
    assert value["val"][:1] == [6]  # the next
    assert value["test"][:1] == [100]  # from the other folder
    with pytest.raises(ValueError, match=r"no images: .*--data"):
        pretrained.imagenette("train", None, counts)
    task = small(TASKS["imagenette"], counts, (224,))
    kept = held(task, "val", tmp_path, root)
    assert float(kept.stacked([0])[0][0, 0, 0, 0]) == pytest.approx(6 / 127.5 - 1)
    assert held(task, "val", tmp_path).fingerprint() == kept.fingerprint()  # kept: no data needed


def test_the_larger_tier_is_its_own_list_and_tunes_every_arm():
    from experiments.scales.arms import ARMS
    from experiments.scales.manifest import (
        LARGER,
        LEADING,
        RATE_BUDGET,
        Run,
        larger,
        manifest,
        rate_runs,
        rates,
        tuning,
    )
    from experiments.scales.tasks import TASKS

    runs = larger()
    assert {(run.task, run.net) for run in runs} == {LARGER}
    assert not {run.key for run in runs} & {run.key for run in manifest()}
    for seed in range(3):
        at = {(run.arm, run.cut) for run in runs if run.seed == seed}
        assert at == {*((arm, "layer1") for arm in LEADING), ("lean+small", "layer3")}
    for arm in LEADING:
        assert tuning(arm, 1.0, LARGER[1]) == (arm, RATE_BUDGET)
    assert rates(ARMS["single"], "imagenette") == TASKS["imagenette"].rates
    three = rate_runs(*LARGER, "g+small", RATE_BUDGET, {})
    assert [run.lr for run in three] == [round(lr / 3, 5) for lr in TASKS["imagenette"].rates]
    assert Run(*LARGER, "g+small", 0).key.startswith("imagenette_mobilenetv2_g+small_s0")


def test_its_rival_costs_what_lean_costs():
    """d3 enlarges to a side at which its MACs are lean's: 1 % below to 5 % above."""
    from experiments.scales.arms import ARMS, made
    from experiments.scales.tasks import TASKS

    task = TASKS["imagenette"]
    nets = {
        (arm, cut): made(ARMS[arm], task, "mobilenetv2", at=cut, seed=0)
        for arm, cut in (("d3+small", "layer1"), ("lean+small", "layer1"), ("lean+small", "layer3"))
    }
    mean = {at: sum(net.macs(s) for s in task.sizes) / len(task.sizes) for at, net in nets.items()}
    rival = mean.pop(("d3+small", "layer1"))
    assert all(0.99 <= rival / own <= 1.05 for own in mean.values()), (rival, mean)
