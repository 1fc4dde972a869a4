"""`.weight` of a packed layer: dtype, shape and device cost nothing, values are those of `dequantize`, writing is refused."""

import copy
import pickle

import pytest
import torch
from torch import nn

import pyllmq
from pyllmq import CodebookLinear


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def layer(request):
    return CodebookLinear.from_dense(nn.Linear(24, 10, dtype=request.param), bits=3)


def decodings(layer, monkeypatch):
    calls = []
    decode = type(layer).dequantize
    monkeypatch.setattr(type(layer), "dequantize", lambda self, dtype=None: calls.append(1) or decode(self, dtype))
    return calls


def test_metadata_costs_nothing(layer, monkeypatch):
    calls = decodings(layer, monkeypatch)
    w = layer.weight
    assert (w.shape, w.dtype, w.device) == ((10, 24), layer.dense_dtype, torch.device("cpu"))
    assert w.size(0) == 10 and w.dim() == 2 and w.numel() == 240 and w.element_size() == w.dtype.itemsize
    assert not w.requires_grad and not w.is_meta and w.is_floating_point() and isinstance(w, torch.Tensor)
    assert "LazyWeight" in repr(w) and not calls
    assert torch.zeros(2, 24).to(w.dtype).dtype == w.dtype and torch.zeros(3).to(w.device).device == w.device
    assert not calls
    w.sum(), w.norm(), w[0]
    assert len(calls) == 1, "kept as long as the object lives"


USES = {
    "equal": lambda w, x: w == w,
    "row": lambda w, x: w[3],
    "linear": lambda w, x: nn.functional.linear(x, w),
    "product": lambda w, x: x @ w.T,
    "parts": lambda w, x: torch.cat(w.chunk(2)),
    "float": lambda w, x: w.float(),
    "double": lambda w, x: w.double(),
    "stack": lambda w, x: torch.stack([w, w]),
    "out": lambda w, x: torch.add(w, 1, out=torch.empty(10, 24, dtype=w.dtype)),
    "detach": lambda w, x: w.detach().clone(),
    "data": lambda w, x: w.data,
    "deepcopy": lambda w, x: copy.deepcopy(w),
    "pickle": lambda w, x: pickle.loads(pickle.dumps(w)),
    "numpy": lambda w, x: torch.from_numpy(w.float().numpy()),
    "tolist": lambda w, x: torch.tensor(w.tolist()),
    "parameter": lambda w, x: nn.Parameter(w.clone()).detach(),
    "frobenius": lambda w, x: torch.linalg.matrix_norm(w.float()),
}


@pytest.mark.parametrize("use", USES)
def test_values_are_those_of_the_dense_matrix(layer, use):
    x = torch.randn(4, 24).to(layer.dense_dtype)
    found, wanted = USES[use](layer.weight, x), USES[use](layer.dequantize(), x)
    assert found.dtype == wanted.dtype and torch.equal(found, wanted)
    assert type(found) is torch.Tensor or use in ("float", "double")  # to its own dtype: itself


def test_gradients_flow_to_the_input(layer):
    x = torch.randn(4, 24, dtype=layer.dense_dtype, requires_grad=True)
    nn.functional.linear(x, layer.weight).sum().backward()
    assert torch.equal(x.grad, layer.dequantize().sum(0).expand(4, -1))


WRITES = {
    "data": lambda w: setattr(w, "data", torch.zeros(10, 24)),
    "in place": lambda w: w.add_(1),
    "minus": lambda w: w.__isub__(1),
    "element": lambda w: w.__setitem__((0, 0), 1),
    "out": lambda w: torch.zeros(10, 24, out=w),
    "init": lambda w: nn.init.normal_(w),
}


@pytest.mark.parametrize("write", WRITES)
def test_writing_is_refused(layer, write):
    before = layer.dequantize()
    with pytest.raises(RuntimeError, match="cannot be written to"):
        WRITES[write](layer.weight)
    assert torch.equal(layer.dequantize(), before)


def test_t5_asks_for_the_dtype_only(monkeypatch):
    from . import models

    model = models.tiny_t5()
    pyllmq.swap_linear(model, lambda linear: CodebookLinear.from_dense(linear, bits=4))
    calls = decodings(model.encoder.block[0].layer[0].SelfAttention.q, monkeypatch)
    ids = torch.randint(0, 512, (1, 6))
    model(input_ids=ids, decoder_input_ids=ids)
    assert not calls


@pytest.mark.parametrize("nested", [False, True])
def test_torch_attention_runs_and_its_fused_weights_are_reported(nested, monkeypatch):
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2, enable_nested_tensor=nested
    )
    dense = copy.deepcopy(encoder.eval())
    names = pyllmq.swap_linear(encoder, lambda linear: CodebookLinear.from_dense(linear, bits=8))
    assert "layers.0.self_attn.out_proj" in names
    for name in names:
        dense.get_submodule(name).weight.data = encoder.get_submodule(name).dequantize()
    x, padding = torch.randn(2, 5, 32), torch.arange(5) > torch.tensor([[4], [2]])
    decoded = []
    decode = CodebookLinear.dequantize
    monkeypatch.setattr(CodebookLinear, "dequantize", lambda self, *a: decoded.append(self) or decode(self, *a))
    with torch.inference_mode():
        found = encoder(x, src_key_padding_mask=padding)[~padding]
        torch.testing.assert_close(found, dense(x, src_key_padding_mask=padding)[~padding], rtol=1e-3, atol=1e-3)
    # Its fast path would take every weight; off it, only the attention's output layer is read and not called.
    assert decoded == [layer.self_attn.out_proj for layer in encoder.layers]
    left, total = pyllmq.linears.left_dense(dense, names, None, pyllmq.swap.DEFAULT_EXCLUDE)
    fused = {item.name: item for item in left}["layers.1.self_attn.in_proj_weight"]
    assert fused.parameters == 3 * 32 * 32 and not fused.asked and "fused" in fused.why and total > fused.parameters
