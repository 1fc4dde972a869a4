"""pack_codes and unpack_codes: both back ends give the same bytes, and are inverse to each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyllmq
from pyllmq.functional import pack_codes, unpack_codes

pytestmark = pytest.mark.kernels


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 8), st.integers(0, 40), st.integers(0, 300), st.integers(0, 2**31))
def test_round_trip_on_both_back_ends(bits, rows, columns, seed):
    torch.manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns)).to(torch.uint8)
    packed = {}
    for backend in ("cpu", "reference"):
        with pyllmq.use_backend(backend):
            packed[backend] = pack_codes(codes, bits)
            assert torch.equal(unpack_codes(packed[backend], bits, columns), codes)
    assert torch.equal(packed["cpu"], packed["reference"])
    assert packed["cpu"].shape == (rows, -(-columns * bits // 8))


def test_bit_order_by_hand():
    codes = torch.tensor([[0b101, 0b011, 0b110]], dtype=torch.uint8)
    # Stream, least significant bit first: 101 110 011 -> byte 0 holds bits 0..7, byte 1 the ninth.
    assert pack_codes(codes, 3).tolist() == [[0b10_011_101, 0b1]]


def test_strided_input():
    codes = torch.randint(0, 8, (20, 33)).to(torch.uint8)
    packed = pack_codes(codes.T.contiguous().T, 3)
    assert torch.equal(packed, pack_codes(codes, 3))
    wide = torch.cat([packed, packed], 1)[:, : packed.shape[1]]
    assert torch.equal(unpack_codes(wide, 3, 33), codes)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_input(backend):
    codes = torch.zeros(2, 3, dtype=torch.uint8)
    with pyllmq.use_backend(backend):
        for bits in (0, 9, 2.0, True):
            with pytest.raises(ValueError, match="from 1 to 8"):
                pack_codes(codes, bits)
        with pytest.raises(ValueError, match="uint8 matrix"):
            pack_codes(codes.long(), 2)
        with pytest.raises(ValueError, match="uint8 matrix"):
            unpack_codes(codes[0], 2, 1)
        with pytest.raises(ValueError, match="columns of 3 bits take 4"):
            unpack_codes(codes, 3, 9)
        with pytest.raises((ValueError, RuntimeError), match="4"):
            pack_codes(codes + 4, 2)


def test_opcheck():
    codes = torch.randint(0, 4, (5, 6)).to(torch.uint8)
    packed = pack_codes(codes, 2)
    torch.library.opcheck(torch.ops.pyllmq.pack_codes.default, (codes, 2))
    torch.library.opcheck(torch.ops.pyllmq.unpack_codes.default, (packed, 2, 6))
