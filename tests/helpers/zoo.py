"""The architectures of the sweeps: torchvision's, and the smallest variant of each timm module.

Random weights. Torchvision's are the real ones, but for its vision transformers, which are built
for a smaller image; timm's were chosen once by their number of parameters.
"""

import warnings
from importlib.util import find_spec
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

TIMM = {
    "beit": "beit_base_patch16_224", "byoanet": "halonet_h1", "byobnet": "test_byobnet",
    "cait": "cait_xxs24_224", "coat": "coat_tiny", "convit": "convit_tiny",
    "convmixer": "convmixer_768_32", "convnext": "test_convnext", "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240", "csatv2": "csatv2", "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny", "davit": "davit_tiny", "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224", "densenet": "densenet121", "dla": "dla46x_c",
    "dpn": "dpn48b", "edgenext": "edgenext_xx_small", "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0", "efficientnet": "test_efficientnet",
    "efficientvim": "efficientvim_m1", "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0", "eva": "vit_tiny_patch16_dinov3_qkvb",
    "fasternet": "fasternet_t0", "fastvit": "fastvit_t8", "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny", "gemma4_vit": "gemma4_vit_167m", "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b", "hgnet": "hgnetv2_b0", "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny", "hrnet": "hrnet_w18_small", "iformer": "iformer_t",
    "inception_next": "inception_next_atto", "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3", "inception_v4": "inception_v4", "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s", "lowformer": "lowformer_b0", "mambaout": "test_mambaout",
    "maxxvit": "test_coatnet", "metaformer": "poolformerv2_s12", "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "mobilenetv3_small_050", "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs", "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap", "nasnet": "nasnetalarge",
    "nest": "nest_tiny", "nextvit": "nextvit_small", "nfnet": "test_nfnet", "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large", "pvt_v2": "pvt_v2_b0", "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny", "regnet": "regnetx_002", "repghost": "repghostnet_050",
    "repvit": "repvit_m1", "res2net": "res2next50", "resnest": "resnest14d",
    "resnet": "test_resnet", "resnetv2": "resnetv2_18", "rexnet": "rexnet_100",
    "selecsls": "selecsls42", "senet": "legacy_seresnet18", "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1", "sknet": "skresnet18", "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs", "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window16_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224", "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224", "tresnet": "tresnet_m", "twins": "twins_svt_small",
    "vgg": "vgg11", "visformer": "visformer_tiny", "vision_transformer": "test_vit",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "test_vit_relpos",
    "vision_transformer_sam": "samvit_base_patch16_224", "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224", "vovnet": "ese_vovnet19b_slim_dw", "xception": "legacy_xception",
    "xception_aligned": "xception41p", "xcit": "xcit_nano_12_p8_224",
}  # fmt: skip

# Inputs other than 64 px (torchvision), and 96 px or their own where that is fixed (timm).
SIDES = {
    "alexnet": 96, "googlenet": 96, "inception_v3": 107, "maxvit_t": 224,
    "lraspp_mobilenet_v3_large": 96, "deeplabv3_mobilenet_v3_large": 96,
    "timm:mobilenetv5_base": 64, "timm:naflexvit_base_patch16_parfac_gap": 64,
    "timm:nasnetalarge": 64, "timm:pnasnet5large": 64, "timm:samvit_base_patch16_224": 64,
    "timm:convmixer_768_32": 64, "timm:vgg11": 64, "timm:halonet_h1": 256,
    "timm:sequencer2d_s": 64,
}  # fmt: skip
# The second, smaller size, other than about three quarters of the first.
SECOND = {
    "inception_v3": 80, "timm:inception_v3": 80, "timm:inception_v4": 80,
    "timm:inception_resnet_v2": 80,
}  # fmt: skip
# In training mode: its auxiliary head takes no smaller map.
TRAINS = {"inception_v3": 299}
# Built for a smaller image: the constructor's argument, which is the size of the input as well.
BUILT = {
    **{f"vit_{k}": ("image_size", 64) for k in ("b_16", "b_32", "l_16", "l_32")},
    "vit_h_14": ("image_size", 56), "timm:deepseek_vit_412m": ("img_size", 56),
    "timm:gemma4_vit_167m": ("img_size", 64), "timm:qwen3_vit_88m": ("img_size", 64),
    **{
        f"timm:{TIMM[module]}": ("img_size", 96)
        for module in (
            "beit", "cait", "coat", "convit", "gcvit", "hiera", "nest", "swin_transformer",
            "swin_transformer_v2", "swin_transformer_v2_cr", "tnt", "vitamin", "volo",
        )
    },
}  # fmt: skip
# Random weights alone shrink their map until the bias of the last layer swallows it in float32,
# at any size: their batch norms see four images first.
WARMED = ("deeplabv3_mobilenet_v3_large",)


