"""Weights near fp16's end (6e-8): packed as well as others, or refused with numbers; none become 0 without a word."""

import pytest
import torch
from torch import nn

import pyllmq
from pyllmq.packing import mask_24


def weight_of(magnitude: float) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(64, 128) * magnitude


def relative_error(layer: nn.Module, weight: torch.Tensor) -> float:
    return float((layer.dequantize() - weight).norm() / weight.norm())


@pytest.mark.parametrize("magnitude", [1e-6, 1e-7, 1e-9, 1e-12])
@pytest.mark.parametrize("row_scale", [False, True])
def test_codebooks_scale_by_themselves(magnitude, row_scale):
    weight, ordinary = weight_of(magnitude), weight_of(1.0)
    layer = pyllmq.CodebookLinear.from_dense(weight, bits=4, row_scale=row_scale)
    plain = pyllmq.CodebookLinear.from_dense(ordinary, bits=4, row_scale=row_scale)
    assert relative_error(layer, weight) < 1.1 * relative_error(plain, ordinary) + 1e-3
    x = torch.randn(3, 128)
    expected = x @ layer.dequantize().T
    assert float((layer(x) - expected).norm()) < 1e-3 * float(expected.norm()) > 0


def test_ordinary_weights_have_no_scale():
    assert not pyllmq.CodebookLinear.from_dense(weight_of(1e-3), bits=4).structure.row_scale


def test_one_tiny_row_beside_others():
    weight = weight_of(1.0)
    weight[3] *= 2e-8  # its root mean square is 0 in fp16
    packed = pyllmq.CodebookWeight.from_dense(weight, torch.tensor([8] * 128), row_scale=True).dequantize()
    assert float((packed[3] - weight[3]).norm() / weight[3].norm()) < 0.2


@pytest.mark.parametrize("row_scale", [False, True])
def test_a_dead_column_is_no_reason_to_refuse_a_weight(row_scale):
    weight = weight_of(0.02)
    weight[:, 5] *= 1e-9
    weight[:, 9] = 0
    layer = pyllmq.CodebookLinear.from_dense(weight, bits=4, row_scale=row_scale)
    assert relative_error(layer, weight) < 0.1
    assert float(layer.dequantize()[:, [5, 9]].abs().max()) < 1e-7


REFUSALS = {
    "bitmap": lambda w: pyllmq.SparseLinear.from_dense(w, 0.1, value_dtype=torch.float16),
    "2:4": lambda w: pyllmq.Sparse24Linear.from_dense(w, value_dtype=torch.float16),
    "2:4 codebook": lambda w: pyllmq.Sparse24CodebookLinear.from_dense(w, bits=4),
    "outliers": lambda w: pyllmq.CodebookLinear.from_dense(w, bits=4, outlier_fraction=0.05),
    "row scale": lambda w: pyllmq.CodebookWeight.pack(
        torch.zeros(64, 128, dtype=torch.uint8),
        torch.ones(256),
        torch.ones(128, dtype=torch.uint8),
        row_scale=w[:, 0].abs(),
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_without_a_scale_they_are_refused_with_numbers(name):
    with pytest.raises(
        pyllmq.FormatError, match=r"reaches .*e-0., too small for fp16: .* (9\d|100)\.\d% of the values .*become 0; "
    ):
        REFUSALS[name](weight_of(1e-8))
    REFUSALS[name](weight_of(1e-2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_what_the_refusal_advises_works(dtype):
    weight = weight_of(1e-8)
    kept = weight * mask_24(weight)
    assert relative_error(pyllmq.Sparse24Linear.from_dense(weight, value_dtype=dtype), kept) < 0.02
    assert relative_error(pyllmq.SparseLinear.from_dense(kept, value_dtype=dtype), kept) < 0.02


def test_weights_that_are_fp16_already_lose_nothing():
    weight = weight_of(1e-7).half()
    layer = pyllmq.SparseLinear.from_dense(weight)
    assert torch.equal(layer.dequantize(), weight.float())


def test_a_tiny_row_is_refused_where_it_counts_and_a_dead_one_is_not():
    weight = weight_of(1e-5)
    weight[7] *= 1e-3
    with pytest.raises(pyllmq.FormatError, match="in 1 of 64 rows"):
        pyllmq.SparseLinear.from_dense(weight, value_dtype=torch.float16)
    dead = weight_of(1.0)
    dead[7] *= 1e-9  # 2^-11 of the largest is where fp16 rounds that one
    pyllmq.SparseLinear.from_dense(dead, value_dtype=torch.float16)


class Blocks(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.blocks = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(64, 96), "down": nn.Linear(96, 64)})])
        with torch.no_grad():
            for block in self.blocks:
                block["down"].weight *= scale
                block["down"].bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block["down"](block["up"](x).relu()) / self.scale
        return x


def compressed_error(scale: float, config: object) -> float:
    torch.manual_seed(0)
    model = Blocks(scale)
    calibration = [{"x": torch.randn(2, 16, 64)} for _ in range(4)]
    dense = [model(**batch).detach() for batch in calibration]
    pyllmq.compress(model, config, calibration, progress=False)
    with torch.no_grad():
        return (
            sum(float((model(**batch) - y).norm() / y.norm()) for batch, y in zip(calibration, dense, strict=True)) / 4
        )


@pytest.mark.parametrize("preset", ["fast", "balanced"])
def test_compressors_with_row_scales_serve_them(preset):
    config = pyllmq.ColumnCodebookConfig.preset(preset, 5.0, guidance="none")
    assert compressed_error(2.0**-23, config) < 1.5 * compressed_error(1.0, config) + 1e-3


@pytest.mark.parametrize(
    "config",
    [
        pyllmq.CLAQConfig(bits=4),
        pyllmq.CLAQConfig(bits=4.12, outliers=0.01),  # they have no scale: those of tiny weights are coded
        pyllmq.CLAQConfig(bits=4, published=True),
        pyllmq.SparseConfig(sparsity=0.5, quantize=pyllmq.CLAQConfig(bits=4)),
    ],
    ids=["claq", "outliers", "published", "pruned"],
)
@pytest.mark.parametrize("scale", [2.0**-23, 2.0**-33])
def test_calibrated_codebooks_scale_by_themselves(config, scale):
    assert compressed_error(scale, config) < 1.5 * compressed_error(1.0, config) + 2e-2


def test_formats_without_a_scale_refuse_them():
    with pytest.raises(
        ValueError, match="so small that fp16 codebooks lose more than 1 %.*no 2:4 pattern beside codes"
    ):
        compressed_error(1e-7, pyllmq.SparseConfig(None, "2:4", quantize=pyllmq.CLAQConfig(bits=4)))
    with pytest.raises(ValueError, match="'blocks.0.down' reaches .* too small for fp16: .* set values to"):
        compressed_error(1e-7, pyllmq.SparseConfig(sparsity=0.5, values="float16"))
