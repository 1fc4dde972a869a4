// What stands between the Linears of an MLP or an expert.
#pragma once
#include <string>
#include <vector>

namespace pyllmq {

enum class Activation { silu, gelu, gelu_tanh, relu, relu_squared };
inline const std::vector<std::string> kActivations = {"silu", "gelu", "gelu_tanh", "relu", "relu_squared"};  // their names

}  // namespace pyllmq