def torchvision_models() -> list[str]:
    """Every classification network of torchvision."""
    return torchvision.models.list_models(module=torchvision.models)


def segmentation_models() -> list[str]:
    """DeepLabV3 and LR-ASPP."""
    return ["deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"]


def timm_models() -> list[str]:
    """The smallest variant of each module of timm, as `timm:NAME`; none without timm."""
    if find_spec("timm") is None:
        return []
    import timm

    known = set(timm.list_models())
    return [f"timm:{name}" for name in TIMM.values() if name in known]


def input_size(name: str) -> int:
    """Side in pixels at which the sweeps call the network."""
    if name in BUILT:
        return BUILT[name][1]
    if name in SIDES:
        return SIDES[name]
    if not name.startswith("timm:"):
        return 64
    import timm

    cfg = timm.get_pretrained_cfg(name.removeprefix("timm:"))
    side = 224 if cfg is None else cfg.input_size[-1]
    return side if cfg is None or cfg.fixed_input_size else min(side, 96)


def second_size(name: str) -> int:
    """The smaller size that the sweeps try: about three quarters, in steps of 32 where possible."""
    side = input_size(name)
    return SECOND.get(name, max(32, side * 3 // 4 // 32 * 32))


def remark(name: str) -> str:
    """How the network differs from the one that its name gives."""
    said = []
    if name in BUILT:
        said.append(f"built for {BUILT[name][1]} px")
    if name in WARMED:
        said.append("batch norms saw 4 images: random weights alone give a constant in float32")
    return "; ".join(said)


def build(name: str) -> nn.Module:
    """The network with random weights (seed 0), in training mode; the global state untouched."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), Tiled():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = _built(name)
        if name in WARMED:
            _warm(model, torch.randn(4, 3, input_size(name), input_size(name)))
    return model


def _built(name: str) -> nn.Module:
    extra: dict[str, Any] = {BUILT[name][0]: BUILT[name][1]} if name in BUILT else {}
    if name.startswith("timm:"):
        import timm

        return timm.create_model(name.removeprefix("timm:"), pretrained=False, **extra)
    if name in segmentation_models():
        extra = {"weights_backbone": None}
    if name in ("googlenet", "inception_v3"):
        extra = {"init_weights": False}
    return torchvision.models.get_model(name, weights=None, **extra)


@torch.no_grad()
def _warm(model: nn.Module, x: Tensor) -> None:
    """Let the batch norms take the statistics of some images."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # their mean
    model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


class Tiled(TorchDispatchMode):
    """Large normal and uniform draws are tiles of one bank of a million numbers.

    Building takes a few seconds instead of a minute where a network has 600 million weights. The
    tiles start anywhere, and the bank's length is prime, so that no two rows of a weight are alike.
    """

    LENGTH, FEW = 1_000_003, 5_000

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.banks = {
            torch.ops.aten.normal_: torch.randn(self.LENGTH, generator=g),
            torch.ops.aten.uniform_: torch.rand(self.LENGTH, generator=g),
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        bank = self.banks.get(func.overloadpacket)
        if bank is None or args[0].numel() < self.FEW or not args[0].is_contiguous():
            return func(*args, **(kwargs or {}))
        flat, (low, high) = args[0].view(-1), (*args[1:3], *(0.0, 1.0)[len(args) - 1 :])
        width = high if func.overloadpacket is torch.ops.aten.normal_ else high - low
        start = int(torch.randint(self.LENGTH, ()))
        pieces = [bank[start:], *[bank] * (len(flat) // self.LENGTH + 1)]
        at = 0
        for piece in pieces:
            part = flat[at : at + len(piece)]
            torch.mul(piece[: len(part)], width, out=part).add_(low)
            at += len(part)
        return args[0]
