"""Text in, calibration batches out. Batches are dicts of tensors, as a model's forward takes them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..loading import is_causal

Batch = dict[str, Tensor]


def builtin_paragraphs() -> list[str]:
    """English technical prose that is on every machine: the reference manual that CPython carries for its help()."""
    from pydoc_data.topics import topics

    paragraphs = []
    for name in sorted(topics):
        for block in re.split(r"\n\s*\n", topics[name]):
            text = re.sub(r"\s+", " ", block).strip()
            # Prose only: grammar rules, code and tables have few letters or open with a prompt.
            letters = sum(c.isalpha() or c == " " for c in text)
            if len(text) >= 60 and letters >= 0.85 * len(text) and not text.startswith((">>>", "...")):
                paragraphs.append(text)
    return list(dict.fromkeys(paragraphs))


def builtin_sentences() -> list[str]:
    """Sentences of `builtin_paragraphs`, 6 to 60 words each, no duplicates."""
    found = (s.strip() for p in builtin_paragraphs() for s in re.split(r"(?<=[.!?])\s+(?=[A-Z])", p))
    return list(dict.fromkeys(s for s in found if 6 <= len(s.split()) <= 60))


def in_parts(text: str, characters: int = 1 << 14) -> list[str]:
    """A text in parts that end with a line, each of about so many characters; nothing of it is lost."""
    parts = [""]
    for line in text.splitlines(keepends=True):
        if len(parts[-1]) >= characters:
            parts.append("")
        parts[-1] += line
    return parts


def sentence_batches(
    tokenizer: Any, sentences: Sequence[str], batch_size: int = 16, max_length: int = 128
) -> list[Batch]:
    """Batches with an attention mask, for encoders; padded, if there is more than one sentence in each."""
    how = {"padding": batch_size > 1, "truncation": True, "max_length": max_length, "return_tensors": "pt"}
    begins = range(0, len(sentences), batch_size)
    return [dict(tokenizer(list(sentences[begin : begin + batch_size]), **how)) for begin in begins]


def token_windows(tokenizer: Any, text: str, samples: int, seqlen: int, seed: int = 0) -> list[Batch]:
    """`samples` windows of `seqlen` tokens from one stream of text, at random places without overlap, for causal models."""
    if samples < 1 or seqlen < 1:
        raise ValueError(f"samples is {samples} and seqlen {seqlen}; both must be at least 1")
    stream = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    whole = len(stream) // seqlen
    if whole == 0:
        raise ValueError(
            f"the calibration text has {len(stream)} tokens, fewer than one window of {seqlen}; give more text or a smaller seqlen"
        )
    order = torch.randperm(whole, generator=torch.Generator().manual_seed(seed))[:samples].sort().values
    return [{"input_ids": stream[i * seqlen : (i + 1) * seqlen].unsqueeze(0)} for i in order.tolist()]


def batches_of_text(model: Any, tokenizer: Any, text: str | None, samples: int, seqlen: int) -> list[Batch]:
    """Batches for any model of text: windows for causal ones, sentences (the lines of `text`) for the others.

    None is the text that is on every machine. No window is longer than the model's positions. Decoders that have ids of their
    own are given those of the encoder, shifted by one.
    """
    seqlen = min(seqlen, positions(model) or seqlen)
    if is_causal(model):
        whole = "\n\n".join(builtin_paragraphs()) if text is None else text
        return token_windows(tokenizer, whole, samples, seqlen)
    sentences = builtin_sentences() if text is None else [line.strip() for line in text.splitlines() if line.strip()]
    if not sentences:
        raise ValueError("the calibration text holds no line with text; give one sentence or more, each on a line")
    # A classifier by the last token needs its padding token to find it.
    padded = tokenizer.pad_token is not None and model.config.pad_token_id is not None
    batches = sentence_batches(tokenizer, sentences[:samples], 16 if padded else 1, max_length=seqlen)
    if getattr(model.config, "is_encoder_decoder", False):
        for batch in batches:
            batch["decoder_input_ids"] = after_start(batch["input_ids"], model.config)
            batch["decoder_attention_mask"] = batch["attention_mask"]
    return batches


@contextmanager
def within_positions(model: Any, tokens: int | Iterable[Batch]) -> Iterator[None]:
    """Says which limit a model of learned positions was asked to exceed, where torch reports an index or a size.

    `tokens`: how many, or the batches with them.
    """
    if not isinstance(tokens, int):
        tokens = max((batch["input_ids"].shape[-1] for batch in tokens if "input_ids" in batch), default=0)
    try:
        yield
    except (IndexError, RuntimeError) as error:
        limit = positions(model)
        said = isinstance(error, IndexError) or any(words in str(error) for words in ("size of", "out of bounds"))
        if limit is None or tokens <= limit or not said:
            raise
        raise ValueError(f"{tokens} tokens were asked for, and the model has {limit} positions; give fewer") from error


def positions(model: Any) -> int | None:
    """How many tokens the model has positions for; None: any number."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):  # of a model of images and text
        config = config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", None)]
    for name, module in model.named_modules():
        # RoBERTa and its kin count from the padding's id on.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min((limit for limit in limits if limit), default=None)


