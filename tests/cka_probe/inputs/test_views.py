import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from cka_probe import probe
from cka_probe.inputs.views import (
    View,
    apply_view,
    scale_transforms,
    seeded,
    stack,
    view_transforms,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def weights(n_in, n_out, antialias):
    """(n_out, n_in) float64: a triangle around each output pixel's centre, by the book."""
    step = n_in / n_out
    width = max(step, 1.0) if antialias else 1.0
    out = np.zeros((n_out, n_in))
    for k in range(n_out):
        centre = (k + 0.5) * step - 0.5
        if not antialias:
            centre = min(max(centre, 0.0), n_in - 1.0)
        for i in range(n_in):
            out[k, i] = max(0.0, 1 - abs(i - centre) / width)
        out[k] /= out[k].sum()
    return out


def oracle(image, side, antialias=True):
    """Centre square and bilinear resize in float64."""
    x = image.double().numpy()
    s = min(x.shape[1:])
    top, left = round((x.shape[1] - s) / 2), round((x.shape[2] - s) / 2)
    x = x[:, top : top + s, left : left + s]
    w = weights(s, side, antialias)
    return torch.from_numpy(np.einsum("ki,cij,lj->ckl", w, x, w))


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(
    ("shape", "side"),
    [((40, 40), 7), ((40, 40), 39), ((33, 50), 16), ((51, 30), 64), ((224, 224), 32), ((9, 9), 1)],
)
def test_resize_equals_a_float64_triangle_filter(shape, side, antialias):
    image = torch.rand(3, *shape, generator=torch.Generator().manual_seed(1))
    got = View(side, antialias=antialias)(image)
    torch.testing.assert_close(got.double(), oracle(image, side, antialias), rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [5, 32, 100])
def test_resize_equals_pillows_on_float_pixels(side):
    image = torch.rand(1, 60, 60, generator=torch.Generator().manual_seed(2))
    pil = Image.fromarray(image[0].numpy()).resize((side, side), Image.Resampling.BILINEAR)
    got = View(side)(image)[0].numpy()
    np.testing.assert_allclose(got, np.asarray(pil), rtol=0, atol=1e-5)


def test_antialiasing_makes_a_difference_when_shrinking():
    image = torch.rand(3, 64, 64)
    assert (View(8)(image) - View(8, antialias=False)(image)).abs().max() > 0.05
    off = scale_transforms([8, 16], resize="restore", antialias=False)
    down = torch.from_numpy(np.asarray(oracle(image, 8, False))).float()
    want = oracle(down, 16, False)
    torch.testing.assert_close(off["8"](image).double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 30, 30), (3, 30, 41), (1, 45, 30)])
def test_a_view_of_the_images_own_size_is_the_identity_bit_for_bit(shape):
    image = torch.rand(shape)
    top, left = round((shape[1] - 30) / 2), round((shape[2] - 30) / 2)
    square = image[:, top : top + 30, left : left + 30]
    assert torch.equal(View(30)(image), square)
    assert torch.equal(View(30, 30)(image), square)
    if shape == (3, 30, 30):
        normal = View(30, mean=MEAN, std=STD)(image)
        mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
        assert torch.equal(normal, (image - mean) / std)


def test_the_centre_is_cut_out():
    image = torch.zeros(1, 2, 6)
    image[:, :, 2:4] = 1
    assert torch.equal(View(2)(image), torch.ones(1, 2, 2))
    assert torch.equal(View(2)(image.mT.contiguous()), torch.ones(1, 2, 2))


def test_a_view_without_a_size_leaves_shape_and_values():
    image = torch.rand(3, 5, 9)
    assert View()(image) is image
    assert View(mean=MEAN, std=STD)(image).shape == (3, 5, 9)


def test_the_image_is_never_changed():
    image = torch.rand(3, 8, 8)
    before = image.clone()
    for view in [
        View(8, mean=MEAN, std=STD),
        View(4, 8, True, MEAN, STD),
        View(mean=MEAN, std=STD),
    ]:
        view(image)
    assert torch.equal(image, before)


