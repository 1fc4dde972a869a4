"""Which rows of the C++ half serve each operation, by instruction set: what `pyllmq doctor` prints. The choices themselves stand
in csrc/<operation>/cpu/."""

from __future__ import annotations

_FEW, _MORE = "codebook, few tokens", "codebook, more tokens"
_OTHERS = "Sinkhorn, distances, k-means, decode steps"
_INT16 = "int16, exact in fp32"

SERVED: dict[str, dict[str, str]] = {
    "amx": {_FEW: "avx512", _MORE: "amx, exact in avx512 fp32", "sparse": "avx512, bf16 in amx", _OTHERS: "avx512"},
    "avx512": {_FEW: "avx512", _MORE: f"avx512 {_INT16}, fast in int8", "sparse": "avx512", _OTHERS: "avx512"},
    "avx2": {_FEW: "avx2", _MORE: f"avx2 {_INT16}", "sparse": "avx2", _OTHERS: "avx2"},
    "neon_i8mm": {_FEW: "neon", _MORE: "neon fp32, fast in int8 by smmla", "sparse": "neon", _OTHERS: "neon"},
    "neon_dotprod": {_FEW: "neon", _MORE: "neon fp32, fast in int8 by sdot", "sparse": "neon", _OTHERS: "neon"},
    "neon": {_FEW: "neon", _MORE: "neon fp32", "sparse": "neon", _OTHERS: "neon"},
    "scalar": {_FEW: "scalar", _MORE: "scalar fp32", "sparse": "scalar", _OTHERS: "scalar"},
}
"""By the name that `_cpu.isa()` gives: operation -> row."""

FASTER = {
    "amx": "nothing that is written here",
    "avx512": "a processor with AMX (Sapphire Rapids or later) for many tokens",
    "avx2": "a processor with AVX-512 VBMI and VNNI (Ice Lake, Zen 4 or later)",
    "neon_i8mm": "nothing that is written here; no time was ever measured on ARM",
    "neon_dotprod": "a processor with i8mm (Neoverse V1, N2, Apple M2 or later) for many tokens with precision='fast'",
    "neon": "a processor with dot product (Cortex-A75, Neoverse N1 or later) for many tokens with precision='fast'",
    "scalar": "a processor with AVX2, FMA and F16C, or 64-bit ARM: 20 times",
}
