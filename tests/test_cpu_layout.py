"""CPU kernels of the `codebook` format against an oracle in plain torch and fp64, called through the bindings."""

import itertools

import pytest
import torch

from pyllmq import _cpu

pytestmark = pytest.mark.kernels

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ROWS = [1, 5, 31, 32, 33, 100]
COLUMNS = [1, 2, 3, 7, 64, 255, 256, 257, 600]
PATHS = {"tables": 0, "decode": 1, "automatic": 2}
PRECISIONS = {"exact": 0, "high": 1, "fast": 2}
MAX_ERROR = {"exact": 0.0, "high": 2e-4, "fast": 2e-3}
MAX_ERROR_IN_BYTES = 2e-2
IN_BYTES = ("avx2", "avx_vnni", "avx512", "neon_dotprod", "neon_i8mm")
"""Instruction sets that multiply bytes for `fast`."""
WIDTHS = [[1], [2], [3], [4], [5], [6], [7], [8], [2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8]]


both_paths = pytest.mark.parametrize("path", ["tables", "decode"])


@pytest.fixture(autouse=True, params=_cpu.supported_isas())
def isa(request):
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    assert _cpu.isa() == request.param
    yield request.param
    _cpu.set_isa(before)


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    """The oracle's small operations spin in OpenMP: on a busy machine they took 60 s instead of 2."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def keep_threads():
    before = _cpu.num_threads()
    yield
    _cpu.set_num_threads(before)


def aligned_bytes(size):
    raw = torch.zeros(size + 64, dtype=torch.uint8)
    start = -raw.data_ptr() % 64
    return raw[start : start + size]


def pack_rows(codes, bits):
    """Plain-torch bit stream: uint8 [rows, n] -> uint8 [rows, ceil(n*bits/8)], LSB first."""
    stream = ((codes[:, :, None] >> torch.arange(bits)) & 1).reshape(codes.shape[0], -1)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 8)).reshape(codes.shape[0], -1, 8)
    return (stream.int() << torch.arange(8)).sum(-1).to(torch.uint8).contiguous()


class Weight:
    """A random checkpoint, its dense fp64 oracle and its layout."""

    def __init__(self, rows, columns, widths, segments=1, outlier_fraction=0.0, row_scale=False, int32=False, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.shape = rows, columns
        self.column_bits = torch.tensor(widths)[torch.randint(len(widths), (columns,), generator=g)].to(torch.uint8)
        cuts = torch.sort(torch.randperm(rows - 1, generator=g)[: segments - 1] + 1).values.tolist()
        self.segment_rows = torch.diff(torch.tensor([0, *cuts, rows])).to(torch.int32)
        entries = 2 ** self.column_bits.long()
        self.codebook = torch.randn(segments, int(entries.sum()), generator=g).half()
        self.all_codes = (torch.rand(rows, columns, generator=g) * entries).floor().to(torch.uint8)
        self.packed = {
            b: pack_rows(self.all_codes[:, self.column_bits == b], b) for b in sorted(set(self.column_bits.tolist()))
        }
        self.row_scale = (torch.rand(rows, generator=g) + 0.5).half() if row_scale else None

        first = torch.cumsum(entries, 0) - entries
        segment = torch.repeat_interleave(torch.arange(segments), self.segment_rows.long())
        self.dense = self.codebook.double()[segment[:, None], first + self.all_codes.long()]
        if row_scale:
            self.dense = self.dense * self.row_scale.double()[:, None]
        mask = torch.rand(rows, columns, generator=g) < outlier_fraction
        self.outlier_offsets = torch.cat([torch.zeros(1), mask.sum(1).cumsum(0)]).to(torch.int32)
        self.outlier_columns = mask.nonzero()[:, 1].to(torch.int32 if int32 else torch.uint16).contiguous()
        self.outlier_values = (torch.randn(int(mask.sum()), generator=g) * 8).half()
        self.dense[mask] = self.outlier_values.double()
        self.layout = self.pack()

    def checkpoint(self, **changed):
        arguments = {
            "rows": self.shape[0],
            "columns": self.shape[1],
            "column_bits": self.column_bits,
            "segment_rows": self.segment_rows,
            "segments": len(self.segment_rows),
            "codes": [self.packed.get(b) for b in range(1, 9)],
            "codebook": self.codebook,
            "row_scale": self.row_scale,
            "outlier_row_offsets": self.outlier_offsets,
            "outlier_columns": self.outlier_columns,
            "outlier_columns_bytes": self.outlier_columns.element_size(),
            "outlier_values": self.outlier_values,
        }
        return _cpu.CodebookCheckpoint(**{**arguments, **changed})

    def layout_size(self):
        return _cpu.codebook_layout_bytes(self.checkpoint())

    def pack(self, size=None, **changed):
        layout = aligned_bytes(self.layout_size() if size is None else size)
        _cpu.codebook_layout_pack(layout.data_ptr(), layout.numel(), self.checkpoint(**changed))
        return layout

    def operand(self, layout=None):
        layout = self.layout if layout is None else layout
        return _cpu.CodebookOperand(layout.data_ptr(), layout.numel())

    def codes(self):
        out = torch.full(self.shape, 255, dtype=torch.uint8)
        self.operand().codes(out.data_ptr())
        return out

    def linear(self, x, bias=None, layout=None, path="tables", precision="exact"):
        y = torch.full((len(x), self.shape[0]), float("nan"), dtype=x.dtype)
        self.operand(layout).linear_by(
            PATHS[path], x.data_ptr(), DTYPE_CODES[x.dtype], len(x), 0 if bias is None else bias.data_ptr(),
            0 if bias is None else DTYPE_CODES[bias.dtype], y.data_ptr(), PRECISIONS[precision],
        )  # fmt: skip
        return y

    def dequantize(self, dtype=torch.float32, begin=0, end=None):
        end = self.shape[0] if end is None else end
        out = torch.full((end - begin, self.shape[1]), float("nan"), dtype=dtype)
        self.operand().dequantize(begin, end, out.data_ptr(), DTYPE_CODES[dtype])
        return out


def max_error(precision, path):
    """What the arithmetic that a path takes on this machine may cost, of the result's size."""
    in_bytes = precision == "fast" and path == "decode" and _cpu.isa() in IN_BYTES
    return MAX_ERROR_IN_BYTES if in_bytes else MAX_ERROR[precision]