def test_restore_is_its_two_steps_and_the_reference_one():
    image = torch.rand(3, 40, 52)
    views = scale_transforms([10, 20, 32], resize="restore", mean=MEAN, std=STD)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    for side in (10, 20):
        want = (View(32)(View(side)(image)) - mean) / std
        assert torch.equal(views[str(side)](image), want)
        slow = (oracle(oracle(image, side).float(), 32) - mean) / std
        torch.testing.assert_close(views[str(side)](image).double(), slow, rtol=0, atol=2e-5)
    assert torch.equal(views["32"](image), (View(32)(image) - mean) / std)
    assert views["10"](image).shape == (3, 32, 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_stay_and_are_resized_in_float32_or_better(dtype):
    image = torch.rand(3, 20, 20).to(dtype)
    got = View(7)(image)
    assert got.dtype == dtype
    torch.testing.assert_close(got, oracle(image, 7).to(dtype), rtol=0, atol=0.004)
    if dtype == torch.float64:
        torch.testing.assert_close(got, oracle(image, 7), rtol=0, atol=1e-14)


def test_names_order_and_reference_of_scales():
    assert list(scale_transforms([64, 32, 128])) == ["64", "32", "128"]
    assert list(scale_transforms(None)) == ["native"]
    assert scale_transforms([64, 32], resize="restore")["32"] == View(32, 64)
    assert scale_transforms([32, 64], reference="32")["32"] == View(32)
    assert scale_transforms(np.array([32, 64]))["64"] == View(64)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"scales": [32], "resize": "crop"}, "unknown resize: 'crop': choose"),
        ({"scales": None, "resize": "restore"}, "restore without scales"),
        ({"scales": [32], "reference": 64}, "reference is not a scale: '64': choose one of 32"),
        ({"scales": [32, 64], "reference": 32, "resize": "restore"}, "only goes up: 64 above 32"),
        ({"scales": [32], "mean": MEAN}, "only mean is given: give mean and std"),
        ({"scales": [32], "std": STD}, "only std is given"),
        ({"scales": [32], "mean": MEAN, "std": (1, 1)}, "3 means, 2 stds"),
        ({"scales": [32], "mean": MEAN, "std": (1, 0, 1)}, "std is not positive"),
        ({"scales": [32], "mean": (float("nan"),) * 3, "std": STD}, "mean is no list of numbers"),
        ({"scales": [32], "mean": ("a", "b", "c"), "std": STD}, "mean is no list of numbers"),
        ({"scales": []}, "no scales"),
    ],
)
def test_bad_views_are_refused_in_three_parts(options, text):
    with pytest.raises(ValueError, match=text) as caught:
        scale_transforms(**options)
    assert str(caught.value).count(": ") == 2


def test_normalisation_fits_the_channels():
    grey = torch.rand(1, 4, 4)
    assert torch.equal(View(mean=(0.5,), std=(0.25,))(grey), (grey - 0.5) / 0.25)
    with pytest.raises(ValueError, match=r"do not fit the images: 3 for 1 channels: give one"):
        View(mean=MEAN, std=STD)(grey)


def test_views_of_the_user():
    blur = v2.GaussianBlur(3)
    views = view_transforms({"sharp": None, "blur": blur}, mean=MEAN, std=STD)
    assert views == {"sharp": View(mean=MEAN, std=STD), "blur": blur}
    assert view_transforms({"as it is": None}) == {"as it is": View()}
    with pytest.raises(TypeError, match=r"view 'x' has no transform: int: give"):
        view_transforms({"x": 3})
    with pytest.raises(ValueError, match=r"^no views"):
        view_transforms({})


def test_a_transform_of_the_user_gets_a_copy_before_normalisation():
    image = torch.rand(3, 5, 7)
    before = image.clone()
    out = apply_view(lambda x: x.mul_(2), image, 0, "a.jpg", "double")
    assert torch.equal(image, before)
    assert torch.equal(out, before * 2)


