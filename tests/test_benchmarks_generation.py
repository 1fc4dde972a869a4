"""`pyllmq bench --model --rivals`: systems in processes of their own, what is made of their times. No test asserts a speed."""

from __future__ import annotations

import csv
import math
import sys
from dataclasses import replace

import pytest
import torch

from pyllmq.benchmarks import generation, llama_cpp, transformers_worker
from pyllmq.benchmarks.worker import Worker
from pyllmq.cli import main

TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "head_dim": 16, "max_position_embeddings": 128,
}  # fmt: skip


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(transformers_worker.SHAPES, "tiny", ("llama", TINY))
    monkeypatch.setitem(transformers_worker.SHAPES, "tiny experts", ("qwen3_moe", TINY | MOE))
    threads = torch.get_num_threads()
    yield "tiny"
    torch.set_num_threads(threads)


STUB = """
import sys
from pyllmq.benchmarks.worker import serve
class Stub:
    nbytes = 7
    def prompt(self, tokens): print("noise on stdout"); return tokens / 2
    def decode(self, context, tokens):
        if context > 9: raise ValueError(f"no room for {context}")
        return [context + 0.5] * tokens
if sys.argv[1] == "broken": raise SystemExit("cannot start")
serve(Stub)
"""


def test_a_process_answers_and_says_why_it_ends(tmp_path, monkeypatch):
    (tmp_path / "stub_system.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(p for p in sys.path if p)}")
    worker = Worker("stub_system", ["works"])
    assert worker.nbytes == 7
    assert worker.ask("prompt", tokens=3) == 1.5
    assert worker.ask("decode", context=4, tokens=2) == [4.5, 4.5]
    assert worker.ask("peak") is None or worker.ask("peak") > 1 << 20
    with pytest.raises(RuntimeError, match="no room for 10"):
        worker.ask("decode", context=10, tokens=1)
    worker.close()
    broken = Worker("stub_system", ["broken"])
    with pytest.raises(RuntimeError, match="cannot start"):
        _ = broken.nbytes
    broken.close()


@pytest.mark.parametrize("bits, fused", [("2.1+0.005", "1"), ("dense", "0")])
def test_a_model_of_a_shape_generates_in_its_cache(tiny, bits, fused):
    system = transformers_worker.make(tiny, bits, "fast", "bfloat16", fused, "1")
    assert system.prompt(9) > 0
    for context in (20, 20, 30):
        assert len(system.decode(context, 3)) == 3
        assert list(system.caches) == [context] and system.caches[context].get_seq_length() == context
    parameters = sum(math.prod(shape) for _, shape in llama_cpp.tensors(transformers_worker.config_of(tiny)))
    assert (system.nbytes < 2 * parameters) == (bits != "dense")


def test_a_model_with_experts_is_packed_whole_and_given_other_tokens_each_time(tiny):
    system = transformers_worker.make("tiny experts", "4", "high", "bfloat16", "1", "1")
    assert not any(p.dim() == 3 for p in system.model.parameters())
    chosen = []
    system.model.model.layers[0].mlp.experts.register_forward_pre_hook(
        lambda _, given: chosen.append(given[1].tolist())
    )
    assert len(system.decode(20, 8)) == 8
    assert len({str(index) for index in chosen}) > 1
    ids, scores = torch.arange(6)[None], torch.randn(1, 512)
    assert int(transformers_worker._next_in_turn(ids, scores).argmax()) == 9


@pytest.mark.parametrize("model_type, tied", [("llama", False), ("qwen3", True), ("qwen3_moe", False)])
def test_a_gguf_file_has_the_tensors_of_the_model(model_type, tied):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **TINY, **(MOE if "moe" in model_type else {}), tie_word_embeddings=tied)
    with torch.device("meta"):
        parameters = dict(AutoModelForCausalLM.from_config(config).named_parameters())
    # A GGUF file has gate and up of the experts in two tensors.
    wanted = [
        part for name, p in parameters.items() for part in (p.chunk(2, 1) if name.endswith("gate_up_proj") else [p])
    ]
    assert sorted(shape for _, shape in llama_cpp.tensors(config)) == sorted(tuple(p.shape) for p in wanted)
    config.model_type = "gpt2"
    with pytest.raises(ValueError, match="known: llama, qwen3"):
        llama_cpp.write_gguf("never.gguf", config)


