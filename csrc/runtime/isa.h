// Which instruction set the kernels use. Every operation keeps one row of function pointers per ISA and picks by
// active_isa(); a new ISA is one more enumerator here and one more row there.
#pragma once
#include <string>
#include <vector>

namespace pyllmq::cpu {

// avx512: F, BW, VL, DQ, VBMI, VBMI2 and VNNI (Ice Lake, Zen 4 and later). amx: those and tiles of int8 and bf16, granted by the
// operating system (Sapphire Rapids and later). Each includes those before it.
enum class Isa { scalar = 0, avx2 = 1, avx512 = 2, amx = 3 };

const char* isa_name(Isa isa);
std::vector<Isa> supported_isas();  // compiled in and usable on this machine, best first
Isa active_isa();
void set_isa(const std::string& name);  // throws std::invalid_argument that lists the allowed names

}  // namespace pyllmq::cpu
