"""What the kernels of csrc/streamed_linear.cuh have in common, on the emulator: splits of K that are a cluster of blocks, and
launches that begin before what was launched before has ended (compute capability 9.0).

The emulated device has 3 multiprocessors, so 6 blocks at a time: of few rows K is cut into 2 to 6 splits.
"""

import itertools

import pytest
import torch

import pyllmq
from pyllmq.backends.cuda import codebook, sparse

from .cuda_emulator import emulated  # noqa: F401
from .oracle import random_case
from .test_sparse_formats import random_codes
from .test_sparse_linear import bitmap, sparse24

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("hopper")]


@pytest.fixture
def hopper(emulated):  # noqa: F811
    emulated.emulator.set_hopper(True)
    yield emulated
    emulated.emulator.set_hopper(False)


def narrow(n, k):
    return random_case(n, k, (1, 2, 3, 4), outliers=0.02, row_scale=True).weight


def wide(n, k):
    return random_case(n, k, (2, 4, 6), outliers=0.02, row_scale=True).weight


KERNELS = {
    "byte planes": (narrow, codebook.byte_planes, 1),
    "byte planes, 2 tokens": (narrow, codebook.byte_planes, 2),
    "fused": (wide, codebook.operand, 1),
    "fused, 7 tokens": (wide, codebook.operand, 7),
    "fused, 21 tokens": (wide, codebook.operand, 21),
    "2:4": (sparse24, sparse.operand, 1),
    "2:4, 21 tokens": (sparse24, sparse.operand, 21),
    "bitmap": (bitmap, sparse.operand, 3),
    "2:4, 2 bits": (lambda n, k: random_codes(n, k, 2, 0.02)[0], sparse.operand, 1),
    "2:4, 4 bits": (lambda n, k: random_codes(n, k, 4, 0.02)[0], sparse.operand, 5),
    "products": (lambda n, k: random_codes(n, k, 2, 0.02)[0], sparse.products, 1),
    "tables": (lambda n, k: random_codes(n, k, 4, 0.02)[0], sparse.tables, 1),
}
ORDERS = list(itertools.product((False, True), repeat=3))


class Layer:
    """A weight, and what its calls need: memory that stays where it is until a launch is over."""

    def __init__(self, name, n, k):
        make, bind, self.tokens = KERNELS[name]
        weight = make(n, k)
        with pyllmq.use_backend("cuda"):
            self.weight = type(weight)(weight.structure, weight.tensors).operand()
        self.bind, self.shape = bind, (n, k)
        self.partials = torch.full((1 << 16,), torch.nan)

    def room(self):
        return self.bind(self.weight).room(self.tokens, 0)

    def launch(self, x, y):
        operand = self.bind(self.weight)
        assert operand.room(self.tokens, 0) <= len(self.partials)
        operand.linear(x.data_ptr(), 0, self.tokens, 0, 0, y.data_ptr(), self.partials.data_ptr(), 0)

    def of(self, x):
        y = torch.full((self.tokens, self.shape[0]), torch.nan)
        self.launch(x, y)
        return y

    def x(self):
        return torch.randn(self.tokens, self.shape[1])


def set_order(emulator, threads=False, blocks=False, copies=False, **others):
    emulator.set_schedule(last_thread_first=threads, last_block_first=blocks, eager_copies=copies, **others)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("n", "k"), [(70, 1300), (1, 2100)])
def test_a_cluster_adds_its_splits_in_any_order_of_threads_and_blocks(hopper, name, n, k):
    layer = Layer(name, n, k)
    x = layer.x()
    hopper.emulator.set_hopper(False)
    assert layer.room() > 0, "blocks share outputs"
    counted = layer.of(x)
    hopper.emulator.set_hopper(True)
    assert layer.room() == 0, "a cluster needs no workspace"
    results = []
    for order in ORDERS:
        set_order(hopper.emulator, *order)
        results.append(layer.of(x))
    assert all(torch.equal(results[0], result) for result in results)
    assert float((results[0] - counted).norm()) <= 1e-4 * float(counted.norm())


def test_rows_for_which_counters_are_better(hopper):
    """Ten splits of K are more than a cluster has; one block for each of six parts of the rows shares nothing."""
    for n, k in ((70, 20000), (3000, 900)):
        layer = Layer("byte planes", n, k)
        x = layer.x()
        room = layer.room()
        results = [layer.of(x)]
        hopper.emulator.set_hopper(False)
        assert room == layer.room() and (room > 0) == (n == 70)
        assert torch.equal(results[0], layer.of(x))
        hopper.emulator.set_hopper(True)


@pytest.mark.parametrize("name", [name for name in KERNELS if "tokens" not in name])
def test_a_missing_barrier_of_a_cluster_is_found(hopper, name):
    """Where a cluster has one piece of work, behind which its blocks leave."""
    layer = Layer(name, 70, 1300)
    x, fault = layer.x(), hopper.emulator.Fault
    right, found = layer.of(x), []
    for threads in (False, True):
        set_order(hopper.emulator, threads, fault=fault.first_cluster_barrier)
        found.append(not torch.equal(layer.of(x), right))
    assert any(found)
    set_order(hopper.emulator, fault=fault.second_cluster_barrier)
    with pytest.raises(RuntimeError, match="shared memory is read of a block that has left"):
        layer.of(x)


def chain(name, emulator, early, **others):
    """y of a second layer whose x is y of a first one, and y of a third, which overwrites what the second reads."""
    torch.manual_seed(3)
    layers = [Layer(name, 70, 900), Layer(name, 60, 70), Layer(name, 70, 300)]
    x, other = layers[0].x(), layers[2].x()
    set_order(emulator, early_launches=early, **others)
    between = torch.full((layers[0].tokens, 70), torch.nan)
    last = torch.full((layers[0].tokens, 60), torch.nan)
    for layer, given, y in ((layers[0], x, between), (layers[1], between, last), (layers[2], other, between)):
        layer.launch(given, y)
    emulator.finish()
    return between, last


@pytest.mark.parametrize("name", KERNELS)
def test_a_launch_that_begins_early_changes_nothing(hopper, name):
    expected = chain(name, hopper.emulator, False)
    assert all(torch.isfinite(each).all() for each in expected)
    for order in ORDERS:
        found = chain(name, hopper.emulator, True, **dict(zip(("threads", "blocks", "copies"), order, strict=True)))
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", KERNELS)
def test_a_missing_wait_for_the_launch_before_is_found(hopper, name):
    with pytest.raises(RuntimeError, match="over before it has waited for the one before"):
        chain(name, hopper.emulator, True, fault=hopper.emulator.Fault.wait_for_previous)


def test_code_for_other_devices_begins_when_all_is_over(hopper):
    """The emulator refuses to launch such a kernel early or in clusters."""
    hopper.emulator.set_hopper(False)
    expected = chain("byte planes", hopper.emulator, False)
    assert all(map(torch.equal, chain("byte planes", hopper.emulator, True), expected))