def test_random_transforms_follow_seed_image_and_view_and_leave_no_trace():
    image = torch.zeros(1, 2, 2)

    def noise(x):
        return x + torch.rand(x.shape) + random.random()

    torch.manual_seed(5)
    random.seed(5)
    state, python_state = torch.get_rng_state(), random.getstate()
    first = apply_view(noise, image, 0, "a.jpg", "v")
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state
    torch.manual_seed(6)
    random.seed(6)
    assert torch.equal(apply_view(noise, image, 0, "a.jpg", "v"), first)
    others = [(1, "a.jpg", "v"), (0, "b.jpg", "v"), (0, "a.jpg", "w")]
    values = [first, *(apply_view(noise, image, *key) for key in others)]
    assert len({float(v[0, 0, 0]) for v in values}) == 4


def test_the_random_state_is_put_back_after_an_exception():
    def fail():
        with seeded(0, "x"):
            torch.rand(3)
            raise KeyError

    state = torch.get_rng_state()
    with pytest.raises(KeyError):
        fail()
    assert torch.equal(torch.get_rng_state(), state)


def test_faults_of_a_transform_name_the_view_and_the_image():
    image = torch.zeros(3, 4, 4)
    with pytest.raises(
        ValueError, match=r"^view 'v' failed: image 'a.jpg', KeyError \('k'\): chec"
    ):
        apply_view(lambda x: {}["k"], image, 0, "a.jpg", "v")
    with pytest.raises(TypeError, match=r"^view 'v' gives no tensor: Image: end its transform"):
        apply_view(v2.ToPILImage(), image, 0, "a.jpg", "v")


def test_stacking_names_two_images_that_differ():
    images = [torch.zeros(3, 4, 4), torch.zeros(3, 4, 4), torch.zeros(3, 4, 5)]
    assert stack("v", images[:2], ["a", "b"]).shape == (2, 3, 4, 4)
    with pytest.raises(
        ValueError, match=r"'a' \(3, 4, 4\) and 'c' \(3, 4, 5\) in view 'v': resize"
    ):
        stack("v", images, ["a", "b", "c"])


def test_views_are_values_that_can_be_sent_to_workers():
    view = View(8, 16, False, MEAN, STD)
    assert pickle.loads(pickle.dumps(view)) == view == View(8, 16, False, list(MEAN), np.array(STD))
    assert len({View(8), View(8), View(9)}) == 2


BYTES = {"mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)}
UNITS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def probed(images, **constants):
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    return probe(net, images, None, batch_size=8, progress=False, **constants)


@pytest.mark.parametrize("constants", [BYTES, {**UNITS, "std": BYTES["std"]},
                                       {"mean": BYTES["mean"], "std": UNITS["std"]}])  # fmt: skip
def test_means_of_another_range_than_the_images_are_refused(constants, tmp_path):
    pixels = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for k, image in enumerate(pixels):
        Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(tmp_path / f"{k}.png")
    words = r"^mean and std are not of 0..1: mean .*, images of 0..1: divide both by 255$"
    for images in (tmp_path, pixels):
        with pytest.raises(ValueError, match=words):
            probed(images, **constants)
        probed(images, **UNITS)
    view = View(side_px=8, **constants)  # in views= as well
    with pytest.raises(ValueError, match=words):
        probe(nn.Sequential(nn.Conv2d(3, 4, 3)), tmp_path, views={"a": (None, view)},
              batch_size=8, progress=False)  # fmt: skip
    probed(tmp_path, mean=UNITS["mean"], std=(1 / 255,) * 3)  # Caffe's networks want 0..255


def test_images_of_another_range_than_the_means_are_refused():
    pixels = 255 * torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"^images are not of 0..1: up to 25\d.*, mean 0.485, std"):
        probed(pixels, **UNITS)
    probed(pixels, **BYTES)
    probed(pixels)  # used as they are
