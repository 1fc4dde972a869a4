"""Codes of one width -> centroids, a tile at a time: what dequantize and linear share.

Codes lie transposed, [ceil(K_b * b / 8) bytes, N rows]: neighbouring threads read neighbouring rows of one byte. Eight columns take
b whole bytes whatever b is, so one expression serves every width. See docs/kernels-triton.md.
"""

import triton
import triton.language as tl

GROUP_SLOTS = tl.constexpr(8)
"""Columns that fill whole bytes together, at any width."""


@triton.jit
def load_codes(codes, code_bytes, rows, row, first_group, GROUPS: tl.constexpr, BITS: tl.constexpr):
    """int32 [GROUPS * 8 slots, rows]: slots from `first_group` on of the rows `row`; 0 outside the weight."""
    WORD: tl.constexpr = tl.uint32 if BITS <= 4 else tl.uint64
    byte = (first_group + tl.arange(0, GROUPS)) * BITS
    inside = (row < rows)[None, :]
    word = tl.zeros([GROUPS, row.shape[0]], WORD)
    for j in tl.static_range(BITS):
        # 64 bits: byte * rows passes 2**31 in an output head of 256k rows
        place = codes + (byte + j).to(tl.int64)[:, None] * rows + row[None, :]
        loaded = tl.load(place, mask=(byte + j < code_bytes)[:, None] & inside, other=0, eviction_policy="evict_first")
        word |= loaded.to(WORD) << (8 * j)
    shift = (tl.arange(0, GROUP_SLOTS) * BITS).to(WORD)
    code = (word[:, None, :] >> shift[None, :, None]) & ((1 << BITS) - 1)
    return tl.reshape(code.to(tl.int32), [GROUPS * GROUP_SLOTS, row.shape[0]])


@triton.jit
def decode_tile(
    codes, code_bytes, codebook, row_segment, rows, slots, row, first_slot,
    BLOCK_SLOTS: tl.constexpr, BITS: tl.constexpr, ONE_SEGMENT: tl.constexpr,
):  # fmt: skip
    """fp16 [BLOCK_SLOTS, rows]: centroids of a tile of the transposed weight, without row scale; anything finite outside it."""
    GROUPS: tl.constexpr = BLOCK_SLOTS // GROUP_SLOTS
    code = load_codes(codes, code_bytes, rows, row, first_slot // GROUP_SLOTS, GROUPS, BITS)
    # Slots and rows outside the weight look up a centroid that is there: a mask for each lookup costs 3 instructions of 12.
    slot = tl.minimum(first_slot + tl.arange(0, BLOCK_SLOTS), slots - 1)
    entry = (slot << BITS)[:, None] | code
    if ONE_SEGMENT:  # spares a load per weight, which the compiler would repeat in the layout of the lookups
        return tl.load(codebook + entry)
    book = codebook + tl.load(row_segment + row, mask=row < rows, other=0).to(tl.int64) * (slots << BITS)
    return tl.load(book[None, :] + entry)
