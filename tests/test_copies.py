"""Layers that were copied or pickled, perhaps on another machine: as fast as what they were made from."""

import copy
import io
import mmap

import pytest
import torch

from pyllmq import CodebookEmbedding, CodebookLinear, Sparse24CodebookLinear, _cpu
from pyllmq.backends.cpu import runtime

pytestmark = pytest.mark.kernels


def saved(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    return file.getvalue()


def loaded_from(data):
    return torch.load(io.BytesIO(data), weights_only=False)


@pytest.mark.skipif(
    not {"avx2", "avx512"} <= set(_cpu.supported_isas()), reason="all instruction sets of this machine read one order"
)
@pytest.mark.parametrize("made_by, read_by", [("avx512", "avx2"), ("avx2", "avx512")])
@pytest.mark.parametrize("kind", ["codebook", "sparse24_codebook", "embedding"])
def test_a_pickle_of_another_machine_is_laid_out_anew(kind, made_by, read_by):
    """It was read by scalar code, 30 times as slowly."""
    before = _cpu.isa()
    dense, x = torch.randn(64, 96), torch.randn(3, 96)
    try:
        _cpu.set_isa(made_by)
        if kind == "codebook":
            layer = CodebookLinear.from_dense(dense, 3, outlier_fraction=0.02)
        elif kind == "embedding":
            layer = CodebookEmbedding.from_dense(torch.nn.Embedding.from_pretrained(dense), 4)
        else:
            layer = Sparse24CodebookLinear.from_dense(dense, 3)
        expected = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        pickled = saved(layer)
        _cpu.set_isa(read_by)
        loaded = loaded_from(pickled)
        layer.prepare()
        given = torch.arange(5) if kind == "embedding" else x
        torch.testing.assert_close(loaded(given), layer(given), rtol=1e-3, atol=1e-2)
        loaded.prepare()
        assert runtime.bound(loaded.operand()).is_native and not runtime.bound(layer.operand()).is_native
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, expected[name])
    finally:
        _cpu.set_isa(before)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages here")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: loaded_from(saved(layer))])
def test_a_copy_lies_on_huge_pages_as_well(copied):
    layer = CodebookLinear.from_dense(torch.randn(4096, 1100), 4)
    x = torch.randn(1, 1100)
    other = copied(layer)
    (blob,) = other.operand().tensors
    assert blob.data_ptr() % runtime.HUGE_PAGE == 0 and blob.numel() > runtime.HUGE_PAGE
    assert blob.data_ptr() == other.layout.data_ptr() != layer.layout.data_ptr()
    assert torch.equal(other(x), layer(x))
