"""Who competes on a GPU; every weight and every input lies there. Rows as in providers.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from pyllmq import backends, dispatch, layouts, operations, ops
from pyllmq.formats import PackedWeight

from .gpu_table import BASELINE as GPU_BASELINE
from .providers import BASELINE, INT4_GROUP, Available, Layer, Provider, Widths, pack_normal, torch_dense
from .sparse import CODE_BITS, coded, pruned, pruned_24

_INNER_K_TILES = 8
TORCH_24 = "torch 2:4 bf16"
GPU_SPARSITIES = (0.5, 0.7, 0.8, 0.9)


def gpu_isa() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def _on_gpu() -> Available:
    return (True, "part of torch") if torch.cuda.is_available() else (False, "torch finds no GPU here")


# ---- torch ----------------------------------------------------------------------------------------------------------


def _gpu_dense(name: str, dtype: torch.dtype, tolerance: float) -> Provider:
    return replace(torch_dense(name, dtype, tolerance), available=_on_gpu, isa=gpu_isa)


def _int4_available() -> Available:
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm"):
        return False, f"torch {torch.__version__} has no aten::_weight_int4pack_mm"
    return _on_gpu()


def _make_int4(weight: Tensor) -> Layer:
    n, k = weight.shape
    if k % INT4_GROUP or n % 8:
        raise ValueError(f"takes N in multiples of 8 and K in multiples of {INT4_GROUP}, given [{n}, {k}]")
    groups = weight.view(n, k // INT4_GROUP, INT4_GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp_min(1e-12).bfloat16().float()
    middle = (low + 8 * scale).bfloat16().float()
    codes = ((groups - middle) / scale + 8).round().clamp(0, 15)
    dense = ((codes - 8) * scale + middle).view(n, k)
    codes = codes.view(n, k).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], _INNER_K_TILES)
    scale_and_middle = torch.cat([scale, middle], -1).transpose(0, 1).contiguous().bfloat16()
    return _int4_layer(packed, scale_and_middle, dense)


def _int4_layer(packed: Tensor, scale_and_middle: Tensor, dense: Tensor) -> Layer:
    return Layer(
        lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, INT4_GROUP, scale_and_middle),
        lambda: dense,
        lambda: _int4_layer(packed.clone(), scale_and_middle.clone(), dense),
        packed.nbytes + scale_and_middle.nbytes,
        torch.bfloat16,
        lambda m: "aten::_weight_int4pack_mm",
    )


def _semi_structured_available() -> Available:
    if not hasattr(torch.sparse, "to_sparse_semi_structured"):
        return False, f"torch {torch.__version__} has no torch.sparse.to_sparse_semi_structured"
    return _on_gpu()


def _make_semi_structured(weight: Tensor) -> Layer:
    """2:4 by magnitude: of four neighbours the two larger stay."""
    n, k = weight.shape
    if n % 64 or k % 64:
        raise ValueError(f"takes N and K in multiples of 64, given [{n}, {k}]")
    fours = weight.view(n, k // 4, 4)
    kept = torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, fours.abs().topk(2).indices, True)
    dense = (fours * kept).view(n, k).bfloat16()
    return _semi_structured_layer(dense)


def _semi_structured_layer(dense: Tensor) -> Layer:
    packed = torch.sparse.to_sparse_semi_structured(dense)
    nbytes = dense.nbytes // 2 + dense.numel() // 8  # two values and four bits of positions for every four weights
    return Layer(
        lambda x: F.linear(x, packed),
        lambda: dense,
        lambda: _semi_structured_layer(dense),
        nbytes,
        torch.bfloat16,
        lambda m: "to_sparse_semi_structured",
    )


# ---- others ---------------------------------------------------------------------------------------------------------


def _nf4_available() -> Available:
    if find_spec("bitsandbytes") is None:
        return False, "bitsandbytes is not installed (pip install bitsandbytes)"
    return _on_gpu()


def _make_nf4(weight: Tensor) -> Layer:
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight.bfloat16(), blocksize=64, quant_type="nf4")
    return _nf4_layer(packed, state, functional.dequantize_4bit(packed, state))


def _nf4_layer(packed: Tensor, state, dense: Tensor) -> Layer:
    from bitsandbytes import matmul_4bit

    return Layer(
        lambda x: matmul_4bit(x, packed.t(), quant_state=state),
        lambda: dense,
        lambda: _nf4_layer(packed.clone(), state, dense),
        packed.nbytes + state.absmax.nbytes,
        torch.bfloat16,
        lambda m: f"bitsandbytes {version('bitsandbytes')} matmul_4bit",
    )


def _no_recipe(package: str) -> Provider:
    """A rival known by name only: the row says that it was not measured, and why."""

    def available() -> Available:
        try:
            return False, f"{package} {version(package)} is installed, but gpu_providers.py has no recipe for it yet"
        except PackageNotFoundError:
            return False, f"{package} is not installed"

    def make(weight: Tensor) -> Layer:
        raise ValueError(available()[1])

    return Provider(package, available, make, 0.0, gpu_isa)


GPU_RIVALS = (
    _gpu_dense(BASELINE, torch.float32, 1e-5),
    _gpu_dense(GPU_BASELINE, torch.bfloat16, 1e-2),
    Provider("torch int4 g128", _int4_available, _make_int4, 1e-2, gpu_isa),
    Provider(TORCH_24, _semi_structured_available, _make_semi_structured, 1e-2, gpu_isa),
    Provider("bitsandbytes nf4", _nf4_available, _make_nf4, 1e-2, gpu_isa),
    *(_no_recipe(package) for package in ("gemlite", "flute-kernel", "marlin")),
)


# ---- pyllmq ---------------------------------------------------------------------------------------------------------


def pyllmq_on_gpu(bits: str | int | float, backend: str) -> Provider:
    """Our packed layer at `bits`, bf16 activations, on one of our GPU back ends ("cuda", "triton")."""
    widths = Widths.parse(bits)

    def make(weight: Tensor) -> Layer:
        with dispatch.use_backend(backend):
            packed = pack_normal(weight, widths)
            operand = packed.operand()
        return _packed_layer(operand, packed.nbytes, "codebook_linear", partial(packed.dequantize, torch.float32))

    return Provider(f"pyllmq {bits} {backend}", lambda: backends.report()[backend], make, 1e-2, gpu_isa)


def sparse_on_gpu(name: str, pack: Callable[[Tensor], PackedWeight], op: str, backend: str) -> Provider:
    """A sparse layer of bf16 values or codes, bf16 activations, on one of our GPU back ends."""

    def make(weight: Tensor) -> Layer:
        packed = pack(weight.cpu()).to(weight.device)
        with dispatch.use_backend(backend):
            operand = packed.operand()
        return _packed_layer(operand, packed.nbytes, op, partial(packed.dequantize, torch.float32))

    return Provider(f"pyllmq {name} {backend}", lambda: backends.report()[backend], make, 1e-2, gpu_isa, most_lost=1.0)


def _packed_layer(operand: layouts.WeightOperand, nbytes: int, op: str, dense: Callable[[], Tensor]) -> Layer:
    def copy() -> Layer:
        copied = layouts.machine_layout(operand.layout).from_blob(operand.tensors[0].clone(), operand.shape)
        return _packed_layer(copied, nbytes, op, dense)

    def kernel(m: int) -> str:
        device = str(operand.tensors[0].device)
        return dispatch.choose(
            operations.WeightProblem("packed_linear", device, torch.bfloat16, operand.layout, m, operand.meta)
        ).name

    return Layer(lambda x: getattr(ops, op)(x, operand), dense, copy, nbytes, torch.bfloat16, kernel)


def gpu_providers(bits: Sequence[str | int | float]) -> list[Provider]:
    return [*GPU_RIVALS, *(pyllmq_on_gpu(width, backend) for backend in ("cuda", "triton") for width in bits)]


def sparse_gpu_providers() -> list[Provider]:
    """cuBLAS, torch's 2:4, ours: bitmaps as masks and as column numbers, 2:4, and 2:4 of codes."""
    rivals = [provider for provider in GPU_RIVALS if provider.name in (BASELINE, GPU_BASELINE, TORCH_24)]
    rows = []
    for sparsity in GPU_SPARSITIES:
        pack = partial(pruned, sparsity, torch.bfloat16)
        rows += [sparse_on_gpu(f"bitmap {sparsity:g}", pack, "bitmap_linear", b) for b in ("cuda", "triton")]
    pack_24 = partial(pruned_24, torch.bfloat16)
    rows += [sparse_on_gpu("2:4", pack_24, "sparse24_linear", b) for b in ("cuda", "triton")]
    rows += [
        sparse_on_gpu(f"2:4 {bits} bits", partial(coded, bits), "sparse24_codebook_linear", "cuda")
        for bits in CODE_BITS
    ]
    return [*rivals, *rows]
