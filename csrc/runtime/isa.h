// Which instruction set the kernels use. An operation keeps one row of function pointers per ISA. A new ISA is one more
// enumerator and one more case here, and a vector type in simd.h: operations whose rows come from *_simd.cpp need no more.
#pragma once
#include <string>
#include <vector>

namespace pyllmq::cpu {

// avx_vnni: AVX2 and sums of byte and of word products in 256 bits (vpdpbusd, vpdpwssd: Alder Lake, Zen 5 and later). avx512: F,
// BW, VL, DQ, VBMI, VBMI2 and VNNI (Ice Lake, Zen 4 and later). amx: those and tiles of int8 and bf16, granted by the operating
// system (Sapphire Rapids and later). neon: what every 64-bit ARM processor has; neon_dotprod: and sums of four byte products
// (sdot; Cortex-A75, Neoverse N1, Apple A11 and later); neon_i8mm: and byte matrix products (smmla; Neoverse V1 and N2, Apple M2
// and later). Each includes those before it on its architecture.
enum class Isa { scalar, avx2, avx_vnni, avx512, amx, neon, neon_dotprod, neon_i8mm };

const char* isa_name(Isa isa);
std::vector<Isa> supported_isas();  // compiled in and usable on this machine, best first
Isa active_isa();
void set_isa(const std::string& name);  // throws std::invalid_argument that lists the allowed names

// row.operator()<isa>() of the active instruction set, of those that simd.h has vectors for; on x86-64 not of one beyond `most`.
template <class Row>
decltype(auto) by_isa(Row&& row, Isa most = Isa::amx) {
#if defined(__aarch64__)
  static_cast<void>(most);
  if (active_isa() != Isa::scalar) return row.template operator()<Isa::neon>();
#elif defined(__x86_64__)
  const Isa isa = active_isa() < most ? active_isa() : most;
  if (isa >= Isa::avx512) return row.template operator()<Isa::avx512>();
  if (isa >= Isa::avx2) return row.template operator()<Isa::avx2>();
#else
  static_cast<void>(most);
#endif
  return row.template operator()<Isa::scalar>();
}

}  // namespace pyllmq::cpu
