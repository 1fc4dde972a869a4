"""Everything that only a GPU can show, for each of its back ends: results, streams, graphs, compiled models, moves, refusals.

Grid: M 1, 2 (products and tables), 8, 16, 17 (dots), 64, 65 (decoded), 130, 300 (more of wgmma), N and K odd and even, around
tiles of 16 to 128. The full grid of widths runs on a CPU: the Triton kernels in the interpreter, the CUDA kernels in the emulator.
"""

import pytest
import torch
from torch import nn

import pyllmq
from pyllmq import CodebookLinear, CodebookWeight, backends
from pyllmq.formats.codes import pack_codes as reference_pack_codes
from pyllmq.functional import (
    codebook_dequantize,
    codebook_linear,
    pack_codes,
    packed_rows,
    softmax_cdist_l1,
    unpack_codes,
)
from pyllmq.layouts import WeightOperand, machine_layout

from .expert_layer import ALL_WIDTHS, EVERYTHING, SHAPES, SPARSE_KINDS, Layer
from .oracle import assert_as_good_as_torch, assert_within, random_case
from .test_experts import expert_layers, make
from .test_routed_experts import GATES
from .test_softmax_cdist_l1 import check_gradient, exact_distance
from .test_sparse_formats import random_codes
from .test_sparse_linear import LINEAR, bitmap, dense_of, sparse24

DEVICE = "cuda"
BACKENDS = ("cuda", "triton", "reference")
FAST_BACKENDS = ("cuda", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here"),
]


@pytest.fixture
def backend(request):
    """Its name. It is asked for only while a layout is made: the layout then decides who can read it, and the CPU stays free."""
    works, why = backends.report()[request.param]
    if not works:
        pytest.skip(f"back end {request.param}: {why}")
    return request.param


@pytest.fixture
def default_backend(backend, monkeypatch):
    """The back end, made the one that a layer gets by itself when it moves to the GPU."""
    if backend == "triton":
        for module in (backends.cuda, backends.cuda.runtime):
            monkeypatch.setattr(module, "available", lambda: (False, "left out by this test"))
    return backend


def on_gpu(case, backend) -> WeightOperand:
    with pyllmq.use_backend(backend):
        return CodebookWeight(case.weight.structure, case.weight.tensors).to(DEVICE).operand()


def check(backend, case, x, bias=None):
    actual = codebook_linear(x, on_gpu(case, backend), bias, "exact")
    exact = x.double() @ case.dense.to(DEVICE).T + (0 if bias is None else bias.double())
    dense = case.dense.to(DEVICE, x.dtype)
    torchs = []
    for _ in range(2 if exact.numel() >= 256 else 16):
        order = torch.randperm(x.shape[1], device=DEVICE)
        torchs.append(nn.functional.linear(x[:, order], dense[:, order], None if bias is None else bias.to(x.dtype)))
    # Tensor cores cut off low bits where they add, which torch's fp32 matmul does not.
    assert_as_good_as_torch(actual, exact, *torchs, factor=4.0 if x.dtype == torch.float32 else 2.0)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 8, 16, 17, 64, 65, 130, 300])
def test_linear_of_a_mix_with_everything(backend, dtype, tokens):
    case = random_case(195, 323, (2, 3, 6), segments=3, outliers=0.02, row_scale=True)
    x = torch.randn(tokens, 323, device=DEVICE).to(dtype)
    check(backend, case, x, torch.randn(195, device=DEVICE).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("widths", [(1,), (2,), (3,), (4,), (1, 2, 3, 4)], ids=str)
def test_one_and_two_tokens_by_byte_planes(widths, tokens, dtype):
    if not backends.report()["cuda"][0]:
        pytest.skip(backends.report()["cuda"][1])
    for n, k in ((195, 323), (600, 5000)):
        case = random_case(n, k, widths, segments=3, outliers=0.02, row_scale=True)
        x, bias = torch.randn(tokens, k, device=DEVICE).to(dtype), torch.randn(n, device=DEVICE)
        assert_within(2e-4, case, x, codebook_linear(x, on_gpu(case, "cuda"), bias), bias)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("tokens", [1, 16])
def test_linear_of_every_width(backend, bits, tokens):
    check(backend, random_case(256, 512, (bits,)), torch.randn(tokens, 512, device=DEVICE).bfloat16())


@pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 300), (300, 1), (31, 33), (64, 64), (129, 600), (3, 5)])
@pytest.mark.parametrize("tokens", [1, 7, 70])
def test_linear_of_any_shape(backend, n, k, tokens):
    check(backend, random_case(n, k, (2, 3, 4), outliers=0.05), torch.randn(tokens, k, device=DEVICE).half())


@pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)
def test_linear_of_a_real_size(backend):
    check(backend, random_case(4096, 1024, (2, 4), outliers=0.005), torch.randn(3, 1024, device=DEVICE).bfloat16())


@pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)
def test_sanitized(backend):
    """Small and mixed: what run_gpu.sh runs under compute-sanitizer, where each call takes long."""
    case = random_case(70, 90, (2, 3, 4, 8), segments=2, outliers=0.05, row_scale=True)
    for tokens in (1, 9, 33, 70):
        check(backend, case, torch.randn(tokens, 90, device=DEVICE).half())


SPARSE = {
    "bitmap": lambda n, k: bitmap(n, k),
    "bitmap of int8": lambda n, k: bitmap(n, k, values=torch.int8),
    "bitmap of few": lambda n, k: bitmap(n, k, 0.9),
    "2:4": lambda n, k: sparse24(n, k),
    "2:4 in fp16": lambda n, k: sparse24(n, k, torch.float16),
    "2:4 in fp32": lambda n, k: sparse24(n, k, torch.float32),
    "2:4 of 2 bits": lambda n, k: random_codes(n, k, 2, 0.02)[0],
    "2:4 of 4 bits": lambda n, k: random_codes(n, k, 4, 0.02)[0],
}


def check_sparse(backend, weight, x):
    dense = dense_of(weight)
    with pyllmq.use_backend(backend):
        operand = type(weight)(weight.structure, weight.tensors).to(DEVICE).operand()
    actual = LINEAR[type(weight)](x, operand, None, "exact")
    exact = x.double() @ dense.to(DEVICE).T
    torchs = nn.functional.linear(x, dense.to(DEVICE, x.dtype))
    assert_as_good_as_torch(actual, exact, torchs, factor=8.0 if x.dtype == torch.float32 else 3.0)


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", SPARSE)
def test_sparse_linear(backend, kind, dtype):
    for n, k in ((300, 700), (65, 4200)):
        weight = SPARSE[kind](n, k)
        for tokens in (1, 5, 16, 33, 65):
            check_sparse(backend, weight, torch.randn(tokens, k, device=DEVICE).to(dtype))


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparse_sanitized_by_products(backend, dtype):
    """One token of codes of 2 bits."""
    for n, k in ((70, 150), (300, 700)):
        weight, x = SPARSE["2:4 of 2 bits"](n, k), torch.randn(1, k, device=DEVICE).to(dtype)
        with pyllmq.use_backend(backend):
            operand = type(weight)(weight.structure, weight.tensors).to(DEVICE).operand()
        exact = x.double() @ dense_of(weight).to(DEVICE).T
        error = LINEAR[type(weight)](x, operand).double() - exact
        assert error.norm() <= (2e-4 + torch.finfo(dtype).eps) * exact.norm()


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize("kind", SPARSE)
def test_sparse_sanitized(backend, kind):
    weight = SPARSE[kind](70, 150)
    for tokens in (1, 9, 70):
        check_sparse(backend, weight, torch.randn(tokens, 150, device=DEVICE).half())


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize("kind", SPARSE)
def test_sparse_dequantize_and_back(backend, kind):
    weight = SPARSE[kind](130, 270)
    with pyllmq.use_backend(backend):
        operand = type(weight)(weight.structure, weight.tensors).to(DEVICE).operand()
    tensors = machine_layout(operand.layout).unpack(operand, weight.structure.tensors(), weight.tensors)
    assert all(torch.equal(tensors[key].cpu(), tensor) for key, tensor in weight.tensors.items())
    dense = getattr(pyllmq.functional, f"{weight.kind}_dequantize")(operand, torch.float32)
    torch.testing.assert_close(dense.cpu().double(), dense_of(weight), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize(backend, dtype):
    case = random_case(145, 130, tuple(range(1, 9)), segments=2, outliers=0.05, row_scale=True)
    assert torch.equal(codebook_dequantize(on_gpu(case, backend), dtype).cpu(), case.dense.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (195, 323), (1030, 2500)])