def self_written(model: Any, tokenizer: Any, samples: int, seqlen: int, progress: bool) -> list[Batch]:
    """`self_generated` in windows that the model has positions for. Raises ValueError for a model that writes no text."""
    if not is_causal(model):
        raise ValueError(f"{type(model).__name__} writes no text; --calibration self needs a causal language model")
    return self_generated(model, tokenizer, samples, min(seqlen, positions(model) or seqlen), progress=progress)


SAMPLING: dict[str, Any] = {"temperature": 0.6, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.2}
"""How a model continues its prefixes for `self_generated`: as arXiv 2410.17711 does, like the next two."""
PREFIX_TOKENS = 2
DROP = 0.2
"""Share of the texts that is thrown away, those of the highest perplexity for the model itself."""


def self_generated(
    model: Any,
    tokenizer: Any,
    samples: int,
    seqlen: int,
    *,
    prefixes: Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = False,
) -> list[Batch]:
    """`samples` windows of `seqlen` tokens that a causal model wrote itself: what it was trained on, as near as one can get.

    The model continues the first tokens of `prefixes` (paragraphs of `builtin_paragraphs`) up to `seqlen` tokens or its own
    end of text. Texts that it finds unlikely are dropped; the others are strung together and cut.

    Raises:
        ValueError: samples or seqlen out of range, or a model that ends its texts at once.
    """
    if samples < 1 or seqlen <= PREFIX_TOKENS:
        raise ValueError(
            f"samples is {samples}, seqlen {seqlen}, prefix_tokens {PREFIX_TOKENS}; samples must be at least 1, seqlen above "
            "prefix_tokens"
        )
    device = next(model.parameters()).device
    starts = _starts(tokenizer, builtin_paragraphs() if prefixes is None else prefixes, PREFIX_TOKENS, seed)
    training, wanted, texts, found = model.training, samples * seqlen / (1 - DROP), [], 0
    model.eval()
    try:
        with torch.random.fork_rng(), tqdm(total=round(wanted), disable=not progress, unit="token") as bar:
            torch.manual_seed(seed)
            for begin in itertools.count(0, batch_size):
                # Three times as many as would be needed at full length: a model that ends sooner than that has no text to give.
                if begin >= 3 * wanted / seqlen + batch_size:
                    raise ValueError(
                        f"the model wrote {found} tokens in {begin} texts, too few for {samples} windows of {seqlen}: it ends its "
                        "texts early; ask for fewer or shorter windows, or give text of your own"
                    )
                chosen = [starts[i % len(starts)] for i in range(begin, begin + batch_size)]
                for text, surprise in _continued(model, tokenizer, torch.stack(chosen).to(device), seqlen):
                    texts.append((surprise, text))
                    found += len(text)
                    bar.update(len(text))
                texts_by_surprise = sorted(range(len(texts)), key=lambda i: texts[i][0])
                kept = sorted(texts_by_surprise[: math.ceil((1 - DROP) * len(texts))])
                stream = torch.cat([texts[i][1] for i in kept])
                if len(stream) >= samples * seqlen:
                    break
    finally:
        model.train(training)
    return [{"input_ids": window[None]} for window in stream[: samples * seqlen].split(seqlen)]


def _starts(tokenizer: Any, prefixes: Sequence[str], tokens: int, seed: int) -> list[Tensor]:
    """The first `tokens` ids of each prefix, int64 [tokens], in random order, none twice."""
    ids = {tuple(tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]) for text in prefixes}
    starts = sorted(start for start in ids if len(start) == tokens)
    if not starts:
        raise ValueError(f"none of {len(prefixes)} prefixes has {tokens} tokens; give longer ones")
    order = torch.randperm(len(starts), generator=torch.Generator().manual_seed(seed)).tolist()
    return [torch.tensor(starts[i]) for i in order]


