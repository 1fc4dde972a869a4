"""A transformers model as a system of `pyllmq bench --model`: `generate`, packed or dense, fused or not.

usage: python -m pyllmq.benchmarks.transformers_worker MODEL BITS PRECISION DTYPE FUSED THREADS
MODEL: a name of SHAPES or a folder; BITS: as `Widths.parse`, or "dense"; FUSED: 1 or 0
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyllmq import CodebookWeight, fusion
from pyllmq.experts import put_together, take_apart
from pyllmq.folders import is_packed
from pyllmq.integrations.transformers import mark_packed
from pyllmq.linears import replace_module
from pyllmq.loading import load_model
from pyllmq.nn import CodebookLinear, set_precision

from .providers import Widths, pack_normal
from .worker import serve

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "TinyLlama-1.1B": ("llama", {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 4096, "head_dim": 64,
    }),
    "Llama-3.2-1B": ("llama", {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "head_dim": 64,
        "tie_word_embeddings": True,
    }),
    "Qwen3-0.6B": ("qwen3", {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "vocab_size": 151936, "max_position_embeddings": 8192, "head_dim": 128,
        "tie_word_embeddings": True,
    }),
    # 3 of 48 layers, and a head in keeping with them: the whole one would be half of what a token reads.
    "Qwen3-30B-A3B, 3 layers": ("qwen3_moe", {
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "num_hidden_layers": 3, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 16384, "max_position_embeddings": 8192, "head_dim": 128,
    }),
}  # fmt: skip
"""Name -> model type and sizes of the published model. Its weights are random here."""

SPREAD = 0.02

HEAD_BITS = 4
"""Of the output head in a packed model of random weights; llama.cpp's formats have 4 to 6.6 bits there."""


def config_of(model: str) -> Any:
    from transformers import AutoConfig

    if model in SHAPES:
        model_type, sizes = SHAPES[model]
        return AutoConfig.for_model(model_type, **sizes)
    if not Path(model).is_dir():
        raise ValueError(f"--model {model} is no folder and no shape; shapes: {', '.join(SHAPES)}")
    return AutoConfig.from_pretrained(model)


def random_model(config: Any, bits: str, dtype: torch.dtype) -> nn.Module:
    """A model of this shape with random weights, "dense" or packed with a packed head. Weights of one shape hold the same
    numbers, each in memory of its own: a token's time does not depend on them."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    take_apart(model)
    packed: dict[tuple[int, int], CodebookWeight] = {}
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and bits != "dense"]:
        shape = (linear.out_features, linear.in_features)
        if shape not in packed:
            own = str(HEAD_BITS) if linear is model.get_output_embeddings() else bits
            packed[shape] = pack_normal(torch.randn(shape) * SPREAD, Widths.parse(own))
        replace_module(model, name, CodebookLinear.from_weight(packed[shape], dtype=dtype))
    put_together(model)
    dense: dict[torch.Size, torch.Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if parameter.shape not in dense:
                    made = torch.empty(parameter.shape, dtype=dtype)
                    dense[parameter.shape] = made.normal_(std=SPREAD) if made.dim() > 1 else made.fill_(1)
                setattr(module, name, nn.Parameter(dense[parameter.shape].clone(), requires_grad=False))
    if bits == "dense":
        model.tie_weights()
    else:
        mark_packed(model)
    return model.eval()


class Generation:
    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.caches: dict[int, Any] = {}
        tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
        self.nbytes = sum(t.nbytes for t in tensors.values())

    def _generate(self, context: int, tokens: int, each: Callable[[], object], **given: Any) -> list[float]:
        """Seconds from the call to the first token, then of each token after it. `each` is called at every token."""
        stamps = [time.perf_counter()]

        class Clock:
            seen_prompt = False

            def put(self, _: Any) -> None:
                if self.seen_prompt:
                    each()
                    stamps.append(time.perf_counter())
                self.seen_prompt = True

            def end(self) -> None: ...

        ids = torch.arange(context).remainder(500).add(3)[None]
        if hasattr(self.model.config, "num_experts"):
            given["logits_processor"] = [_next_in_turn]
        with torch.inference_mode():
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                streamer=Clock(),
                **given,
            )
        return [after - before for before, after in zip(stamps, stamps[1:], strict=False)]

    def prompt(self, tokens: int) -> float:
        return self._generate(tokens, 1, lambda: None)[0]

    def decode(self, context: int, tokens: int, each: Callable[[], object] = lambda: None) -> list[float]:
        if context not in self.caches:
            self.caches = {context: filled_cache(self.model, context)}
        cache = self.caches[context]
        taken = self._generate(context + 1, tokens + 1, each, past_key_values=cache)[1:]
        cache.crop(context - cache.get_seq_length())
        return taken


def _next_in_turn(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The token after those of `ids`, whatever the scores: a router chooses by the token, and random weights may repeat one."""
    scores[:, 3 + ids.shape[1] % 500] = torch.inf
    return scores


def filled_cache(model: Any, context: int) -> Any:
    """As `generate` makes it, with random keys and values: reading a prompt of 2000 tokens again and again takes too long."""
    from transformers import DynamicCache

    config = model.config
    shape = (1, config.num_key_value_heads, context, config.head_dim)
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(shape).to(model.dtype), torch.randn(shape).to(model.dtype), layer)
    return cache


def make(model: str, bits: str, precision: str, dtype: str, fused: str, threads: str) -> Generation:
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(int(threads))
    type_ = getattr(torch, dtype)
    if bits != "dense" and Path(model).is_dir() and is_packed(model):
        made = load_model(model).to(type_).eval()
    else:
        made = random_model(config_of(model), bits, type_)
    made.generation_config.eos_token_id = None  # random weights may choose it
    made.generation_config.pad_token_id = 0
    if bits != "dense":
        set_precision(made, precision)
    if fused == "1":
        found = fusion.fuse(made)
        if fusion.FUSED not in found.values():
            raise RuntimeError(f"nothing of {model} could be fused: {found}")
    else:
        fusion.unfuse(made)
    return Generation(made)


if __name__ == "__main__":
    serve(lambda: make(*sys.argv[1:]))