def test_rows(backend, dtype, n, k):
    case = random_case(n, k, tuple(range(1, 9)), segments=min(2, n), outliers=0.02, row_scale=True)
    operand, ids = on_gpu(case, backend), torch.randint(n, (3, 40), device=DEVICE)
    assert torch.equal(packed_rows(operand, ids, dtype).cpu(), case.dense[ids.cpu()].to(dtype))
    outside = packed_rows(operand, torch.tensor([n, -1, 0], device=DEVICE), dtype).cpu()
    assert outside[:2].isnan().all() and torch.equal(outside[2], case.dense[0].to(dtype))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("bits", [1, 3, 5, 8])
def test_pack_and_unpack(backend, bits):
    codes = torch.randint(0, 2**bits, (37, 61), dtype=torch.uint8)
    with pyllmq.use_backend(backend):
        packed = pack_codes(codes.to(DEVICE), bits)
        unpacked = unpack_codes(packed, bits, 61)
    assert torch.equal(packed.cpu(), reference_pack_codes(codes, bits))
    assert torch.equal(unpacked.cpu(), codes)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_gradient_of_x_and_bias(backend):
    case = random_case(40, 66, (2, 5), outliers=0.05)
    x = torch.randn(4, 66, device=DEVICE, requires_grad=True)
    bias = torch.randn(40, device=DEVICE, requires_grad=True)
    grad = torch.randn(4, 40, device=DEVICE)
    codebook_linear(x, on_gpu(case, backend), bias).backward(grad)
    assert_as_good_as_torch(x.grad, grad.double() @ case.dense.to(DEVICE), grad @ case.dense.float().to(DEVICE))
    torch.testing.assert_close(bias.grad, grad.sum(0))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_no_tokens_and_leading_dimensions(backend):
    case = random_case(10, 12)
    weight = on_gpu(case, backend)
    assert codebook_linear(torch.randn(0, 12, device=DEVICE), weight).shape == (0, 10)
    x = torch.randn(2, 1, 3, 12, device=DEVICE).transpose(0, 2)
    torch.testing.assert_close(codebook_linear(x, weight), (x.double() @ case.dense.to(DEVICE).T).float())


@pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)
@pytest.mark.parametrize("tokens", [1, 16])
def test_one_layer_on_five_streams_at_once(backend, tokens):
    weight, x = on_gpu(random_case(300, 7000, (2, 3, 4)), backend), torch.randn(tokens, 7000, device=DEVICE).bfloat16()
    expected = codebook_linear(x, weight)
    torch.cuda.synchronize()
    results = []
    for stream in [torch.cuda.Stream() for _ in range(5)] * 20:
        with torch.cuda.stream(stream):
            results.append(codebook_linear(x, weight))
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)
@pytest.mark.parametrize("tokens", [1, 16, 100])
def test_same_bits_every_time(backend, tokens):
    weight = on_gpu(random_case(300, 700, (2, 3, 4 if tokens == 1 else 8), outliers=0.02), backend)
    x = torch.randn(tokens, 700, device=DEVICE).bfloat16()
    first = codebook_linear(x, weight)
    assert all(torch.equal(codebook_linear(x, weight), first) for _ in range(20))


@pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)
@pytest.mark.parametrize("tokens", [1, 3])
def test_not_finite_in_means_not_finite_out(backend, tokens):
    x = torch.randn(tokens, 64, device=DEVICE)
    x[0, 7], x[-1, 9] = torch.inf, torch.nan
    y = codebook_linear(x, on_gpu(random_case(40, 64, (2, 3, 4)), backend))
    assert not torch.isfinite(y[0]).any() and y[-1].isnan().all()
    assert tokens == 1 or torch.isfinite(y[1]).all()


# ---- experts --------------------------------------------------------------------------------------------------------


def check_experts(layer, tokens, dtype):
    """Tensor cores cut off low bits where they add: fp32 tokens may err more than torch's."""
    x, index, weights = layer.route(tokens, 3, none=True)
    layer.check(x, index, weights, dtype, factor=16.0 if dtype == torch.float32 else 2.0)


@pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 33, 300])
def test_experts(backend, dtype, tokens):
    layer = Layer([(2,), ALL_WIDTHS, (4, 8), (3,)], backend, 9, 200, 150, bias=True, device=DEVICE, **EVERYTHING)
    check_experts(layer, tokens, dtype)


@pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_sparse_experts(backend, kind, dtype):
    for tokens in (1, 33):
        check_experts(Layer([kind], backend, 9, 200, 150, bias=True, device=DEVICE), tokens, dtype)


@pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)
@pytest.mark.parametrize("tokens", [1, 40])
def test_experts_of_their_own_formats(backend, tokens):
    mixes = ["3 bits", (2, 8), "bitmap int8", "2:4 bf16", "few fp16", "bitmap fp32", "2 bits", "2:4 fp16"]
    check_experts(Layer(mixes, backend, 8, 700, 520, device=DEVICE), tokens, torch.bfloat16)


@pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)
@pytest.mark.parametrize(("hidden", "units", "extra"), SHAPES)
def test_experts_of_any_shape(backend, hidden, units, extra):
    check_experts(Layer([(1, 3, 4, 6), (2,)], backend, 3, hidden, units, device=DEVICE, **extra), 9, torch.bfloat16)


@pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_experts_of_every_gate(backend, gate):
    check_experts(Layer([(8,), (4,)], backend, gate=gate, bias=True, device=DEVICE), 5, torch.float16)


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_experts_sanitized(backend):
    for mixes in ([(2,), ALL_WIDTHS], ["2:4 bf16", "3 bits", "bitmap fp16", "few int8"]):
        layer = Layer(mixes, backend, device=DEVICE, **EVERYTHING)
        for tokens in (1, 20):
            check_experts(layer, tokens, torch.bfloat16)


@pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("mixes", [[(2, 4), (3,)], ["2:4 bf16"], ["4 bits", "bitmap fp16"]], ids=str)
def test_experts_captured_in_a_cuda_graph(backend, mixes, tokens):
    """What is chosen changes from replay to replay."""
    layer = Layer(mixes, backend, 12, 600, 320, device=DEVICE)
    given = layer.route(tokens, 3)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer.run(*given)  # makes the tables, compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer.run(*given)
    for _ in range(3):
        for held, new in zip(given, layer.route(tokens, 3), strict=True):
            held.copy_(new)
        graph.replay()
        assert torch.equal(y, layer.run(*given))


@pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)
def test_experts_outside_and_the_same_bits_every_time(backend):
    layer = Layer([(4,)], backend, device=DEVICE)
    x, index, weights = layer.route(6, 2)
    first = layer.run(x, index, weights)
    assert all(torch.equal(layer.run(x, index, weights), first) for _ in range(20))
    index[1, 0], index[3, 1] = -1, 6
    y = layer.run(x, index, weights)
    assert y[[1, 3]].isnan().all() and torch.equal(y[[0, 2, 4, 5]], first[[0, 2, 4, 5]])


@pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)
def test_stacks_of_a_model(default_backend):
    model = make("GptOss")
    pyllmq.compress(model, pyllmq.KMeansConfig(6), include=["*.0.mlp.experts.*"], progress=False)
    layer = expert_layers(model)[0]
    given = torch.randn(3, 64), torch.tensor([[0, 2], [1, 2], [3, 0]]), torch.rand(3, 2)
    with torch.no_grad():
        expected = layer(*given)
        layer.to(DEVICE)
        for _ in range(2):
            found = layer(*(each.to(DEVICE) for each in given))
            torch.testing.assert_close(found.cpu(), expected, rtol=2e-3, atol=2e-4)
    assert layer._held[1].layouts == (f"{default_backend}.codebook",)


# ---- streams, graphs, compiled models -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)
@pytest.mark.parametrize("tokens", [1, 16, 100])
def test_kernels_run_on_the_current_stream(backend, tokens):
    weight = on_gpu(random_case(64, 128, (2, 3)), backend)
    late = torch.randn(tokens, 128, device=DEVICE)
    expected = codebook_linear(late, weight)
    x = torch.full_like(late, torch.nan)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # some 10 ms, in which a kernel on another stream would read the NaN
        x.copy_(late)
        y = codebook_linear(x, weight)
    side.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)
