"""What a call of the `cuda` back end leaves behind and what it runs beside its kernel, on the emulator.

torch.compile(mode="reduce-overhead") runs a model once in a memory pool of its own, where a tensor that outlives its call is an
error; and what a call runs beside its kernel, a CUDA graph replays for every layer and token.
"""

import gc
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pyllmq
from pyllmq.backends.cuda import runtime
from pyllmq.functional import codebook_dequantize, codebook_linear, pack_codes, softmax_cdist_l1, unpack_codes
from pyllmq.kmeans import kmeans_1d
from pyllmq.layouts import machine_layout
from pyllmq.ops import packed_rows, routed_experts

from .cuda_emulator import emulated  # noqa: F401
from .expert_layer import Layer
from .oracle import random_case
from .test_sparse_formats import random_codes
from .test_sparse_linear import LINEAR, bitmap, sparse24

pytestmark = pytest.mark.kernels
BOUND = runtime.bound


@pytest.fixture(autouse=True)
def plainly_emulated(emulated, monkeypatch):  # noqa: F811
    """Memory is torch's own, so that nobody but a call's results and operands holds any."""
    for name, module in list(sys.modules.items()):
        if name.startswith("pyllmq.backends.cuda.") and hasattr(module, "torch"):
            monkeypatch.setattr(module, "torch", torch)
    with pyllmq.use_backend("cuda"):
        yield emulated


WEIGHTS = {
    "codebook": lambda: random_case(70, 900, (1, 4, 6), segments=2, outliers=0.02, row_scale=True).weight,
    "bitmap": lambda: bitmap(70, 900),
    "columns": lambda: bitmap(70, 9000, 0.9),
    "sparse24": lambda: sparse24(70, 900),
    "sparse24_codebook": lambda: random_codes(70, 900, 2, 0.02)[0],
}
"""So long that blocks share their rows, and count each other."""


def packed(name):
    """(operation, operand): in the layout of the back end in force."""
    weight = WEIGHTS[name]()
    weight = type(weight)(weight.structure, weight.tensors)
    return codebook_linear if weight.kind == "codebook" else LINEAR[type(weight)], weight.operand()


def check_that_nothing_stays(call):
    """Of what `call` makes, only its results are there afterwards. The first call may bind what it wants."""
    call()
    gc.freeze()  # what is there before is not listed below
    try:
        results = call()
        gc.collect()
        results = results if isinstance(results, tuple) else (results,)
        kept = {id(each) for result in results for each in (result, result._base)}
        found = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
        stayed = [tuple(each.shape) for each in found if id(each) not in kept]
    finally:
        gc.unfreeze()
    assert not stayed, f"tensors that outlive the call: {stayed}"


@pytest.mark.parametrize("tokens", [1, 3, 64, 65])
@pytest.mark.parametrize("name", WEIGHTS)
def test_no_tensor_outlives_a_linear(name, tokens):
    linear, operand = packed(name)
    x = torch.randn(tokens, operand.shape[1]).half()
    check_that_nothing_stays(lambda: linear(x, operand))


def transport_gradients():
    cost = torch.rand(1, 130, 128, requires_grad=True)
    return torch.autograd.grad(pyllmq.sinkhorn(cost, iterations=2).sum(), cost)


def distances():
    student = torch.randn(5, 40, requires_grad=True)
    return torch.autograd.grad(softmax_cdist_l1(student, torch.randn(3, 40)).sum(), student)


def of_operand(call):
    """The operand is there before, as a layer holds it."""
    _, operand = packed("codebook")
    return lambda: call(operand)


OTHERS = {
    "pack_codes": lambda: unpack_codes(pack_codes(torch.randint(0, 8, (5, 20), dtype=torch.uint8), 3), 3, 20),
    "kmeans_1d": lambda: tuple(kmeans_1d(torch.randn(3, 50), 4)),
    "softmax_cdist_l1": distances,
    "sinkhorn": transport_gradients,
}


OF_OPERANDS = {
    "codebook_dequantize": lambda operand: codebook_dequantize(operand, torch.float16),
    "packed_rows": lambda operand: packed_rows(operand, torch.tensor([3, 1])),
}


@pytest.mark.parametrize("name", [*OTHERS, *OF_OPERANDS])
def test_no_tensor_outlives_a_call(name, monkeypatch):
    monkeypatch.setattr(runtime, "bound", BOUND)  # the emulator's keeps copies of layouts, to compare them at the end
    check_that_nothing_stays(OTHERS[name] if name in OTHERS else of_operand(OF_OPERANDS[name]))


