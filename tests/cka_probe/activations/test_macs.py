"""MACs against arithmetic by hand: the same on every path that torch takes."""

import pytest
import torch
import torchvision
from torch import nn

from cka_probe import probe
from cka_probe.activations.macs import MacCounter
from cka_probe.activations.meta import meta_copy
from msun.network.shape_probe import ShapeProbe

N, T, S, E, F = 2, 5, 7, 8, 16  # images, tokens, tokens of a memory, width, width of the MLP


def attention(t, s, e=E):
    """Projections of t queries, s keys, s values and t outputs; scores, and their use."""
    return t * e * e + 2 * s * e * e + t * e * e + 2 * t * s * e


def encoder(t):
    return attention(t, t) + 2 * t * E * F


def lstm(n_in, hidden):
    return 4 * hidden * (n_in + hidden)


def x(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


SEQ = (x(N, T, E),)
# name -> (module, inputs, MACs of all N)
CASES = {
    "linear": (nn.Linear(E, 4), SEQ, N * T * E * 4),
    "bilinear": (nn.Bilinear(3, 4, 5), (x(N, 3), x(N, 4)), N * 3 * 4 * 5),
    "convolution 1-D, groups": (nn.Conv1d(4, 6, 3, groups=2), (x(N, 4, 10),), N * 6 * 8 * 2 * 3),
    "convolution 2-D": (nn.Conv2d(4, 6, 3, stride=2), (x(N, 4, 9, 7),), N * 6 * 4 * 3 * 4 * 9),
    "convolution 2-D, dilated": (nn.Conv2d(4, 6, 3, dilation=2), (x(N, 4, 9, 9),),
                                 N * 6 * 25 * 4 * 9),
    "convolution 2-D, depthwise": (nn.Conv2d(4, 4, 3, groups=4), (x(N, 4, 9, 9),),
                                   N * 4 * 49 * 9),
    "convolution 3-D": (nn.Conv3d(4, 6, 3), (x(N, 4, 5, 5, 5),), N * 6 * 27 * 4 * 27),
    "transposed 1-D": (nn.ConvTranspose1d(4, 6, 3), (x(N, 4, 9),), N * 4 * 9 * 6 * 3),
    "transposed 2-D, groups": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (x(N, 4, 5, 5),),
                               N * 4 * 25 * 3 * 9),
    "transposed 3-D": (nn.ConvTranspose3d(4, 6, 2), (x(N, 4, 3, 3, 3),), N * 4 * 27 * 6 * 8),
    "deformable convolution": (torchvision.ops.DeformConv2d(4, 6, 3, groups=2),
                               (x(N, 4, 8, 8), x(N, 18, 6, 6)), N * 6 * 36 * 2 * 9),
    "attention, tokens first": (nn.MultiheadAttention(E, 2, batch_first=True), SEQ * 3,
                                N * attention(T, T)),
    "attention, time first": (nn.MultiheadAttention(E, 2), (x(T, N, E),) * 3, N * attention(T, T)),
    "attention to a memory": (nn.MultiheadAttention(E, 2, batch_first=True),
                              (x(N, T, E), x(N, S, E), x(N, S, E)), N * attention(T, S)),
    "encoder layer": (nn.TransformerEncoderLayer(E, 2, F, batch_first=True), SEQ, N * encoder(T)),
    "encoder layer, norm first": (
        nn.TransformerEncoderLayer(E, 2, F, batch_first=True, norm_first=True, activation="gelu"),
        SEQ, N * encoder(T)),
    "encoder layer, time first": (nn.TransformerEncoderLayer(E, 2, F), (x(T, N, E),),
                                  N * encoder(T)),
    "encoder": (nn.TransformerEncoder(nn.TransformerEncoderLayer(E, 2, F, batch_first=True), 3),
                SEQ, 3 * N * encoder(T)),
    "decoder layer": (nn.TransformerDecoderLayer(E, 2, F, batch_first=True),
                      (x(N, T, E), x(N, S, E)),
                      N * (attention(T, T) + attention(T, S) + 2 * T * E * F)),
    "transformer": (nn.Transformer(E, 2, 1, 1, F, batch_first=True), (x(N, S, E), x(N, T, E)),
                    N * (encoder(S) + attention(T, T) + attention(T, S) + 2 * T * E * F)),
    "LSTM": (nn.LSTM(E, 6, batch_first=True), SEQ, N * T * lstm(E, 6)),
    "LSTM, two layers, both ways": (nn.LSTM(E, 6, 2, bidirectional=True), (x(T, N, E),),
                                    N * T * 2 * (lstm(E, 6) + lstm(12, 6))),
    "LSTM with a projection": (nn.LSTM(E, 6, proj_size=3), (x(T, N, E),),
                               N * T * (4 * 6 * (E + 3) + 3 * 6)),
    "GRU": (nn.GRU(E, 6, batch_first=True), SEQ, N * T * 3 * 6 * (E + 6)),
    "RNN": (nn.RNN(E, 6, nonlinearity="relu"), (x(T, N, E),), N * T * 6 * (E + 6)),
    "LSTM cell": (nn.LSTMCell(E, 6), (x(N, E),), N * lstm(E, 6)),
    "GRU cell": (nn.GRUCell(E, 6), (x(N, E),), N * 3 * 6 * (E + 6)),
    "RNN cell": (nn.RNNCell(E, 6), (x(N, E),), N * 6 * (E + 6)),
    "no products": (nn.Sequential(nn.BatchNorm1d(T), nn.GELU(), nn.Upsample(scale_factor=2)),
                    SEQ, 0),
}  # fmt: skip