@pytest.mark.parametrize("tokens", [1, 2, 16, 64, 100])
def test_captured_in_a_cuda_graph(backend, tokens):
    weight = on_gpu(random_case(96, 160, (2, 3, 4), outliers=0.02), backend)
    x = torch.randn(tokens, 160, device=DEVICE).bfloat16()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        codebook_linear(x, weight)  # compiles and loads what a capture must not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = codebook_linear(x, weight)
    for _ in range(3):
        x.copy_(torch.randn(tokens, 160))
        graph.replay()
        assert torch.equal(y, codebook_linear(x, weight))


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize("precision", ["exact", "high"])
@pytest.mark.parametrize("tokens", [1, 2])
def test_launches_that_begin_before_the_one_before_is_over(backend, tokens, precision):
    """y of one is x of the next, and the memory of a y before that is its y. On compute capability 9.0 12288 rows are clusters'."""
    weights = [on_gpu(random_case(n, k, (2, 4), outliers=0.01), backend) for n, k in ((12288, 512), (512, 12288))] * 3
    x = torch.randn(tokens, 512, device=DEVICE)

    def chain(wait):
        y = x
        for weight in weights:
            y = codebook_linear(y, weight, None, precision)
            wait()
        return y

    expected = chain(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(lambda: None)
    for _ in range(50):
        graph.replay()
        assert torch.equal(y, expected) and torch.equal(chain(lambda: None), expected)


@pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)
@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize(("n", "k"), [(64, 96), (4096, 1024)], ids=["one block", "blocks share rows"])
def test_compiled_in_one_graph_with_less_overhead(default_backend, n, k, tokens):
    layer = CodebookLinear.from_weight(random_case(n, k, (2, 4), outliers=0.02).weight, torch.randn(n)).to(DEVICE)
    assert layer.operand().layout == f"{default_backend}.codebook"
    compiled = torch.compile(nn.Sequential(layer, nn.GELU()), fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(tokens, k, device=DEVICE)
            torch.testing.assert_close(compiled(x).clone(), nn.functional.gelu(layer(x)))


def tiny_llama(hidden):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 3 // 2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)
@pytest.mark.parametrize("hidden", [64, 1024], ids=["one block", "blocks share rows"])
def test_generate_with_a_static_cache(default_backend, hidden):
    packed = tiny_llama(hidden)
    pyllmq.swap_linear(packed, lambda linear: CodebookLinear.from_dense(linear, bits=4), exclude=("lm_head",))
    dense = tiny_llama(hidden)
    with torch.no_grad():
        for name, module in packed.named_modules():
            if isinstance(module, CodebookLinear):
                dense.get_submodule(name).weight.copy_(module.dequantize())
            elif isinstance(getattr(module, "weight", None), nn.Parameter):
                dense.get_submodule(name).weight.copy_(module.weight)
    packed, dense = packed.to(DEVICE), dense.to(DEVICE)
    prompt = torch.randint(0, 128, (1, 5), device=DEVICE)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = dense.generate(prompt, **options)
    assert torch.equal(packed.generate(prompt, cache_implementation="static", **options), expected)


# ---- moves and refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)
def test_a_layer_moves_to_the_gpu_and_back(default_backend):
    case = random_case(72, 100, (2, 3, 5), segments=2, outliers=0.05, row_scale=True)
    layer = CodebookLinear.from_weight(case.weight, torch.randn(72))
    layer.precision = "exact"
    x = torch.randn(3, 100)
    before, state = layer(x), {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    layer.to(DEVICE)
    assert layer.operand().layout == f"{default_backend}.codebook" and all(
        b.device.type == DEVICE for b in layer.buffers()
    )
    torch.testing.assert_close(layer(x.to(DEVICE)).cpu(), before, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(tensor.cpu(), state[key]) for key, tensor in layer.state_dict().items())
    layer.half()
    assert layer(x.to(DEVICE).half()).dtype == torch.float16
    layer.to("cpu", torch.float32)
    assert layer.operand().layout == "cpu.codebook"
    torch.testing.assert_close(layer(x), before, rtol=1e-2, atol=1e-2)  # the bias was fp16 meanwhile


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_tensors_on_different_devices_are_refused(backend):
    weight = on_gpu(random_case(8, 6), backend)
    with pytest.raises(ValueError, match="x is on cpu.*the weight on cuda.*move them to one device"):
        codebook_linear(torch.randn(2, 6), weight)
    with pytest.raises(ValueError, match="bias on cpu"):
        codebook_linear(torch.randn(2, 6, device=DEVICE), weight, torch.randn(8))
    y = codebook_linear(torch.randn(2, 6, device=DEVICE), weight)
    assert torch.isfinite(y).all(), "the process is not usable after a refusal"


@pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)
def test_out_of_memory(backend):
    weight = on_gpu(random_case(4096, 1024, (2,)), backend)
    x = torch.randn(65, 1024, device=DEVICE).half()
    expected = codebook_linear(x, weight)
    torch.cuda.empty_cache()
    all_but_a_little = torch.cuda.mem_get_info()[0] - (4 << 20)
    hog = torch.empty(all_but_a_little, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(torch.OutOfMemoryError):
        codebook_linear(x, weight)  # decodes to 8 MiB
    del hog
    assert torch.equal(codebook_linear(x, weight), expected), "the process is not usable after a refusal"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
@pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True)
def test_a_gpu_that_is_not_the_current_one(backend):
    case = random_case(70, 90, (2, 3), outliers=0.02)
    with pyllmq.use_backend(backend):
        weight = CodebookWeight(case.weight.structure, case.weight.tensors).to("cuda:1").operand()
    for tokens in (1, 16, 100):
        x = torch.randn(tokens, 90, device="cuda:1")
        torch.testing.assert_close(codebook_linear(x, weight).double(), x.double() @ case.dense.to("cuda:1").T)


# ---- softmax_cdist_l1 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 17, 31), (65, 33, 3000), (64, 64, 50257)], ids=str)
def test_softmax_cdist_l1(backend, dtype, shape):
    rows, teacher_rows, columns = shape
    student = torch.randn(rows, columns, device=DEVICE).mul(3).to(dtype).requires_grad_()
    teacher = torch.randn(teacher_rows, columns, device=DEVICE).mul(3)
    grad = torch.randn(rows, teacher_rows, device=DEVICE)
    with pyllmq.use_backend(backend):
        found = [softmax_cdist_l1(student, teacher, 1.5) for _ in range(2)]
        (actual,) = torch.autograd.grad(found[0], student, grad)
    assert torch.equal(*found), "the same call gives the same bits"
    exact = exact_distance(student.detach(), teacher, 1.5)
    torch.testing.assert_close(found[0].detach().double(), exact, rtol=0, atol=4e-6)
    check_gradient(actual, student.detach(), teacher, 1.5, grad)
