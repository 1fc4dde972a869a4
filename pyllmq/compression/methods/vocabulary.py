"""A smaller vocabulary: the tokens that a text needs, and the rows of the embedding and head that belong to them.

OpenBA-V2 (arXiv 2405.05957, section 3.2) cuts vocabularies so; it keeps frequent tokens alone, which is wrong for BPE. There a
token is reached by merges, so what it is merged from stays as well. Any text can still be written: bytes and single characters
stay.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import nn

from ...config import Between, MethodConfig
from ...layers.linear import packed_modules
from ..calibration import in_parts
from .method import Method, Needs

TOKENIZER_FILE = "tokenizer.json"
ADDED_TOKENS_FILE = "added_tokens.json"
SINGLE_IDS = ("token_id", "token_ids", "token_index")
"""Ends of the names of settings that hold ids the model cannot do without."""
NAMED_IDS = ("lang_to_id", "task_to_id")
FORCED_IDS = ("forced_decoder_ids",)
"""Lists of [position, id]."""
LISTED_IDS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")
"""What is generated never, or always: of a token that is gone nothing need be said."""


@dataclass(frozen=True)
class VocabularyConfig(MethodConfig):
    """A smaller vocabulary: the tokens that the calibration text needs; the result is a dense model."""

    vocabulary_size: Annotated[int | None, Between(1)] = None
    """Tokens to keep, the most frequent ones; None: all that the text needs."""


@dataclass(frozen=True)
class VocabularyReport:
    """What `prune_vocabulary` did."""

    before: int
    """Rows of the embedding."""
    after: int
    parameters_before: int
    parameters_after: int
    tokens: int
    """Of the given texts, as they were."""
    cut_tokens: int
    """Of these, those that are split otherwise now; 0 without a size."""
    loads_with: ClassVar[str] = "transformers"

    def __str__(self) -> str:
        return (
            f"{self.before} tokens -> {self.after}, {self.parameters_before / 1e6:.2f} M parameters -> "
            f"{self.parameters_after / 1e6:.2f} M; of {self.tokens} tokens of the text {self.cut_tokens} are split otherwise now"
        )


class Vocabulary(Method[VocabularyConfig]):
    config_type = VocabularyConfig
    reshapes = True

    @property
    def needs(self) -> Needs:
        return Needs(
            calibration=False,
            whole_model="a smaller vocabulary changes the embedding, the head and the tokenizer at once",
        )

    def reshape(
        self, model: nn.Module, tokenizer: Any, text: str, batches: Sequence[Any]
    ) -> tuple[Any, VocabularyReport]:
        return prune_vocabulary(model, tokenizer, in_parts(text), size=self.config.vocabulary_size)


def prune_vocabulary(
    model: nn.Module, tokenizer: Any, texts: Iterable[str], *, size: int | None = None, keep: Collection[str] = ()
) -> tuple[Any, VocabularyReport]:
    """Cut a model's vocabulary to what texts need, in place; the tokenizer that fits it is returned.

    Every kept token keeps its row, so texts of kept tokens give the same outputs. Before anything is changed, the new tokenizer is
    tried on `texts`: it must split each as the old one does, but where a token had to go for `size`.

    Args:
        model: a dense transformers model.
        tokenizer: its fast tokenizer: BPE, WordPiece or Unigram.
        texts: what the vocabulary is for.
        size: tokens to keep, the most frequent ones; None: all that occur. What any text needs (bytes, single characters), special
            and added tokens, and what BPE merges a token from, stay in either case.
        keep: further tokens to keep.

    Returns:
        (the new tokenizer, VocabularyReport).

    Raises:
        ValueError: a slow tokenizer, or one of another kind; a packed model; a size that is too small; a token of `keep` that there
            is not; a text that the new tokenizer would split otherwise.
    """
    texts = list(texts)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError("texts must be strings, at least one: the vocabulary is cut to what they need")
    described = _described(tokenizer)
    if packed := packed_modules(model):
        raise ValueError(f"{packed[0][0]} is packed already; cut the vocabulary of the dense model, then compress that")
    kind = KINDS[described["model"]["type"]]
    pieces = kind.pieces(described["model"])
    old = _plain(described)
    names = pieces | {token["content"]: token["id"] for token in described["added_tokens"]}
    if strange := [token for token in keep if token not in names]:
        raise ValueError(f"keep names {strange[0]!r}, which is no token of the vocabulary")
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    rows = int(embedding.weight.shape[0])
    counts = Counter(token for encoding in old.encode_batch_fast(texts) for token in encoding.ids)
    always = {token["id"] for token in described["added_tokens"]}
    always |= {token for token in _needed_ids(model) if token < rows}
    always |= {at for piece, at in pieces.items() if kind.basic(piece, described["model"])}
    chosen = _chosen(kind, described["model"], pieces, always, {names[token] for token in keep}, counts, size)
    new_id = {old: new for new, old in enumerate(sorted(token for token in chosen if token < rows))}
    if missing := chosen - new_id.keys():
        raise ValueError(f"the tokenizer has the id {min(missing)}, the model {rows} rows; they are not of one model")
    new_tokenizer = _rebuilt(tokenizer, described, kind, new_id)
    cut = _prove(old, _plain(_described(new_tokenizer)), texts, new_id)
    before = sum(parameter.numel() for parameter in model.parameters())
    _cut_model(model, rows, new_id)
    after = sum(parameter.numel() for parameter in model.parameters())
    return new_tokenizer, VocabularyReport(rows, len(new_id), before, after, sum(counts.values()), cut)


def _described(tokenizer: Any) -> dict[str, Any]:
    """What tokenizer.json says."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"{type(tokenizer).__name__} is no fast tokenizer (it has no {TOKENIZER_FILE}); load it with "
            "AutoTokenizer.from_pretrained(..., use_fast=True), or convert it first"
        )
    described: dict[str, Any] = json.loads(backend.to_str())
    if (kind := described["model"].get("type")) not in KINDS:
        raise ValueError(f"the tokenizer is a {kind}; allowed: {', '.join(KINDS)}")
    if described["model"].get("continuing_subword_prefix") and kind == "BPE":
        raise ValueError(
            "the tokenizer is a BPE that marks the middle of words by a prefix, which this version does not cut"
        )
    return described


