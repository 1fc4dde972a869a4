"""Train a small causal language model on text that is on every machine: the documentation inside Python's standard library.

    python examples/train_tiny_lm.py --out tiny_lm                  # 4 M parameters, hidden size 256; about 10 minutes on 2 cores
    python examples/train_tiny_lm.py --out tiny_moe --experts 8     # 10 M, 2 experts a token: as much arithmetic as the above

Writes a folder that transformers loads (a Llama or Qwen3-MoE with its own tokenizer) and the texts beside it, disjoint by
paragraph: training.txt, calibration.txt, tuning.txt, evaluation.txt. It makes benchmarks of causal models possible without a
download.
"""

from __future__ import annotations

import argparse
import ast
import math
import sysconfig
import time
from pathlib import Path

import torch
from torch import nn

from pyllmq.compression.calibration import builtin_paragraphs

VOCABULARY = 2048
CHOICES = 2
BALANCE = 1e-4
"""Weight of the loss that shares tokens out over experts: so weak that some experts are chosen seldom, as in large models."""
# Paragraphs are dealt out in turn; of 20, so many go to each text.
SHARES = {"training": 16, "calibration": 1, "tuning": 2, "evaluation": 1}


def docstrings() -> list[str]:
    """Paragraphs of the docstrings of the standard library's own modules, in a fixed order, no duplicates."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, None] = {}
    for file in sorted(library.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(file.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                    text = " ".join(paragraph.split())
                    if len(text) >= 40 and not text.startswith(">>>"):
                        found[text] = None
    return list(found)


def split(paragraphs: list[str]) -> dict[str, str]:
    order = torch.randperm(len(paragraphs), generator=torch.Generator().manual_seed(0)).tolist()
    names = [name for name, share in SHARES.items() for _ in range(share)]
    texts: dict[str, list[str]] = {name: [] for name in SHARES}
    for place, index in enumerate(order):
        texts[names[place % len(names)]].append(paragraphs[index])
    return {name: "\n".join(parts) for name, parts in texts.items()}


def train_tokenizer(text: str):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def make_model(hidden: int, layers: int, experts: int, end: int):
    """A Llama, or a Qwen3-MoE whose chosen experts have the width of the Llama's MLP together."""
    from transformers import AutoConfig, AutoModelForCausalLM

    inner = round(hidden * 8 / 3 / 32) * 32
    sizes = {"vocab_size": VOCABULARY, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": hidden // 64,
             "max_position_embeddings": 512, "eos_token_id": end, "bos_token_id": None}  # fmt: skip
    if not experts:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", intermediate_size=inner, **sizes))
    routing = {"num_experts": experts, "num_experts_per_tok": CHOICES, "moe_intermediate_size": inner // CHOICES,
               "norm_topk_prob": True}  # fmt: skip
    sizes |= {"num_key_value_heads": hidden // 64, "head_dim": 64}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **routing, **sizes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tiny_lm"))
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=0, help="of each layer; 0: a dense model")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--minutes", type=float, default=15.0, help="stop after so long, whatever --steps says")
    given = parser.parse_args()

    torch.manual_seed(0)
    texts = split([*builtin_paragraphs(), *docstrings()])
    tokenizer = train_tokenizer(texts["training"])
    stream = torch.tensor(tokenizer(texts["training"], verbose=False)["input_ids"])
    model = make_model(given.hidden, given.layers, given.experts, tokenizer.eos_token_id)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {len(stream)} training tokens",
        flush=True,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    started, losses = time.monotonic(), []
    asked = {"output_router_logits": True} if given.experts else {}
    model.train()
    for step in range(given.steps):
        passed = (time.monotonic() - started) / (60 * given.minutes)
        progress = max(step / given.steps, passed)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min((step + 1) / 50, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        at = torch.randint(len(stream) - given.seqlen, (given.batch,))
        ids = torch.stack([stream[i : i + given.seqlen] for i in at.tolist()])
        output = model(input_ids=ids, use_cache=False, **asked)
        loss = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        losses.append(loss.item())
        loss = loss + BALANCE * output.aux_loss if given.experts else loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(
                f"step {step}: loss {sum(losses[-50:]) / len(losses[-50:]):.3f}, {time.monotonic() - started:.0f} s",
                flush=True,
            )
    given.out.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    for name, text in texts.items():
        (given.out / f"{name}.txt").write_text(text, encoding="utf-8")
    print(f"written to {given.out}; training loss {sum(losses[-50:]) / len(losses[-50:]):.3f}")


if __name__ == "__main__":
    main()
