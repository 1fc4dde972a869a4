"""llama.cpp and ik_llama.cpp as rivals of `pyllmq bench --model`: random weights as GGUF files, and the process that runs one.

Weights are random because no file of a published model is at hand; the time of a token does not depend on them.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from .worker import serve

PACKAGES = {"llama.cpp": "llama_cpp", "ik_llama.cpp": "ik_llama_cpp"}
"""System -> Python package: `pip install llama-cpp-python`, `pip install ik-llama-cpp-python`. Both bring a libllama of their own:
each runs in a process of its own."""

FORMATS = {"Q4_0": 2, "Q4_K_M": 15, "Q3_K_M": 12, "Q2_K": 10}
"""Name -> number in llama.cpp's `llama_ftype`."""

MODULE = "pyllmq.benchmarks.llama_cpp"

EXTRA, PLAIN = "extra", "plain"
"""Buffers of llama.cpp: weights repacked for AMX or for wider vectors where it can, or as the file has them."""

ARCHITECTURES = {"llama": "llama", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
"""Model types that `write_gguf` knows -> what a GGUF file calls them."""


def installed() -> dict[str, str]:
    """System -> package, of those that can be imported."""
    return {system: package for system, package in PACKAGES.items() if find_spec(package) is not None}


def bindings(package: str) -> Any:
    """The C functions of a package. Its log is thrown away."""
    module = import_module(f"{package}.{'llama_cpp' if package == 'llama_cpp' else '_ctypes_api'}")
    module.llama_backend_init()
    return module


# ---- files ----------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, config: Any, seed: int = 0) -> None:
    """A model of the shape that a transformers config of `ARCHITECTURES` names, with normal weights in fp16.

    Raises ValueError for other model types, ImportError without the package gguf.
    """
    if config.model_type not in ARCHITECTURES:
        raise ValueError(f"model type {config.model_type!r} has no GGUF writer here; known: {', '.join(ARCHITECTURES)}")
    if find_spec("gguf") is None:
        raise ImportError("GGUF files are written by the package gguf; pip install 'pyllmq-kernels[bench]'")
    gguf = import_module("gguf")
    # With experts a model in fp16 is larger than its packed ones together: not all of it in memory.
    out = gguf.GGUFWriter(str(path), ARCHITECTURES[config.model_type], use_temp_file=_has_experts(config))
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    if _has_experts(config):
        out.add_expert_count(config.num_experts)
        out.add_expert_used_count(config.num_experts_per_tok)
        out.add_expert_feed_forward_length(config.moe_intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_key_length(config.head_dim)
    out.add_value_length(config.head_dim)
    out.add_rope_dimension_count(config.head_dim)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_file_type(1)
    out.add_vocab_size(config.vocab_size)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokens += [f"t{i}" for i in range(config.vocab_size - len(tokens))]
    out.add_tokenizer_model("llama")
    out.add_token_list([token.encode() for token in tokens])
    out.add_token_scores([0.0] * len(tokens))
    out.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    generator = np.random.default_rng(seed)
    for name, shape in tensors(config):
        if len(shape) == 1:
            out.add_tensor(name, np.ones(shape, dtype=np.float32))
            continue
        values = generator.standard_normal(shape, dtype=np.float32)
        values *= 0.02
        out.add_tensor(name, values if name.endswith(ROUTER) else values.astype(np.float16))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


ROUTER = "ffn_gate_inp.weight"
"""Stays fp32 in every file."""


def _has_experts(config: Any) -> bool:
    return config.model_type == "qwen3_moe"


def tensors(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = config.hidden_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    yield "token_embd.weight", (config.vocab_size, hidden)
    yield "output_norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "output.weight", (config.vocab_size, hidden)
    for i in range(config.num_hidden_layers):
        block = {"attn_q": (q, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden), "attn_output": (hidden, q),
                 "attn_norm": (hidden,), "ffn_norm": (hidden,)}  # fmt: skip
        mlp = config.moe_intermediate_size if _has_experts(config) else config.intermediate_size
        ffn: dict[str, tuple[int, ...]] = {
            "ffn_gate": (mlp, hidden),
            "ffn_up": (mlp, hidden),
            "ffn_down": (hidden, mlp),
        }
        if _has_experts(config):
            ffn = {f"{name}_exps": (config.num_experts, *size) for name, size in ffn.items()}
            ffn[ROUTER.removesuffix(".weight")] = (config.num_experts, hidden)
        block |= ffn
        if config.model_type != "llama":
            block |= {"attn_q_norm": (config.head_dim,), "attn_k_norm": (config.head_dim,)}
        for name, shape in block.items():
            yield f"blk.{i}.{name}.weight", shape


def quantize(package: str, source: Path, target: Path, file_format: str, threads: int) -> None:
    """In a process of its own, see `main`: two packages must not be loaded together. Raises RuntimeError if it fails."""
    command = [sys.executable, "-m", MODULE, "quantize", package, str(source), str(target), file_format, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{package} could not make {target.name}: {done.stderr.strip().splitlines()[-1:]}")


class _QuantizeParameters(ctypes.Structure):
    """llama_model_quantize_params begins like this in every version; what follows is longer in some than in others."""

    _fields_ = (("threads", ctypes.c_int32), ("file_format", ctypes.c_int32), ("rest", ctypes.c_uint8 * 504))


def _quantize(package: str, source: str, target: str, file_format: str, threads: str) -> None:
    library = _library(bindings(package))
    library.llama_model_quantize_default_params.restype = _QuantizeParameters
    library.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p]
    parameters = library.llama_model_quantize_default_params()
    parameters.threads, parameters.file_format = int(threads), FORMATS[file_format]
    unfinished = f"{target}.{os.getpid()}"
    if library.llama_model_quantize(source.encode(), unfinished.encode(), ctypes.byref(parameters)):
        raise RuntimeError(f"llama_model_quantize refused {source}")
    os.replace(unfinished, target)


def _library(module: Any) -> Any:
    return module._lib


def buffers_that_run(package: str, file: Path, threads: int) -> str:
    """`EXTRA`, or `PLAIN` where a prompt in extra buffers ends the process: 0.3.36 built for Sapphire Rapids, with AMX, does."""
    code = f"import sys; from {MODULE} import LlamaCpp; LlamaCpp(*sys.argv[1:3], {threads}, 64).prompt(32)"
    tried = subprocess.run([sys.executable, "-c", code, package, str(file)], capture_output=True)
    return EXTRA if tried.returncode == 0 else PLAIN


# ---- a process that runs one file -----------------------------------------------------------------------------------


class LlamaCpp:
    """One file, one sequence, greedy without sampling: logits are read, nothing is made of them."""

    def __init__(self, package: str, file: str, threads: int, context: int, buffers: str = EXTRA) -> None:
        self.api = api = bindings(package)
        loading = api.llama_model_default_params()
        if buffers == PLAIN:
            loading.use_extra_bufts = False
        self.model = api.llama_model_load_from_file(file.encode(), loading)
        if not self.model:
            raise RuntimeError(f"{package} cannot load {file}")
        parameters = api.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch = context, 512
        parameters.n_threads = parameters.n_threads_batch = threads
        self.context = api.llama_init_from_model(self.model, parameters)
        self.past = 0
        self.nbytes = os.path.getsize(file)

    def _run(self, count: int) -> None:
        api = self.api
        batch = api.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for i in range(count):
            at = self.past + i  # a router chooses by the token: never the same one twice in a row
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = 3 + at % 500, at, 1, 0
            batch.logits[i] = i == count - 1
        if api.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        api.llama_get_logits_ith(self.context, count - 1)
        api.llama_batch_free(batch)
        self.past += count

    def _forget(self, past: int) -> None:
        """Keep the first `past` tokens."""
        if hasattr(self.api, "llama_get_memory"):
            self.api.llama_memory_seq_rm(self.api.llama_get_memory(self.context), 0, past, -1)
        else:
            remove = _library(self.api).llama_kv_cache_seq_rm
            remove.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]
            remove(self.context, 0, past, -1)
        self.past = past

    def prompt(self, tokens: int) -> float:
        self._forget(0)
        started = time.perf_counter()
        self._run(tokens)
        return time.perf_counter() - started

    def decode(self, context: int, tokens: int) -> list[float]:
        self._forget(min(context, self.past))
        while self.past < context:
            self._run(min(512, context - self.past))
        taken = []
        for _ in range(tokens):
            started = time.perf_counter()
            self._run(1)
            taken.append(time.perf_counter() - started)
        return taken


if __name__ == "__main__":
    if sys.argv[1] == "quantize":
        _quantize(*sys.argv[2:])
    else:
        serve(lambda: LlamaCpp(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]))