@torch.no_grad()
def _continued(model: Any, tokenizer: Any, starts: Tensor, seqlen: int) -> list[tuple[Tensor, float]]:
    """(token ids on the CPU, mean negative log-likelihood of those that were not given) of each continued start."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = torch.tensor([] if ends is None else ends, dtype=torch.int64).reshape(-1)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else int(ends[0]) if len(ends) else 0
    given = starts.shape[1]
    how = SAMPLING | {"do_sample": True, "max_new_tokens": seqlen - given, "pad_token_id": pad}
    ids = model.generate(starts, attention_mask=torch.ones_like(starts), **how)
    ended = torch.isin(ids[:, given:], ends.to(ids.device)).int()
    real = torch.cat([torch.ones_like(starts), (ended.cumsum(1) - ended == 0).to(starts)], 1)
    logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits
    written = real[:, given:]
    texts = []
    for row, length in enumerate(written.sum(1).tolist()):
        predicted = logits[row, given - 1 : given - 1 + length].float()
        surprise = torch.nn.functional.cross_entropy(predicted, ids[row, given : given + length])
        texts.append((ids[row, : given + length].cpu(), float(surprise)))
    return texts


LABELS = ("labels", "start_positions", "end_positions")
"""What a batch may hold for the loss; the model is not given it."""


def as_batches(calibration: Iterable[Any], model: Any) -> list[Batch]:
    """Whatever a user may pass as calibration -> a list of keyword dicts. A decoder is given its labels, shifted by one."""
    if isinstance(calibration, Tensor | str | Mapping):
        raise ValueError(
            f"calibration is a single {type(calibration).__name__}; give a list of batches: token id tensors [B, L], or dicts such "
            "as a tokenizer returns with return_tensors='pt'"
        )
    batches = []
    for i, batch in enumerate(calibration):
        if isinstance(batch, Tensor):
            batch = {"input_ids": batch}
        if not isinstance(batch, Mapping) or not batch or not all(isinstance(v, Tensor) for v in batch.values()):
            raise ValueError(
                f"calibration batch {i} is a {type(batch).__name__}; allowed: a tensor of token ids, or a dict of tensors"
            )
        batches.append(_with_decoder_ids(dict(batch), model))
    if not batches or not any(v.numel() for b in batches for v in b.values()):
        raise ValueError("calibration is empty; give at least one batch, better 128 sequences of real text")
    return batches


def _with_decoder_ids(batch: Batch, model: Any) -> Batch:
    config, labels = getattr(model, "config", None), batch.get("labels")
    writes = getattr(config, "is_encoder_decoder", False) and getattr(model, "can_generate", lambda: False)()
    if writes and labels is not None and "decoder_input_ids" not in batch:
        ids = labels.masked_fill(labels < 0, getattr(config, "pad_token_id", None) or 0)
        batch["decoder_input_ids"] = after_start(ids, config)
        batch.setdefault("decoder_attention_mask", (labels >= 0).long())
    return batch


def after_start(ids: Tensor, config: Any) -> Tensor:
    """What a decoder is given to write `ids` [B, L]: its start token and all but the last of them."""
    known = (getattr(config, name, None) for name in ("decoder_start_token_id", "pad_token_id"))
    start = next((token for token in known if token is not None), 0)
    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], 1)


def given_to_model(batch: Batch, model: Any) -> Batch:
    """The arguments of its forward. Sounds and images, which processors make in float32, are in the model's own dtype."""
    dtype = getattr(model, "dtype", None)
    return {
        key: value.to(dtype) if isinstance(dtype, torch.dtype) and value.is_floating_point() else value
        for key, value in batch.items()
        if key not in LABELS
    }


def token_mask(batch: Batch, name: str, shape: Sequence[int], crossing: bool = False) -> Tensor | None:
    """Which of the tokens that a module works on are real, [B, L]; None: all, or nothing is known.

    Args:
        name: of the module; a decoder's tokens are those of its own ids.
        shape: (B, L) of its tokens.
        crossing: it is given what the encoder gave out.
    """
    ids, mask = batch.get("decoder_input_ids"), batch.get("attention_mask")
    if ids is not None and "decoder" in name and not crossing and ids.shape == shape:
        return batch.get("decoder_attention_mask")
    if mask is None or mask.dim() != 2 or len(mask) != shape[0] or ("vision" in name and "pixel_values" in batch):
        return None
    if mask.shape == shape:
        return mask
    if "input_ids" not in batch and 0 < shape[1] < mask.shape[1]:  # of sound: the encoder makes fewer frames of it
        return mask[:, torch.arange(shape[1], device=mask.device) * mask.shape[1] // shape[1]]
    return None
