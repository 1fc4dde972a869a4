"""What a smaller model's config has to say so that transformers builds it: which fields those are is found by trying.

They are set, the class is built without weights, and all shapes are compared.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...linears import dense_weight, is_transposed_linear
from .parts import Attention

HEADS = (("num_attention_heads",), ("num_heads",), ("n_head",), ("encoder_attention_heads", "decoder_attention_heads"))
"""Settings that say how many heads there are, and those of the keys and values; a setting `head_dim` may have to say the rest."""
KEY_HEADS = ("num_key_value_heads",)
WIDTHS = (
    "intermediate_size",
    "ffn_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "d_ff",
    "n_inner",
    "hidden_dim",
    "ffn_hidden_size",
)
"""Settings that say how wide an MLP is."""
LAYERS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
)
"""Settings that say how many layers there are; lists with an entry for each have "layer" in their name."""


# ---- layers -----------------------------------------------------------------------------------------------------------


def fields_of_layers(model: Any, layers: str, kept: Sequence[int]) -> dict[str, Any] | None:
    """The fields that say that of the list `layers` these members are left; None if no config can say it."""
    config, members = model.config, len(model.get_submodule(layers))
    wanted = _without(model, layers, kept)
    per_layer = {
        name: [value[i] for i in kept]
        for name, value in vars(config).items()
        if "layer" in name and isinstance(value, list | tuple) and len(value) == members
    }
    named = [name for name in LAYERS if getattr(config, name, None) == members]
    decoder = [name for name in named if "decoder" in name]
    others = [name for name in named if name not in decoder]
    for names in (named, decoder, others, *([name] for name in named)):
        fields: dict[str, Any] = {**dict.fromkeys(names, len(kept)), **per_layer}
        if names and built_shapes(model, fields) == wanted:
            return fields
    return None


def _without(model: nn.Module, layers: str, kept: Sequence[int]) -> dict[str, torch.Size]:
    """Shapes of the parameters, were only these members of the list left."""
    places, shapes = {str(old): str(new) for new, old in enumerate(kept)}, {}
    for name, shape in parameter_shapes(model).items():
        if name.startswith(f"{layers}."):
            number, _, rest = name.removeprefix(f"{layers}.").partition(".")
            if number not in places:
                continue
            name = f"{layers}.{places[number]}.{rest}"
        shapes[name] = shape
    return shapes


def drop_layers(model: Any, layers: str, kept: Sequence[int]) -> None:
    """Leave these members of the list `layers`; the config does not say so yet."""
    model.set_submodule(layers, nn.ModuleList(model.get_submodule(layers)[i] for i in kept))
    generation: Any = getattr(model, "generation_config", None)
    if "decoder" in layers and (pairs := getattr(generation, "alignment_heads", None)):  # Whisper's, of layer and head
        generation.alignment_heads = [[kept.index(layer), head] for layer, head in pairs if layer in kept] or None


# ---- heads and widths -------------------------------------------------------------------------------------------------


def heads_that_fit(
    model: Any, linears: Mapping[str, nn.Module], attention: Attention, keep: float
) -> tuple[int, dict[str, int]]:
    """(of the numbers of groups that a config can say that nearest to the share `keep`, its settings).

    Raises ValueError if it can say none.
    """
    total, group = len(attention.inputs), len(attention.inputs[0])
    if keep == 1:
        return total, {}
    own = {f"{name}.{kind}" for name in linears for kind in ("weight", "bias")}
    others = {name: shape for name, shape in parameter_shapes(model).items() if name not in own}
    for count in sorted(range(1, total), key=lambda n: (abs(n - keep * total), -n)):
        wanted = dict(others)
        for name in (attention.reader, *attention.outputs):
            n, k = dense_weight(linears[name]).shape
            cut = (n, k * count // total) if name == attention.reader else (n * count // total, k)
            wanted[f"{name}.weight"] = torch.Size(cut[::-1] if is_transposed_linear(linears[name]) else cut)
        for fields in _head_fields(model.config, attention.head, count, count * group // attention.head):
            built = built_shapes(model, fields)
            if all(built.get(name) == shape for name, shape in wanted.items()):
                nearer = abs(count - keep * total) < total - keep * total
                return (count, fields) if nearer else (total, {})
    raise ValueError(
        f"no setting of {type(model.config).__name__} says that {attention.reader} reads about {keep * total:.3g} of its {total} "
        f"groups of heads of {attention.head} channels, so transformers could not load the result (BERT, GPT-2 and Whisper take "
        "the size of a head from the hidden size, T5 has a position bias for each); leave 'heads' out of parts"
    )


def _head_fields(config: Any, head: int, count: int, queries: int) -> list[dict[str, int]]:
    """Settings that may say that `count` groups with `queries` heads in all are left."""
    found = []
    for names in HEADS:
        if all(hasattr(config, name) for name in names):
            fields = dict.fromkeys(names, queries)
            fields |= {name: count for name in KEY_HEADS if getattr(config, name, None) is not None}
            found += [fields, fields | {"head_dim": head}]
    return found


def _mlp_fields(config: Any, before: int, after: int) -> list[dict[str, int]]:
    # n_inner of GPT-2 is None, for four times the hidden size.
    named = [name for name in WIDTHS if hasattr(config, name) and getattr(config, name) in (before, None)]
    return [dict.fromkeys(named, after), *({name: after} for name in named)]


def built_shapes(model: Any, fields: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Of the parameters of the model that transformers builds from a config with these fields; nothing if it takes none."""
    from huggingface_hub.errors import StrictDataclassError

    config = copy.deepcopy(model.config)
    try:
        for name, value in fields.items():
            setattr(config, name, value)
        config = type(config).from_dict(config.to_dict())  # as it would be loaded
        with torch.device("meta"):
            built = type(model)(config)
    except (StrictDataclassError, ValueError, TypeError, RuntimeError, ZeroDivisionError):
        return {}
    return parameter_shapes(built)