def row(system, weights, mode, context, decode, prompt=100.0):
    cells = {"model": "m", "weights_mb": 600.0, "first_token_s": 256 / prompt, "peak_mb": 900.0, "rounds": 1, "others_cpu": 0.5,
             "threads": 2, "device": "d", "torch": "t", "pyllmq": "p", "commit": "c", "timestamp": "now"}  # fmt: skip
    return generation.GenerationRow(
        system=system, weights=weights, mode=mode, context=context, decode_per_s=decode, prompt_per_s=prompt, **cells
    )


def test_ratios_are_to_the_faster_rival_of_the_same_bits(tmp_path):
    rows = [
        row("pyllmq", "4", "fused high", 300, 40.0, 90.0),
        row("pyllmq", "4", "unfused high", 300, 10.0),
        row("pyllmq", "2", "fused high", 300, 60.0),
        row("llama.cpp", "Q4_0", "", 300, 20.0, 60.0),
        row("ik_llama.cpp", "Q4_0", "", 300, 25.0, 50.0),
        row("ik_llama.cpp", "Q4_K_M", "", 300, 99.0),
        row("torch", "bfloat16", "", 300, 5.0),
    ]
    rows += [replace(r, context=2000, decode_per_s=r.decode_per_s / 2) for r in rows[:1]]
    text = "\n".join(generation.ratios(rows))
    assert " 1.60  (bar 1.25, goal 1.7)      40.0 /   25.0 ik_llama.cpp Q4_0" in text
    assert " 1.50  (bar 0.9, goal 1.2)      90.0 /   60.0 llama.cpp Q4_0" in text
    assert " 8.00  (bar 6.0, goal 9.0)      40.0 /    5.0 torch bfloat16" in text
    assert "900 MB (bar 1050: 1.25 x weights + 300 MB)" in text
    assert "Q4_K_M" not in text and " 2 bits  " in text and "Q2_K" not in text and "at 2000" not in text
    assert "others" not in generation.table(rows) and "50%" in generation.table(rows)
    generation.draw(rows, tmp_path / "deep" / "plot.png")
    assert (tmp_path / "deep" / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_systems_take_turns_and_rows_are_kept(tmp_path, monkeypatch, capsys):
    asked = []

    class Stub:
        nbytes = 1_000_000

        def __init__(self, module, arguments):
            self.name = arguments[1] + arguments[4]

        def ask(self, what, **given):
            asked.append((self.name, what))
            return {"prompt": 0.5, "peak": 2_000_000, "decode": [9.0] * 3 + [0.25] * (given.get("tokens", 3) - 3)}[what]

        def close(self):
            asked.append((self.name, "close"))

    monkeypatch.setattr(generation, "Worker", Stub)
    monkeypatch.setattr(llama_cpp, "installed", dict)
    rows = generation.run_generation(
        "TinyLlama-1.1B", bits="4", contexts=(20, 30), prompt=8, rounds=2, dense=(), csv=tmp_path / "r.csv"
    )
    assert [(r.context, r.mode) for r in rows] == [(c, m) for c in (20, 30) for m in ("fused high", "unfused high")]
    assert all((r.decode_per_s, r.prompt_per_s, r.weights_mb, r.peak_mb) == (4.0, 16.0, 1.0, 2.0) for r in rows)
    turns = [name for name, what in asked if what == "decode"]
    assert turns == ["41", "40"] * 6 and asked[-2:] == [("40", "close"), ("41", "close")]
    said = capsys.readouterr().out
    assert "llama.cpp is left out" in said and "pip install ik-llama-cpp-python" in said
    with (tmp_path / "r.csv").open(newline="") as file:
        assert [line["context"] for line in csv.DictReader(file)] == ["20", "20", "30", "30"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "no-such"], "no folder and no shape; shapes: TinyLlama-1.1B, Llama-3.2-1B, Qwen3-0.6B"),
        (["--model", "Qwen3-0.6B", "--rivals", "vllm"], "allowed: none, llama.cpp, ik_llama.cpp"),
        (["--model", "Qwen3-0.6B", "--rivals", "none", "--bits", "9"], "allowed: 1 to 8"),
    ],
)
def test_bad_input(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *options]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
