"""How close a packed model is to the dense one: perplexity for causal models, embedding cosine for encoders, speed for both."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .compression.calibration import Batch, within_positions


@dataclass(frozen=True)
class Perplexity:
    """`perplexity` over `tokens` predicted tokens in windows of `seqlen`; `tokens_per_second` of those forward passes."""

    perplexity: float
    tokens: int
    seqlen: int
    tokens_per_second: float


@torch.inference_mode()
def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    seqlen: int = 512,
    max_tokens: int | None = None,
    progress: bool = False,
) -> Perplexity:
    """exp(mean negative log-likelihood) of `text`, cut into windows of `seqlen` tokens without overlap.

    The first token of each window is not predicted; a last window of one token is dropped. Raises ValueError for a text of
    fewer than two tokens, or windows longer than the model's learned positions.
    """
    if seqlen < 2:
        raise ValueError(f"seqlen is {seqlen}; at least 2 tokens are needed to predict one")
    stream = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0][:max_tokens]
    if len(stream) < 2:
        raise ValueError(f"the text has {len(stream)} tokens; perplexity needs at least 2")
    windows = [w for w in stream.split(seqlen) if len(w) > 1]
    device = next(model.parameters()).device
    model.eval()
    loss, predicted, seconds = 0.0, 0, 0.0
    for window in tqdm(windows, disable=not progress, unit="window"):
        ids = window.unsqueeze(0).to(device)
        started = time.perf_counter()
        with within_positions(model, len(window)):
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        seconds += time.perf_counter() - started
        loss += float(nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="sum"))
        predicted += len(window) - 1
    return Perplexity(math.exp(loss / predicted), predicted, seqlen, predicted / max(seconds, 1e-9))


@dataclass(frozen=True)
class Decoding:
    """Speed of `generate` with one sequence: `tokens_per_second` of `tokens` new tokens, prompt processing included."""

    tokens: int
    tokens_per_second: float


@torch.inference_mode()
def decoding_speed(model: Any, tokenizer: Any, prompt: str, new_tokens: int = 32) -> Decoding:
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(next(model.parameters()).device)
    with within_positions(model, ids.shape[1] + new_tokens):
        model.generate(ids, max_new_tokens=2, do_sample=False)
        started = time.perf_counter()
        out = model.generate(ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
    made = out.shape[1] - ids.shape[1]
    return Decoding(made, made / (time.perf_counter() - started))


def harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    task_folder: str | None = None,
    fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """Task -> metric -> value of tasks of lm-evaluation-harness, packed or dense models alike.

    Args:
        tasks: names that lm-eval knows, or that files in `task_folder` (YAML, in its format) define.
        fewshot: examples before each question; None is the task's own number.
        limit: evaluate only the first ones of each task.

    Raises ImportError where lm-eval is not installed, ValueError for an unknown task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            f"tasks need lm-eval ({error}); install it with: pip install 'pyllmq-kernels[eval]'"
        ) from error
    manager = TaskManager(include_path=task_folder)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ValueError(f"lm-eval knows no task {', '.join(map(repr, unknown))}; `lm_eval ls tasks` lists them")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = simple_evaluate(
        wrapped, tasks=list(tasks), num_fewshot=fewshot, limit=limit, task_manager=manager, bootstrap_iters=0
    )
    return {
        task: {
            metric.removesuffix(",none"): float(value)
            for metric, value in metrics.items()
            if isinstance(value, int | float) and "stderr" not in metric
        }
        for task, metrics in found["results"].items()
    }


@torch.inference_mode()
def sentence_embeddings(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Mean of the last hidden states over the tokens of each sentence, normalised to length 1: [sentences, hidden]."""
    model.eval()
    device = next(model.parameters()).device
    found = []
    for batch in batches:
        batch = {key: value.to(device) for key, value in batch.items()}
        hidden = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1).float()
        found.append((hidden * mask).sum(1) / mask.sum(1))
    return nn.functional.normalize(torch.cat(found), dim=-1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity row by row: [n]."""
    return nn.functional.cosine_similarity(a, b, dim=-1)
