// What stands between the Linears of an MLP or an expert.
#pragma once
#include <string>
#include <vector>

namespace pyllmq {

enum class Activation { silu, gelu, gelu_tanh, relu, relu_squared };
// Not a variable: files compiled for an instruction set include this, and what they hold must not run at import.
inline std::vector<std::string> activation_names() { return {"silu", "gelu", "gelu_tanh", "relu", "relu_squared"}; }

}  // namespace pyllmq
