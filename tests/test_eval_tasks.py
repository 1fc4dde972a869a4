"""`pyllmq eval --tasks`: lm-evaluation-harness on a packed folder, with a task that a folder defines; clear errors without it."""

import json
import sys

import pytest
import torch

import pyllmq
from pyllmq.cli import main

from . import models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("eval") / "m"
    model = models.tiny_llama(num_hidden_layers=1)
    pyllmq.swap_linear(model, lambda linear: pyllmq.CodebookLinear.from_dense(linear, 4))
    pyllmq.save_pretrained(model, path, models.tiny_tokenizer())
    return path


QUESTIONS = [
    {"question": "The first letter is", "choices": ["a", "zebra crossing"], "answer": 0},
    {"question": "Two and two are", "choices": ["four", "a", "the"], "answer": 0},
    {"question": "Python is a", "choices": ["language", "integer object"], "answer": 1},
]


def write_task(folder, name):
    """A task of the questions above, as a user would define one."""
    folder.mkdir(exist_ok=True)
    data = folder / "questions.jsonl"
    data.write_text("\n".join(json.dumps(question) for question in QUESTIONS))
    (folder / "own.yaml").write_text(
        f"task: {name}\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\n'
        'doc_to_choice: "{{choices}}"\n'
        "doc_to_target: answer\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )


def choices_of(model, tokenizer):
    """Share of the questions whose answer is the likeliest continuation, by hand."""
    right = []
    for question in QUESTIONS:
        scores = []
        for choice in question["choices"]:
            context = tokenizer(question["question"])["input_ids"]
            whole = tokenizer(question["question"] + " " + choice)["input_ids"]
            with torch.inference_mode():
                logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(float(logits[i - 1, whole[i]]) for i in range(len(context), len(whole))))
        right.append(max(range(len(scores)), key=scores.__getitem__) == question["answer"])
    return sum(right) / len(right)


def test_tasks_of_a_packed_folder(folder, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'pyllmq-kernels[eval]')")
    write_task(tmp_path, "own_questions")
    arguments = ["eval", str(folder), "--tasks", "own_questions", "--task-folder", str(tmp_path)]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    from pyllmq.loading import load_causal_model, load_tokenizer

    expected = choices_of(load_causal_model(folder), load_tokenizer(folder))
    assert found["own_questions"]["acc"] == pytest.approx(expected)
    assert main([*arguments, "--limit", "1"]) == 0
    assert "own_questions  " in capsys.readouterr().out
    assert main(["eval", str(folder), "--tasks", "no_such_task"]) == 1
    assert "no task 'no_such_task'" in capsys.readouterr().err


def test_without_lm_eval_the_error_says_what_to_install(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", str(folder), "--tasks", "piqa"]) == 1
    assert "pip install 'pyllmq-kernels[eval]'" in capsys.readouterr().err
