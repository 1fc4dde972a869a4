"""vLLM: packed folders in its server. `register()` is the entry point `vllm.general_plugins`, called in every vLLM process.

vLLM makes one layer of q, k and v (and one of gate and up) and shards it itself: vllm_parts.py says what of a packed folder
belongs to such a layer, vllm_layers.py is the layer.
"""

from __future__ import annotations

from ..folders import METHOD


def register() -> None:
    """Tell vLLM about the quantization method `pyllmq`; harmless when repeated."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    if METHOD not in QUANTIZATION_METHODS:
        from .vllm_layers import PyllmqVllmConfig, decode_what_no_layer_takes

        register_quantization_config(METHOD)(PyllmqVllmConfig)
        decode_what_no_layer_takes()
