"""The Linear-like modules of a model: what counts as one, finding them by name, replacing one, and what stays dense."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

OUTPUT_LAYERS = "<output layers>"
"""In `exclude`: the model's output layer whatever its name, and every Linear that shares its weight with another module; but not
one that `include` asks for by the last part of its name."""

DEFAULT_EXCLUDE = ("lm_head", "embed_out", "classifier", "score", OUTPUT_LAYERS)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Does a module name fit one of the patterns?

    A pattern is a whole module name, a run of its dotted parts (``lm_head``, ``self_attn.q_proj``), a glob (``*.mlp.*``), or a
    regular expression after ``re:`` that must match the whole name.
    """
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.fullmatch(pattern[3:], name):
                return True
        elif any(c in pattern for c in "*?["):
            if fnmatch.fnmatchcase(name, pattern):
                return True
        elif f".{pattern}." in f".{name}.":
            return True
    return False


def is_transposed_linear(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2 and kin): a Linear whose weight is stored [in_features, out_features]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def linear_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every `nn.Linear` and transformers Conv1D; not of a router that is a Linear and returns something else."""
    for name, module in model.named_modules():
        linear = isinstance(module, nn.Linear) and _multiplies(type(module))  # type: ignore[arg-type]  # mypy doubts a class's hash
        if linear or is_transposed_linear(module):
            yield name, module


@cache
def _multiplies(linear: type[nn.Linear]) -> bool:
    """Does its forward do what `nn.Linear` does? Falcon's Linears do, by a forward of their own; PhiMoE's routers do not."""
    if linear.forward is nn.Linear.forward:
        return True
    plain = nn.Linear(5, 3, device="meta").to_empty(device="cpu").float()
    for i, parameter in enumerate(plain.parameters()):
        parameter.data = (
            torch.arange(1 + i, parameter.numel() + 1 + i, dtype=torch.float32, device="cpu").sin().view_as(parameter)
        )
    x = torch.arange(10, dtype=torch.float32, device="cpu").cos().view(1, 2, 5)
    expected = plain(x)
    plain.__class__ = linear
    try:
        found = plain(x)
    except Exception:  # whatever a class needs that a Linear does not have
        return False
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.allclose(found, expected, atol=1e-4)


def select_linears(
    model: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] = DEFAULT_EXCLUDE
) -> dict[str, nn.Module]:
    """Linear-like modules that `include` names (None: all) and `exclude` does not. A pattern that fits nothing is an error."""
    found = dict(linear_modules(model))
    for pattern in include or ():
        if not any(matches(name, [pattern]) for name in found):
            raise ValueError(
                f"include pattern {pattern!r} fits no Linear of the model; it has for example: {_some(found)}"
            )
    everything = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    for pattern in exclude:
        if pattern not in DEFAULT_EXCLUDE and not any(matches(name, [pattern]) for name in everything):
            raise ValueError(
                f"exclude pattern {pattern!r} fits nothing in the model; it has for example: {_some(found)}"
            )
    outputs = output_layers(model, include) if OUTPUT_LAYERS in exclude else {}
    return {
        name: module
        for name, module in found.items()
        if (include is None or matches(name, include)) and not matches(name, exclude) and name not in outputs
    }


def output_layers(model: nn.Module, include: Sequence[str] | None = None) -> dict[str, str]:
    """Linear -> why it is meant by `OUTPUT_LAYERS`."""
    asked = {name for name, _ in linear_modules(model) for p in include or () if matches(p, [name.rpartition(".")[2]])}
    linears = {name: module for name, module in linear_modules(model) if name not in asked}
    outputs = {name: f"shares its weight with {other}" for name, other in tied_weights(model, linears).items()}
    try:
        head = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return outputs
    return {name: "output layer" for name, module in linears.items() if module is head} | outputs


def input_embeddings(model: nn.Module) -> dict[str, nn.Embedding]:
    """Name -> what looks up token ids: what transformers calls so, in a model and in its parts; elsewhere every embedding.

    Of several with one weight the first that the model registers.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    if hasattr(model, "get_input_embeddings"):
        inputs = {id(each) for module in model.modules() if (each := _input_embedding(module)) is not None}
        found = {name: module for name, module in found.items() if id(module) in inputs}
    owners = {id(module.weight): name for name, module in reversed(found.items())}
    return {name: module for name, module in found.items() if owners[id(module.weight)] == name}


