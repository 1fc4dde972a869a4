"""Calibration text that a model writes itself."""

import math

import pytest
import torch
from torch import nn

from pyllmq.compression import calibration

from . import models


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of small operations: beside a busy core, torch's threads cost 8 ms for each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Scripted:
    """A causal model whose generation is known: text i has `lengths[i]` tokens, and some texts are unlikely to itself."""

    def __init__(self, lengths: list[int], unlikely: set[int], vocabulary: int = 50) -> None:
        self.lengths, self.unlikely, self.vocabulary, self.made = lengths, unlikely, vocabulary, 0
        self.training, self.calls = True, []
        self.generation_config = type("Generation", (), {"eos_token_id": [1, 2]})()

    def parameters(self):
        return iter([torch.zeros(1)])

    def eval(self):
        self.training = False

    def train(self, mode):
        self.training = mode

    def generate(self, starts, **settings):
        assert not self.training
        self.calls.append(settings)
        rows = []
        for _ in range(len(starts)):
            length = self.lengths[self.made % len(self.lengths)]
            marker = 10 + self.made % 30
            row = [marker] * min(length, settings["max_new_tokens"])
            if length <= settings["max_new_tokens"]:
                row[-1] = 2
            rows.append(row + [settings["pad_token_id"]] * (settings["max_new_tokens"] - len(row)))
            self.made += 1
        return torch.cat([starts, torch.tensor(rows)], 1)

    def __call__(self, input_ids, attention_mask, use_cache):
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        likely = torch.tensor([int(row[2]) - 10 not in self.unlikely for row in input_ids])
        chosen = nn.functional.one_hot(input_ids[:, 1:], self.vocabulary).float() * 5
        logits[:, :-1] = chosen * likely[:, None, None]
        return type("Output", (), {"logits": logits})()


class Words:
    pad_token_id = 0

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [3 + int(word) for word in text.split()]}


def test_unlikely_texts_are_dropped_and_ends_are_kept() -> None:
    model = Scripted(lengths=[8, 4, 99], unlikely={0, 5})
    prefixes = ["1 2 9", "1 2 8", "4 5", "6 0", "7"]
    windows = calibration.self_generated(model, Words(), 4, 10, prefixes=prefixes, batch_size=5, seed=3)
    assert [tuple(w["input_ids"].shape) for w in windows] == [(1, 10)] * 4 and model.training
    stream = torch.cat([w["input_ids"][0] for w in windows]).tolist()
    # "1 2" came twice and "7" is too short: three starts.
    assert {tuple(stream[i : i + 2]) for i in (0,)} <= {(4, 5), (7, 8), (9, 3)}
    markers = set(stream) & set(range(10, 40))
    assert not markers & {10, 15} and {11, 12} <= markers
    assert 2 in stream and 0 not in stream
    settings = model.calls[0]
    assert settings["max_new_tokens"] == 8 and settings["do_sample"]
    sampling = {key: settings[key] for key in ("temperature", "top_p", "top_k", "repetition_penalty")}
    assert sampling == {"temperature": 0.6, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.2}


def test_a_real_model_repeats_itself_with_the_seed_only() -> None:
    model, tokenizer = models.tiny_llama(), models.tiny_tokenizer()
    state = torch.random.get_rng_state()
    first, again, other = (
        calibration.self_generated(model, tokenizer, 3, 16, seed=seed, batch_size=4) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, other, strict=True))
    assert len(first) == 3 and first[0]["input_ids"].shape == (1, 16)


def test_a_model_without_text_and_bad_settings() -> None:
    with pytest.raises(ValueError, match="wrote .* tokens in .* texts, too few for 40 windows of 50"):
        calibration.self_generated(Scripted([1], set()), Words(), 40, 50, prefixes=["1 2"])
    with pytest.raises(ValueError, match="none of 1 prefixes has 2 tokens"):
        calibration.self_generated(Scripted([1], set()), Words(), 1, 5, prefixes=["1"])
    with pytest.raises(ValueError, match="samples is 0, seqlen 2, prefix_tokens 2"):
        calibration.self_generated(Scripted([1], set()), Words(), 0, 2)
    assert math.isclose(calibration.DROP, 0.2)