def count(module, inputs, *, grad=False, meta=False):
    module = (meta_copy(module) if meta else module).eval()
    inputs = [t.to("meta") for t in inputs] if meta else inputs
    with torch.set_grad_enabled(grad), MacCounter() as counter:
        module(*inputs)
    assert not counter.uncounted
    return counter.macs()


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("path", ["fused", "with gradients", "without data"])
@pytest.mark.parametrize("name", CASES)
def test_macs_by_hand(name, path):
    module, inputs, expected = CASES[name]
    assert count(module, inputs, grad=path[0] == "w" and path != "without data",
                 meta=path == "without data") == expected  # fmt: skip


@pytest.mark.parametrize("activation", [torch.matmul, torch.bmm, torch.baddbmm, torch.addbmm])
def test_functions_that_hold_products(activation):
    a, b = x(3, 4, 5), x(3, 5, 6)
    with MacCounter() as counter:
        activation(a, b) if activation in (torch.matmul, torch.bmm) else activation(x(4, 6), a, b)
    assert counter.macs() == 3 * 4 * 5 * 6


def test_products_of_vectors_and_in_place():
    m, v = x(4, 5), x(5)
    with MacCounter() as counter:
        (
            m @ v,
            v @ v,
            torch.addmv(x(4), m, v),
            x(4, 6).addmm_(m, x(5, 6)),
            torch.einsum("ij,kj->ik", m, m),
        )
    assert counter.macs() == 20 + 5 + 20 + 4 * 5 * 6 + 4 * 4 * 5
    assert not counter.uncounted


def test_attention_whose_keys_are_shared_by_heads():
    with MacCounter() as counter:
        torch.nn.functional.scaled_dot_product_attention(
            x(N, 4, T, 3), x(N, 2, S, 3), x(N, 2, S, 3), enable_gqa=True
        )
    assert counter.macs() == N * 4 * 2 * T * S * 3


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padded_tokens_that_are_skipped_cost_nothing():
    layer = nn.TransformerEncoderLayer(E, 2, F, batch_first=True)
    net = nn.TransformerEncoder(layer, 2).eval()
    padding = torch.tensor([[False] * T, [False] * 3 + [True] * (T - 3)])
    with torch.no_grad(), MacCounter() as counter:
        net(x(N, T, E), src_key_padding_mask=padding)
    assert counter.macs() == 2 * (encoder(T) + encoder(3))


def test_vision_transformer_costs_what_its_paper_says_in_both_packages():
    net = torchvision.models.vit_b_32().eval()  # 4.41 GFLOPS (MACs) in torchvision's table
    report = probe(net, torch.randn(16, 3, 224, 224), None, layers="encoder.ln", batch_size=8,
                   reduce="mean", progress=False)  # fmt: skip
    (macs,) = report.meta["view_macs"].values()
    assert macs == ShapeProbe(net).run((1, 3, 224, 224)).macs
    assert macs == pytest.approx(4.41e9, rel=2e-3)


class Unknown(nn.Module):
    def forward(self, images):
        return torch.cdist(images.flatten(1), images.flatten(1)[:5])


def test_an_operator_without_a_formula_is_named():
    with pytest.warns(UserWarning, match=r"^MACs not counted: aten\._\w*dist\w*: the true MACs"):
        probe(Unknown(), torch.randn(16, 3, 8, 8), None, layers="(model)", batch_size=8,
              progress=False)  # fmt: skip
    with pytest.warns(UserWarning, match=r"^MACs not counted: aten\._\w*dist"):
        ShapeProbe(Unknown()).run((6, 3, 8, 8))


def test_an_operator_of_another_library_is_named():
    @torch.library.custom_op("cka_probe_test::double", mutates_args=())
    def double(z: torch.Tensor) -> torch.Tensor:
        return 2 * z

    with MacCounter() as counter:
        double(x(3))
    assert counter.uncounted == {"cka_probe_test.double"}
