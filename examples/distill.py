"""Distil a small language model from a larger one with transformers' Trainer, with and without the Sinkhorn term of SinKD.

    python examples/distill.py

Needs nothing else: the text is the reference manual that CPython carries; the tokenizer and the teacher are trained on it first. A
few minutes on 2 CPU cores. OUT keeps the teacher and the result of each student; run again, and only what is missing is done.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from pyllmq.compression import calibration
from pyllmq.losses import SinkhornDistillationLoss

VOCABULARY = 512
LENGTH = 64
BATCH = 16
TEACHER = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}
STUDENT = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
# The Sinkhorn term compares every token with the others of its group of 64.
LOSSES = {
    "labels": SinkhornDistillationLoss(weight=0.0, kl_weight=0.0, cross_entropy_weight=1.0),
    "labels + KL": SinkhornDistillationLoss(weight=0.0),
    "labels + KL + Sinkhorn": SinkhornDistillationLoss(group=64),
}


def token_windows() -> tuple[Tensor, Tensor]:
    """Windows [n, LENGTH] to train on and to test on; every tenth paragraph is for the test."""
    paragraphs = calibration.builtin_paragraphs()
    test = paragraphs[::10]
    train = [paragraph for i, paragraph in enumerate(paragraphs) if i % 10]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        train, trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    )
    streams = (torch.tensor(tokenizer.encode("\n".join(text)).ids) for text in (train, test))
    first, second = (stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH) for stream in streams)
    return first, second


def new_model(sizes: dict[str, int]) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, tie_word_embeddings=True, **sizes)
    )


class DistillationTrainer(Trainer):
    def __init__(self, teacher: LlamaForCausalLM | None, loss: SinkhornDistillationLoss, **options: Any) -> None:
        super().__init__(**options)
        self.teacher, self.distillation_loss = teacher, loss

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        """Position t predicts token t + 1, so the last logits and the first label have no partner."""
        outputs = model(input_ids=inputs["input_ids"])
        student = outputs.logits[:, :-1]
        teacher = student
        if self.teacher is not None:
            with torch.no_grad():
                teacher = self.teacher(input_ids=inputs["input_ids"]).logits[:, :-1]
        loss = self.distillation_loss(student, teacher, inputs["labels"][:, 1:])
        return (loss, outputs) if return_outputs else loss


def train(
    model: LlamaForCausalLM,
    teacher: LlamaForCausalLM | None,
    loss: SinkhornDistillationLoss,
    windows: Tensor,
    steps: int,
    seed: int,
    folder: Path,
) -> None:
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        weight_decay=0.1,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
    )
    examples = [{"input_ids": window, "labels": window} for window in windows]
    DistillationTrainer(teacher, loss, model=model, args=arguments, train_dataset=examples).train()
    model.eval()


@torch.no_grad()
def measure(student: LlamaForCausalLM, teacher: LlamaForCausalLM, windows: Tensor) -> dict[str, float]:
    """On held-out text: perplexity, KL(teacher || student) in nats, and how often both prefer the same token."""
    nats = divergence = agreed = tokens = 0.0
    for batch in windows.to(student.device).split(BATCH):
        mine, other = (model(input_ids=batch).logits[:, :-1].float() for model in (student, teacher))
        nats += float(F.cross_entropy(mine.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
        logs = (F.log_softmax(logits, -1) for logits in (mine, other))
        divergence += float(F.kl_div(*logs, reduction="sum", log_target=True))
        agreed += float((mine.argmax(-1) == other.argmax(-1)).sum())
        tokens += batch[:, 1:].numel()
    return {"perplexity": math.exp(nats / tokens), "kl": divergence / tokens, "agreement": agreed / tokens}


def make_teacher(folder: Path, windows: Tensor, steps: int) -> LlamaForCausalLM:
    """Trained, or loaded from where an earlier run left it."""
    if not (folder / "teacher").exists():
        set_seed(0)
        teacher = new_model(TEACHER)
        train(teacher, None, LOSSES["labels"], windows, steps, 0, folder)
        shutil.rmtree(folder / "teacher.part", ignore_errors=True)
        teacher.save_pretrained(folder / "teacher.part")
        os.replace(folder / "teacher.part", folder / "teacher")
    teacher = LlamaForCausalLM.from_pretrained(folder / "teacher").eval()
    return teacher.to("cuda" if torch.cuda.is_available() else "cpu")


def write_whole(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)


def table(rows: list[dict[str, Any]], teacher: dict[str, float]) -> str:
    """One line for each loss, its seeds averaged, the spread of perplexity over them beside it."""
    lines = [
        "| trained on | perplexity | lowest to highest | KL from the teacher | same first choice |",
        "|---|--:|--:|--:|--:|",
        f"| the teacher itself | {teacher['perplexity']:.2f} | | 0 | 100 % |",
    ]
    for name in LOSSES:
        of_name = [row for row in rows if row["loss"] == name]
        average = {key: mean(row[key] for row in of_name) for key in ("perplexity", "kl", "agreement")}
        found = [row["perplexity"] for row in of_name]
        lines.append(
            f"| {name} | {average['perplexity']:.2f} | {min(found):.2f} to {max(found):.2f} | {average['kl']:.4f} "
            f"| {100 * average['agreement']:.1f} % |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("distill_output"))
    parser.add_argument("--teacher-steps", type=int, default=250)
    parser.add_argument("--steps", type=int, default=150, help="of each student")
    parser.add_argument("--seeds", type=int, default=2, help="students for each loss")
    given = parser.parse_args()
    transformers_logging.disable_progress_bar()
    given.out.mkdir(parents=True, exist_ok=True)
    windows, held_out = token_windows()
    teacher = make_teacher(given.out, windows, given.teacher_steps)

    rows = []
    for seed in range(given.seeds):
        for name, loss in LOSSES.items():
            result = given.out / f"{name.replace(' + ', '-').lower()}-{given.steps}-{seed}.json"
            if not result.exists():
                set_seed(seed)
                student = new_model(STUDENT)
                started = time.perf_counter()
                train(student, teacher, loss, windows, given.steps, seed, given.out)
                seconds = time.perf_counter() - started
                found = {"loss": name, "seed": seed, "seconds": seconds, **measure(student, teacher, held_out)}
                write_whole(result, json.dumps(found, indent=1) + "\n")
            rows.append(json.loads(result.read_text()))

    text = table(rows, measure(teacher, teacher, held_out))
    write_whole(given.out / "table.txt", text + "\n")
    millions = [sum(p.numel() for p in model.parameters()) / 1e6 for model in (teacher, new_model(STUDENT))]
    print(f"\nteacher {millions[0]:.2f} M parameters, student {millions[1]:.2f} M; {torch.get_num_threads()} threads")
    print(f"{given.steps} steps of {BATCH * LENGTH} tokens, {given.seeds} seeds, {held_out.numel()} held-out tokens")
    print(text)
    print(f"written to {given.out}/: teacher/, one .json for each student, table.txt")


if __name__ == "__main__":
    main()