def _input_embedding(module: nn.Module) -> nn.Module | None:
    try:
        return module.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def sharing_weight(model: nn.Module, module: nn.Module) -> dict[str, nn.Module]:
    """Name -> module, under each of its names, of all whose weight is the very tensor of this one's."""
    found = model.named_modules(remove_duplicate=False)
    return {name: other for name, other in found if other._parameters.get("weight") is module.weight}


def dense_weight(module: nn.Module) -> Tensor:
    """The weight [out_features, in_features] of a Linear-like module."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if is_transposed_linear(module) else weight.detach()


def follow_weight(module: nn.Module) -> None:
    """Let a Linear-like module say the shape that its weight has by now."""
    n, k = dense_weight(module).shape
    if is_transposed_linear(module):
        module.nf, module.nx = n, k  # type: ignore[assignment]
    else:
        module.out_features, module.in_features = n, k  # type: ignore[assignment]


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name) if parent_name else model
    new.train(parent.training)
    setattr(parent, leaf, new)


def as_linear(module: nn.Module) -> nn.Linear:
    """The module itself, or for a Conv1D an `nn.Linear` that shares its weight."""
    if isinstance(module, nn.Linear):
        return module
    weight = dense_weight(module)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        assert isinstance(module.bias, nn.Parameter)
        linear.bias = module.bias
    return linear


@dataclass(frozen=True)
class LeftDense:
    """A Linear-like tensor that stays dense: `asked` says whether the user asked for that."""

    name: str
    parameters: int
    why: str
    asked: bool


def left_dense(
    model: nn.Module, chosen: Iterable[str], include: Sequence[str] | None, exclude: Sequence[str]
) -> tuple[list[LeftDense], int]:
    """Linear-like tensors outside `chosen`, and the number of all Linear-like parameters.

    What `exclude` names, and what an `include` does not name, was asked for. Besides Linears these are 3-D parameters
    (stacked experts) and torch's fused attention weights, which a search for `nn.Linear` would silently miss.
    """
    outside, experts, fused = (
        "outside the repeated blocks",
        "a 3-D tensor (stacked experts?) of a class that this version does not know",
        "fused attention weights of nn.MultiheadAttention, which is no Linear",
    )
    found = [(name, dense_weight(module), outside) for name, module in linear_modules(model)]
    found += [(name, parameter, experts) for name, parameter in stacked_parameters(model)]
    found += [(name, parameter, fused) for name, parameter in fused_attention_parameters(model)]
    asked = output_layers(model, include) if OUTPUT_LAYERS in exclude else {}
    for name, _, _ in found:
        if name not in asked and matches(name, exclude):
            asked[name] = "excluded"
        elif name not in asked and include is not None and not matches(name, include):
            asked[name] = "not included"
    chosen = set(chosen)
    dense = [
        LeftDense(name, weight.numel(), asked.get(name, otherwise), name in asked)
        for name, weight, otherwise in found
        if name not in chosen
    ]
    return dense, sum(weight.numel() for _, weight, _ in found)


def stacked_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """3-D parameters large enough to matter, which are most likely stacked experts."""
    for name, module in model.named_modules():
        apart = any(isinstance(child, nn.Linear) for child in module.children())  # Linears that are seen in the stack
        if isinstance(module, nn.modules.conv._ConvNd | nn.Embedding) or apart:
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and parameter.numel() >= 1 << 12:
                yield f"{name}.{parameter_name}".lstrip("."), parameter


def fused_attention_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """q, k and v of torch's own attention: parameters of the attention module itself, most often one of all three."""
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            for parameter_name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 2 and parameter_name.endswith("proj_weight"):
                    yield f"{name}.{parameter_name}".lstrip("."), parameter


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")


def tied_weights(model: nn.Module, chosen: Iterable[str]) -> dict[str, str]:
    """Chosen Linears whose weight is the same tensor as another module's (an embedding, say) -> that module's name."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(name)
    shared = {name: names for names in owners.values() if len(names) > 1 for name in names}
    return {name: next(other for other in shared[name] if other != name) for name in chosen if name in shared}