def assert_as_good_as_torch(weight, x, bias=None, path="tables", precision="exact"):
    """Error against fp64 at most twice that of torch's own F.linear in x's dtype, plus what `precision` permits of the
    result's size; norms over the outputs."""
    dense_bias = None if bias is None else bias.double()
    exact = torch.nn.functional.linear(x.double(), weight.dense, dense_bias)
    torch_y = torch.nn.functional.linear(
        x, weight.dense.to(x.dtype), None if bias is None else bias.to(x.dtype)
    ).double()
    ours = weight.linear(x, bias, path=path, precision=precision).double()
    # Room for one more rounding of a sum of this size: of a handful of outputs torch may hit one exactly by luck.
    size = torch.linalg.norm((x.double() ** 2 @ weight.dense.T**2).sqrt() + exact.abs())
    allowed = (
        2 * torch.linalg.norm(torch_y - exact) + torch.finfo(x.dtype).eps / 2 * size + max_error(precision, path) * size
    )
    error = torch.linalg.norm(ours - exact)
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}, size {size:.3e}"


@both_paths
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_every_shape_round_trips_and_matches(widths, path):
    for seed, (rows, columns) in enumerate(itertools.product(ROWS, COLUMNS)):
        weight = Weight(rows, columns, widths, seed=seed)
        assert torch.equal(weight.codes(), weight.all_codes), (rows, columns)
        assert torch.equal(weight.dequantize().double(), weight.dense), (rows, columns)
        tokens = max(3, 96 // rows)  # of fewer outputs luck, not arithmetic, decides whose error is larger
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
        assert_as_good_as_torch(weight, x, path=path)


@both_paths
@pytest.mark.parametrize("precision", ["high", "fast"])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_every_precision_keeps_its_word(widths, precision, path):
    for seed, (rows, columns, tokens) in enumerate(
        [(1, 1, 1), (33, 255, 1), (100, 257, 2), (64, 600, 9), (5, 600, 17)]
    ):
        weight = Weight(rows, columns, widths, segments=min(rows, 2), outlier_fraction=0.02, row_scale=True, seed=seed)
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
        assert_as_good_as_torch(weight, x, torch.randn(rows), path, precision)
        x[:, columns // 2] *= 1e4
        assert_as_good_as_torch(weight, x, None, path, precision)
        assert_as_good_as_torch(weight, x.bfloat16(), None, path, precision)


@both_paths
@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("outlier_fraction", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("row_scale", [False, True])
@pytest.mark.parametrize("int32", [False, True])
def test_segments_outliers_and_row_scale(segments, outlier_fraction, row_scale, int32, path):
    weight = Weight(100, 300, [1, 2, 3, 4, 6], segments, outlier_fraction, row_scale, int32)
    assert torch.equal(weight.codes(), weight.all_codes)
    assert torch.equal(weight.dequantize().double(), weight.dense)
    x = torch.randn(2, 300)
    assert_as_good_as_torch(weight, x, torch.randn(100), path)
    assert_as_good_as_torch(weight, x, torch.randn(100).half(), path)


@both_paths
@pytest.mark.parametrize("dtype", DTYPE_CODES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 16])
def test_tokens_and_dtypes(tokens, dtype, path):
    weight = Weight(70, 520, [2, 3, 4, 8], segments=2, outlier_fraction=0.02, row_scale=True)
    x = torch.randn(tokens, 520).to(dtype)
    assert weight.linear(x, path=path).shape == (tokens, 70)
    if tokens:
        assert_as_good_as_torch(weight, x, torch.randn(70).to(dtype), path)
        one_by_one = torch.cat([weight.linear(row[None], path=path) for row in x])
        assert torch.equal(weight.linear(x, path=path), one_by_one)


@pytest.mark.parametrize("widths", [[4], [1, 3, 6], [2, 8]], ids=str)
def test_decode_gives_each_token_the_same_bits_beside_any_others(widths):
    weight = Weight(45, 300, widths, segments=2, outlier_fraction=0.02, row_scale=True)
    x = torch.randn(70, 300)
    all_tokens = weight.linear(x, path="decode")
    assert_as_good_as_torch(weight, x, path="decode")
    for tokens in range(1, 70):
        assert torch.equal(weight.linear(x[:tokens], path="decode"), all_tokens[:tokens]), tokens


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("widths", [[1], [2], [3], [4], [2, 3], [8]], ids=str)
def test_automatic_takes_the_path_that_it_names(widths, precision):
    weight = Weight(100, 600, widths)
    named = []
    for tokens in (1, 9, 512):
        x = torch.randn(tokens, 600)
        results = {name: weight.linear(x, path=name, precision=precision) for name in PATHS}
        assert not torch.equal(results["tables"], results["decode"])  # else this test could not tell them apart
        named.append(weight.operand().path(0, tokens, PRECISIONS[precision]))
        assert torch.equal(results["automatic"], results[named[-1]])
    few_bits = max(widths) <= 2  # whose tables may stay cheaper for any number of tokens
    assert named[0] == "tables" if few_bits else named[-1] == "decode"


@pytest.mark.parametrize("dtype", DTYPE_CODES, ids=str)
def test_decode_cuts_very_many_tokens_into_passes(dtype):
    weight = Weight(5, 40, [2, 5], outlier_fraction=0.02)
    x = torch.randn(1100, 40).to(dtype)
    assert_as_good_as_torch(weight, x, torch.randn(5).to(dtype), "decode")
    assert torch.equal(weight.linear(x, path="decode")[700:], weight.linear(x[700:], path="decode"))


def test_decode_uses_the_exact_outlier_where_the_row_scale_is_zero_or_the_code_is_infinite():
    weight = Weight(40, 64, [3], outlier_fraction=1.0, row_scale=True)
    weight.codebook.fill_(float("inf"))
    weight.row_scale.zero_()
    weight.layout = weight.pack()
    assert_as_good_as_torch(weight, torch.randn(9, 64), path="decode")


@both_paths
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_isas_agree_bit_for_bit(widths, path, isa):
    """Exact on all ISAs; high and fast too by tables. Decoded they are fp32 in scalar code, so that nothing is lost there, and
    numbers of 16 or 8 bits elsewhere."""
    weight = Weight(100, 600, widths, segments=2, outlier_fraction=0.01, row_scale=path == "decode")
    x = torch.randn(9, 600)

    def results():
        precisions = ["exact"] if path == "decode" else PRECISIONS
        both = [weight.linear(v, path=path, precision=p) for v in (x, x.bfloat16()) for p in precisions]
        return *both, weight.dequantize(), weight.codes()

    ours = results()
    _cpu.set_isa("scalar")
    scalar = results()
    assert all(torch.equal(a, b) for a, b in zip(ours, scalar, strict=True))
    if path == "decode":
        assert all(torch.equal(weight.linear(x, path=path, precision=p), scalar[0]) for p in PRECISIONS)


@pytest.mark.parametrize("widths", [[4], [3], [2, 8]], ids=str)
def test_same_bits_for_any_number_of_threads(widths):
    weight = Weight(1000, 600, widths, segments=3, outlier_fraction=0.01)
    x = torch.randn(5, 600)
    results = []
    for threads in (1, 2, 5):
        _cpu.set_num_threads(threads)
        both = weight.linear(x), weight.linear(x, path="decode")
        results.append((*both, weight.dequantize(), weight.pack(), weight.codes()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dequantize_any_row_range_rounded_to_nearest(dtype):
    weight = Weight(100, 77, [2, 3, 5], segments=3, outlier_fraction=0.05, row_scale=True)
    expected = weight.dense.to(torch.float32).to(dtype)
    for begin, end in [(0, 100), (0, 1), (99, 100), (31, 33), (13, 80), (50, 50)]:
        assert torch.equal(weight.dequantize(dtype, begin, end), expected[begin:end])
        assert torch.equal(weight.dequantize(begin=begin, end=end).double(), weight.dense[begin:end])


@both_paths
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("widths", [[1], [2], [3], [4], [7]], ids=str)
def test_non_finite_x_stays_in_its_token(widths, bad, path):
    weight = Weight(40, 300, widths, outlier_fraction=0.01)
    x = torch.randn(3, 300)
    clean = weight.linear(x, path=path)
    x[1, 123] = bad
    y = weight.linear(x, path=path)
    expected = torch.nn.functional.linear(x[1], weight.dense.float())
    assert torch.equal(y[0], clean[0]) and torch.equal(y[2], clean[2])
    assert not expected.isfinite().any() and not y[1].isfinite().any()


@both_paths
@pytest.mark.parametrize("dtype", DTYPE_CODES, ids=str)
def test_one_channel_ten_thousand_times_larger(dtype, path):
    weight = Weight(100, 512, [2, 3, 4])
    x = torch.randn(2, 512)
    x[:, 200] *= 1e4 if dtype != torch.float16 else 1e3
    assert_as_good_as_torch(weight, x.to(dtype), path=path)


@both_paths
@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-38, 1e-30, 1e-20, 1e20, 1e34])
@pytest.mark.parametrize("widths", [[1], [2], [3], [4], [6]], ids=str)
def test_very_small_and_very_large_x(widths, size, path):
    weight = Weight(40, 300, widths)
    x = torch.randn(2, 300) * size
    y = weight.linear(x, path=path)
    exact = x.double() @ weight.dense.T
    assert torch.all((y.double() - exact).abs() <= 1e-5 * exact.abs().max() + 300 * 2.0**-149)
    assert size > 0 or torch.all(y == 0)


@both_paths
def test_codebook_with_infinity_or_zeros(path):
    weight = Weight(40, 64, [2, 3])
    weight.codebook.zero_()
    weight.layout = weight.pack()
    assert torch.all(weight.linear(torch.randn(1, 64), path=path) == 0)
    weight.codebook.fill_(float("inf"))
    weight.layout = weight.pack()
    assert not weight.linear(torch.randn(1, 64), path=path).isfinite().any()


def test_layout_may_be_moved():
    weight = Weight(100, 300, [2, 3, 4], segments=2, outlier_fraction=0.02)
    x = torch.randn(2, 300)
    before = weight.linear(x)
    moved = aligned_bytes(weight.layout.numel())
    moved.copy_(weight.layout)
    weight.layout.zero_()
    assert torch.equal(weight.linear(x, layout=moved), before)


@pytest.mark.parametrize("byte", [0, 8, 16, 24, 32, 40, 56, 72, 104, 128, 176])
def test_damaged_header_is_refused(byte):
    weight = Weight(100, 300, [2, 3, 4])
    weight.layout[byte] ^= 0x41
    with pytest.raises(ValueError, match="layout"):
        weight.linear(torch.randn(1, 300))
    with pytest.raises(ValueError, match="layout"):
        weight.dequantize()
    with pytest.raises(ValueError, match="layout"):
        weight.codes()


def test_wrong_sizes_and_addresses_are_refused():
    weight = Weight(100, 300, [2, 3, 4])
    x = torch.randn(1, 300)
    for cut in (weight.layout[:-64], weight.layout[:100], weight.layout[:0], weight.layout[1:]):
        with pytest.raises(ValueError, match="layout"):
            weight.linear(x, layout=cut)
    with pytest.raises(ValueError, match="needs"):
        weight.pack(size=weight.layout_size() + 64)
    operand = weight.operand()
    assert (operand.rows, operand.columns) == weight.shape
    with pytest.raises(ValueError, match="do not lie within"):
        operand.dequantize(0, 101, x.data_ptr(), 0)
    with pytest.raises(ValueError, match="dtype code"):
        operand.dequantize(0, 1, x.data_ptr(), 3)
    with pytest.raises(ValueError, match="null"):
        operand.linear(0, 0, 1, 0, 0, 0, 0)
    with pytest.raises(ValueError, match=r"path 3; allowed: 0 \(tables\), 1 \(decode\), 2 \(automatic\)"):
        operand.linear_by(3, x.data_ptr(), 0, 1, 0, 0, x.data_ptr(), 0)
    with pytest.raises(ValueError, match="tokens"):
        operand.linear(x.data_ptr(), 0, -1, 0, 0, x.data_ptr(), 0)


def test_a_layout_that_changes_after_it_was_bound_is_refused():
    weight, other = Weight(100, 300, [2, 3, 4]), Weight(100, 300, [2, 3, 4], seed=1)
    operand, x, y = weight.operand(), torch.randn(1, 300), torch.empty(1, 300)
    assert operand.is_intact
    weight.layout[: other.layout.numel()] = other.layout[: weight.layout.numel()]
    assert not operand.is_intact
    for call in (
        lambda: operand.linear(x.data_ptr(), 0, 1, 0, 0, y.data_ptr(), 0),
        lambda: operand.dequantize(0, 1, y.data_ptr(), 0),
        lambda: operand.codes(y.data_ptr()),
        lambda: operand.path(0, 1, 0),
    ):
        with pytest.raises(ValueError, match="bind it again"):
            call()


def test_bad_checkpoints_are_refused():
    weight = Weight(100, 300, [2, 3], outlier_fraction=0.1)
    descending = weight.outlier_columns.int().flip(0).to(torch.uint16)
    falling = torch.cat([torch.arange(100), torch.zeros(1)]).to(torch.int32)
    with pytest.raises(ValueError, match="codes_b2 is missing"):
        weight.pack(codes=[0] * 8)
    with pytest.raises(ValueError, match="needs 8"):
        weight.pack(codes=[0] * 7)
    with pytest.raises(ValueError, match="codebook"):
        weight.pack(codebook=0)
    with pytest.raises(ValueError, match="ascend"):
        weight.pack(outlier_columns=descending)
    with pytest.raises(ValueError, match="allowed: 2"):
        weight.pack(outlier_columns_bytes=3)
    with pytest.raises(ValueError, match="decrease"):
        weight.pack(outlier_row_offsets=falling)

    bits = weight.column_bits.clone()
    for wrong in (0, 9):
        bits[7] = wrong
        with pytest.raises(ValueError, match=r"column_bits\[7\]"):
            weight.pack(column_bits=bits)
    short = torch.tensor([99], dtype=torch.int32)
    with pytest.raises(ValueError, match="sum to 99"):
        weight.pack(segment_rows=short)
    with pytest.raises(ValueError, match="segments"):
        weight.pack(segments=0)
    with pytest.raises(ValueError, match="shape"):
        weight.pack(rows=0)
    with pytest.raises(ValueError, match="another size than the 2 bytes"):
        weight.pack(codebook=weight.codebook.float())
    with pytest.raises(TypeError, match="keyword argument 'rows' is of another type"):
        weight.pack(rows="many")
    with pytest.raises(TypeError, match="unknown keyword argument 'row'"):
        weight.pack(row=1)
    with pytest.raises(TypeError, match="missing keyword argument 'rows'"):
        _cpu.CodebookCheckpoint()


@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_codes_matches_plain_torch(bits):
    for rows, columns in itertools.product([1, 3, 70], [0, 1, 7, 8, 9, 63, 1001]):
        codes = torch.randint(2**bits, (rows, columns), dtype=torch.uint8)
        expected = pack_rows(codes, bits)
        packed = torch.full((rows, (columns * bits + 7) // 8), 255, dtype=torch.uint8)
        _cpu.pack_codes(codes.data_ptr(), packed.data_ptr(), rows, columns, bits)
        assert torch.equal(packed, expected)
        back = torch.full((rows, columns), 255, dtype=torch.uint8)
        _cpu.unpack_codes(packed.data_ptr(), back.data_ptr(), rows, columns, bits)
        assert torch.equal(back, codes)


@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("place", [0, 16])
def test_pack_codes_refuses_codes_that_do_not_fit(bits, place):
    codes = torch.zeros(3, 17, dtype=torch.uint8)
    codes[1, place] = 2**bits
    packed = torch.zeros(3, 17, dtype=torch.uint8)
    with pytest.raises(ValueError, match="row 1"):
        _cpu.pack_codes(codes.data_ptr(), packed.data_ptr(), 3, 17, bits)


def test_pack_codes_refuses_bad_arguments():
    codes = torch.zeros(4, dtype=torch.uint8)
    for bits in (0, 9):
        with pytest.raises(ValueError, match="bits"):
            _cpu.pack_codes(codes.data_ptr(), codes.data_ptr(), 1, 4, bits)
        with pytest.raises(ValueError, match="bits"):
            _cpu.unpack_codes(codes.data_ptr(), codes.data_ptr(), 1, 4, bits)
    with pytest.raises(ValueError, match="null"):
        _cpu.unpack_codes(0, codes.data_ptr(), 1, 4, 4)
    with pytest.raises(ValueError, match="shape"):
        _cpu.unpack_codes(codes.data_ptr(), codes.data_ptr(), -1, 4, 4)


def test_set_isa_lists_what_is_allowed():
    with pytest.raises(ValueError, match="scalar"):
        _cpu.set_isa("sse9")