def _plain(described: Mapping[str, Any]) -> Any:
    """A tokenizer of the tokenizers library that takes texts whole: many cut them, and fill them up."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps({**described, "truncation": None, "padding": None}))


# ---- kinds of tokenizers ------------------------------------------------------------------------------------------------


class _Kind:
    """How a model of the tokenizers library holds its pieces, and which of them depend on others."""

    def pieces(self, model: Mapping[str, Any]) -> dict[str, int]:
        return dict(model["vocab"])

    def basic(self, piece: str, model: Mapping[str, Any]) -> bool:
        """Must it stay, so that any text can be written?"""
        return len(piece) == 1 or _is_byte(piece) or piece == model.get("unk_token")

    def needed_by(self, model: Mapping[str, Any], pieces: Mapping[str, int]) -> Callable[[str], Collection[str]]:
        """Gives the pieces without which one is never reached."""
        return lambda piece: ()

    def cut(self, model: dict[str, Any], new_id: Mapping[int, int]) -> None:
        """Leave the kept pieces, under their new ids."""
        model["vocab"] = {piece: new_id[old] for piece, old in model["vocab"].items() if old in new_id}


class _WordPiece(_Kind):
    """The longest piece is taken: without longer ones that no text used, it still is."""

    def basic(self, piece: str, model: Mapping[str, Any]) -> bool:
        return super().basic(piece.removeprefix(model["continuing_subword_prefix"]) or piece, model)


class _Unigram(_Kind):
    """The likeliest split is taken: without pieces that it did not use, it still is."""

    def pieces(self, model: Mapping[str, Any]) -> dict[str, int]:
        return {piece: at for at, (piece, _) in enumerate(model["vocab"])}

    def basic(self, piece: str, model: Mapping[str, Any]) -> bool:
        unknown = model.get("unk_id")
        return super().basic(piece, model) or (unknown is not None and piece == model["vocab"][unknown][0])

    def cut(self, model: dict[str, Any], new_id: Mapping[int, int]) -> None:
        pieces = {new_id[at]: piece for at, piece in enumerate(model["vocab"]) if at in new_id}
        if sorted(pieces) != list(range(len(pieces))):
            raise ValueError("the tokenizer has added tokens among its pieces, which this version does not cut")
        model["vocab"] = [pieces[at] for at in range(len(pieces))]
        if model.get("unk_id") is not None:
            model["unk_id"] = new_id[model["unk_id"]]


class _BPE(_Kind):
    """A piece is reached by merges of the best rank first. The merges within it are those of the piece alone, in any word; so a
    text is split as before if the pieces on the way to its tokens stay."""

    def basic(self, piece: str, model: Mapping[str, Any]) -> bool:
        end = model.get("end_of_word_suffix") or ""
        return super().basic(piece.removesuffix(end) or piece, model)

    def needed_by(self, model: Mapping[str, Any], pieces: Mapping[str, int]) -> Callable[[str], Collection[str]]:
        ranks = {pair: rank for rank, pair in reversed(list(enumerate(_merges(model))))}
        end = model.get("end_of_word_suffix") or ""

        def needed(piece: str) -> list[str]:
            parts = list(piece.removesuffix(end))
            if parts and end and piece.endswith(end):
                parts[-1] += end
            found = list(parts)
            while len(parts) > 1:
                rank, at = min(
                    (ranks.get(pair, len(ranks)), i) for i, pair in enumerate(zip(parts, parts[1:], strict=False))
                )
                if rank == len(ranks):
                    break
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
                found.append(parts[at])
            return [part for part in found if part in pieces]

        return needed

    def cut(self, model: dict[str, Any], new_id: Mapping[int, int]) -> None:
        super().cut(model, new_id)
        known = model["vocab"]
        merges = [pair for pair in _merges(model) if pair[0] in known and pair[1] in known and "".join(pair) in known]
        model["merges"] = [list(pair) for pair in merges]


def _merges(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for pair in model["merges"]:
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        yield left, right


def _is_byte(piece: str) -> bool:
    """`<0x0A>`: what is no piece falls to its bytes."""
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


KINDS: Mapping[str, _Kind] = {"BPE": _BPE(), "WordPiece": _WordPiece(), "Unigram": _Unigram()}


def _chosen(
    kind: _Kind,
    model: Mapping[str, Any],
    pieces: Mapping[str, int],
    always: set[int],
    asked: set[int],
    counts: Mapping[int, int],
    size: int | None,
) -> set[int]:
    """Old ids of what stays: all of `always` and `asked`, then what occurs, the most frequent first, each with what it needs."""
    piece_of = {at: piece for piece, at in pieces.items()}
    needed = kind.needed_by(model, pieces)

    def with_needed(token: int) -> set[int]:
        return {token} | ({pieces[part] for part in needed(piece_of[token])} if token in piece_of else set())

    chosen = always.union(*map(with_needed, asked))
    if size is not None and len(chosen) > size:
        raise ValueError(
            f"the size is {size}, but {len(chosen)} tokens stay in any case: special and added ones, single characters, bytes; ask "
            "for more"
        )
    for token, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        more = () if token in chosen else with_needed(token) - chosen
        if size is None or len(chosen) + len(more) <= size:
            chosen |= set(more)
    return chosen


# ---- the tokenizer ------------------------------------------------------------------------------------------------------


def _rebuilt(tokenizer: Any, described: Mapping[str, Any], kind: _Kind, new_id: Mapping[int, int]) -> Any:
    """The same tokenizer with the kept tokens under their new ids."""
    described = json.loads(json.dumps(described))
    kind.cut(described["model"], new_id)
    for token in described["added_tokens"]:
        token["id"] = new_id[token["id"]]
    _map_post_processor(described.get("post_processor"), new_id)
    if described.get("padding"):
        described["padding"]["pad_id"] = new_id[described["padding"]["pad_id"]]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tokenizer.save_pretrained(folder)
        for name in stale_files(tokenizer):
            (folder / name).unlink(missing_ok=True)
        (folder / TOKENIZER_FILE).write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")
        settings = folder / "tokenizer_config.json"
        if settings.exists():
            said = json.loads(settings.read_text(encoding="utf-8"))
            if "added_tokens_decoder" in said:
                decoder = said["added_tokens_decoder"].items()
                said["added_tokens_decoder"] = {str(new_id[int(old)]): token for old, token in decoder}
                settings.write_text(json.dumps(said, ensure_ascii=False, indent=2), encoding="utf-8")
        return type(tokenizer).from_pretrained(folder)


def stale_files(tokenizer: Any) -> set[str]:
    """Files that hold the vocabulary in another form, which a smaller one does not fit."""
    return {*tokenizer.vocab_files_names.values(), "vocab.txt", "vocab.json", "merges.txt", ADDED_TOKENS_FILE} - {
        TOKENIZER_FILE
    }


def _map_post_processor(processor: Any, new_id: Mapping[int, int]) -> None:
    if not isinstance(processor, dict):
        return
    for inner in processor.get("processors", ()):
        _map_post_processor(inner, new_id)
    for special in (processor.get("special_tokens") or {}).values():
        special["ids"] = [new_id[old] for old in special["ids"]]
    for name in ("sep", "cls"):
        if isinstance(processor.get(name), list):
            processor[name][1] = new_id[processor[name][1]]


def _prove(old: Any, new: Any, texts: list[str], new_id: Mapping[int, int]) -> int:
    """Compare how both split the texts: how many tokens are split otherwise because they had to go. ValueError for others."""
    cut = 0
    encoded = ([encoding.ids for encoding in each.encode_batch_fast(texts)] for each in (old, new))
    for text, before, after in zip(texts, *encoded, strict=True):
        gone = sum(token not in new_id for token in before)
        cut += gone
        if not gone and [new_id[token] for token in before] != after:
            at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if new_id[a] != b), 0)
            raise ValueError(
                f"the smaller vocabulary would split this text otherwise, from its token {at} on: {text[:80]!r}; nothing was "
                "changed. Leave that text out, or report the tokenizer"
            )
    return cut


# ---- the model --------------------------------------------------------------------------------------------------------


def _configs(*configs: Any) -> Iterator[Any]:
    """All that hold settings with ids in them, the parts of a composite config included."""
    seen = [config for config in configs if config is not None]
    for config in seen:
        yield config
        seen += [
            part for name in getattr(config, "sub_configs", {}) if (part := getattr(config, name, None)) is not None
        ]


def _ids(value: Any) -> Iterator[int]:
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _ids(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _ids(item)


def _needed_ids(model: nn.Module) -> set[int]:
    found: set[int] = set()
    for config in _configs(model.config, getattr(model, "generation_config", None)):
        for name, value in vars(config).items():
            if name.endswith(SINGLE_IDS) or name in NAMED_IDS:
                found |= set(_ids(value))
            elif name in FORCED_IDS:
                found |= set(_ids([pair[1] for pair in value or ()]))
    return {token for token in found if token >= 0}


def _mapped(value: Any, new_id: Mapping[int, int], rows: int) -> Any:
    """With new ids; what is no row of the embedding stays."""
    if isinstance(value, Mapping):
        return {key: _mapped(item, new_id, rows) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(item, new_id, rows) for item in value)
    return new_id[value] if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < rows else value


def _map_config(config: Any, new_id: Mapping[int, int], rows: int) -> None:
    for name, value in list(vars(config).items()):
        if name.endswith(SINGLE_IDS) or name in NAMED_IDS:
            setattr(config, name, _mapped(value, new_id, rows))
        elif name in FORCED_IDS and value:
            setattr(config, name, [[place, _mapped(token, new_id, rows)] for place, token in value])
        elif name in LISTED_IDS and value:
            kept = [item for item in value if all(token in new_id for token in _ids(item))]
            setattr(config, name, _mapped(kept, new_id, rows) or None)
    if getattr(config, "vocab_size", None) == rows:
        config.vocab_size = len(new_id)


def _cut_model(model: Any, rows: int, new_id: Mapping[int, int]) -> None:
    """Leave the rows of the kept tokens, in their new order. Raises ValueError, with nothing changed, where the model's class does
    not take its number of tokens from `vocab_size`."""
    before = _tensors(model)
    with torch.device("meta"):
        config = copy.deepcopy(model.config)
        for part in _configs(config):
            _map_config(part, new_id, rows)
        after = {name: tensor.shape for name, tensor in _tensors(type(model)(config)).items()}
    cut = {}
    for name, tensor in before.items():
        small = after.get(name, tensor.shape)
        places = [at for at, (a, b) in enumerate(zip(tensor.shape, small, strict=True)) if a != b]
        if places:
            cut[name] = (tensor, places)
    embedding = model.get_input_embeddings().weight
    if all(tensor is not embedding for tensor, _ in cut.values()) or any(
        [tensor.shape[at] for at in places] != [rows] for tensor, places in cut.values()
    ):
        raise ValueError(
            f"{type(model).__name__} does not say by vocab_size = {rows} how many tokens it has, so a folder of fewer could not be "
            "loaded; nothing was changed"
        )
    order = torch.tensor(list(new_id))
    for tensor, (at,) in {id(tensor): (tensor, places) for tensor, places in cut.values()}.values():
        tensor.data = tensor.data.index_select(at, order.to(tensor.device)).contiguous()
    cut_ids = {id(tensor) for tensor, _ in cut.values()}
    for module in model.modules():
        if isinstance(module, nn.Embedding) and id(module.weight) in cut_ids:
            module.num_embeddings = len(new_id)
            if module.padding_idx is not None:
                module.padding_idx = new_id[module.padding_idx]
        elif isinstance(module, nn.Linear) and id(module.weight) in cut_ids:
            module.out_features = len(new_id)
        if getattr(module, "vocab_size", None) == rows:
            module.vocab_size = len(new_id)
    for part in _configs(model.config, getattr(model, "generation_config", None)):
        _map_config(part, new_id, rows)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