class Recorded(TorchDispatchMode):
    """Names of torch's operations that would run a kernel: all but those that allocate."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.overloadpacket.__name__.startswith("empty"):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens", [1, 3, 64])
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_linear_is_one_kernel_and_nothing_else(emulated, name, tokens):  # noqa: F811
    linear, operand = packed(name)
    if name == "columns" and tokens > 16:
        return
    x = torch.randn(tokens, operand.shape[1]).half()
    linear(x, operand)  # the first call binds the layout
    before = emulated.emulator.launches()
    with Recorded() as recorded:
        linear(x, operand)
    assert not recorded.names and emulated.emulator.launches() == before + 1


def test_rows_are_one_kernel_and_nothing_else(emulated):  # noqa: F811
    _, operand = packed("codebook")
    ids = torch.tensor([3, 69])
    packed_rows(operand, ids)
    before = emulated.emulator.launches()
    with Recorded() as recorded:
        packed_rows(operand, ids)
    assert set(recorded.names) <= {"aten.view.default"} and emulated.emulator.launches() == before + 1


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize(
    ("mixes", "launches"), [([(2,), (4,)], 5), (["2:4 bf16"], 5), (["3 bits", "4 bits"], 5), ([(2,), "few fp16"], 7)]
)
def test_experts_are_five_kernels_and_nothing_else(emulated, mixes, launches, tokens):  # noqa: F811
    """Two more for each further kind of weights."""
    layer = Layer(mixes, "cuda")
    x, index, weights = layer.route(tokens, 2)
    check_that_nothing_stays(lambda: routed_experts(x, index, weights, layer.packed))  # the first call makes the tables
    before = emulated.emulator.launches()
    with Recorded() as recorded:
        routed_experts(x, index, weights, layer.packed)
    assert set(recorded.names) <= {"aten.detach.default"} and emulated.emulator.launches() == before + launches


@pytest.mark.parametrize("name", WEIGHTS)
def test_counters_move_with_their_layout(name):
    """A copy of a layout, as `.to` and `deepcopy` make one, counts for itself."""
    linear, operand = packed(name)
    x = torch.randn(3, operand.shape[1]).half()
    expected = linear(x, operand)
    copied = machine_layout(operand.layout).from_blob(operand.tensors[0].clone(), operand.shape)
    assert torch.equal(linear(x, copied), expected)
    (blob,) = operand.tensors
    before = blob.clone()
    blob.zero_()
    assert torch.equal(linear(x, copied), expected)
    blob.copy_(before)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("name", WEIGHTS)
def test_each_stream_counts_for_itself(name, tokens, monkeypatch):
    """Counters that are not zero belong to a call that is under way on another stream. Odd streams are recorded in a graph."""
    linear, operand = packed(name)
    x = torch.randn(tokens, operand.shape[1]).half()
    expected = linear(x, operand)
    sets = (
        operand.tensors[0][-4 * 16 * 2 * 4 :].view(torch.int32).view(4, -1)
    )  # set, token block and tile: two tiles of rows
    for stream, used in (
        (0, 1),
        (2, 2),
        (4, 3),
        (2, 2),
        (7, 0),
        (6, 1),
        (9, 0),
    ):  # the fourth stream waits, then all are free
        monkeypatch.setattr(runtime, "stream", lambda device, stream=stream: stream)
        sets.fill_(1)[used] = 0
        assert torch.equal(linear(x, operand), expected), f"stream {stream}"
        assert torch.equal(sets, torch.ones_like(sets).index_fill_(0, torch.tensor([used]), 0))
    sets.zero_()


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_layout_where_no_kernel_can_read_it_is_refused(name):
    linear, operand = packed(name)
    (blob,) = operand.tensors
    room = torch.empty(blob.numel() + 32, dtype=torch.uint8)
    begin = 8 - room.data_ptr() % 16 + 16
    moved = room[begin : begin + blob.numel()].copy_(blob)
    odd = machine_layout(operand.layout).from_blob(moved, operand.shape)
    with pytest.raises(ValueError, match=r"lies 8 bytes behind a multiple of 16.*copy of it \(clone\(\)\)"):
        linear(torch.randn(1, operand.shape[1]), odd)


def test_more_tokens_than_there_are_counters_for_are_refused(emulated):  # noqa: F811
    with pytest.raises(ValueError, match="linear of 65 tokens; at most 64 at once: dequantize"):
        emulated.CodebookOperand(0, 4096, 8, 900).room(65, 2)