def parameter_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Tied ones by each of their names: without their weights nobody sees that they are one."""
    return {name: tensor.shape for name, tensor in model.named_parameters(remove_duplicate=False)}


def parameter_count(model: Any, apart: Collection[str] = ()) -> int:
    """Of the model that transformers builds from the config; tied ones count once. `apart`: Linears that the config says otherwise.

    Those count as they are.
    """
    with torch.device("meta"):
        built = type(model)(copy.deepcopy(model.config))
    total = sum(parameter.numel() for parameter in built.parameters())
    for name in apart:
        pair = (module.get_submodule(name).parameters() for module in (model, built))
        total += sum(own.numel() - other.numel() for own, other in zip(*pair, strict=True))
    return total


def say_sizes(
    model: Any, found: Mapping[str, set[tuple[int, int]]], fixed: Mapping[str, Any], apart: Collection[str] = ()
) -> None:
    """Set those fields of the config by which transformers builds a model of these shapes; they are found by trying.

    Args:
        found: part -> sizes of its groups, before and after.
        fixed: fields that say how many heads and layers there are.
        apart: Linears whose shapes the config need not say.
    """
    for part, what in (("mlp", "MLPs"), ("heads", "attentions")):
        sizes = found.get(part, set())
        if len(sizes) > 1:
            listed = ", ".join(str(before) for before, _ in sorted(sizes))
            raise ValueError(
                f"the {what} of {type(model).__name__} are {listed} wide; a config says one width, so they stay as they are"
            )
    ways: list[dict[str, int]] = [{}]
    said = [f"that there are {dict(fixed)}"] if fixed else []
    for before, after in (size for size in found.get("mlp", ()) if size[0] != size[1]):
        ways = _mlp_fields(model.config, before, after)
        said.append(f"that the MLPs are {after} wide")
    if not said:
        return
    others = {f"{name}.{key}" for name in apart for key in ("weight", "bias")}

    def told(shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
        return {name: shape for name, shape in shapes.items() if name not in others}

    shapes = told(parameter_shapes(model))
    for way in ways:
        fields = {**way, **fixed}
        if told(built_shapes(model, fields)) == shapes:
            follow_config(model, fields)
            return
    tried = dict.fromkeys(name for way in ways for name in way)
    raise ValueError(
        f"no setting of {type(model.config).__name__} says {' and '.join(said)} (tried: {', '.join(tried) or 'none'}), "
        "so transformers could not load the result; nothing was changed"
    )


def follow_config(model: Any, fields: Mapping[str, Any]) -> None:
    """Set these fields, and the numbers that modules keep of them (heads, groups) as transformers sets them."""
    for name, value in fields.items():
        setattr(model.config, name, value)
    with torch.device("meta"):
        built = type(model)(copy.deepcopy(model.config))
    for module, new in zip(model.modules(), built.modules(), strict=True):
        # T5's encoder and decoder have copies, each with its own number of layers.
        for name in fields if hasattr(new, "config") else ():
            if hasattr(new.config, name):
                setattr(module.config, name, getattr(new.config, name))
        for name, value in vars(new).items():
            if type(value) is int and type(vars(module).get(name)) is int:
                setattr(module, name, value)
