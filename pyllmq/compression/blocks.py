"""The blocks of a model, one after the other: what runs as one piece, with which arguments, on whose outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from .calibration import Batch


@dataclass
class Stage:
    """A block that is run on its own, or (block is None) Linears that only a run of the whole model reaches."""

    block: nn.Module | None
    linears: dict[str, nn.Module] = field(default_factory=dict)


def find_stages(model: nn.Module, chosen: dict[str, nn.Module], outside: bool) -> list[Stage]:
    """One stage per block that holds chosen Linears, then one for those outside all blocks if `outside`."""
    block_names: list[str] = []
    for name, module in model.named_modules():
        nested = any(name.startswith(block + ".") for block in block_names)
        if isinstance(module, nn.ModuleList) and len(module) and not nested:
            block_names += [f"{name}.{i}".lstrip(".") for i in range(len(module))]
    stages, taken = [], set()
    for block_name in block_names:
        inside = {
            name: module for name, module in chosen.items() if name.startswith(block_name + ".") or name == block_name
        }
        if inside:
            stages.append(Stage(model.get_submodule(block_name), inside))
            taken |= set(inside)
    rest = {name: module for name, module in chosen.items() if name not in taken}
    if rest and (outside or not stages):
        stages.append(Stage(None, rest))
    return stages


@dataclass
class Call:
    """The arguments of one call of a block, with the hidden states apart."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """None if no argument can be told to be the hidden states."""
        # A cache would grow with every repeated run of the block; calibration never needs one.
        kwargs = {k: None if type(v).__name__.endswith("Cache") else v for k, v in kwargs.items()}
        args = tuple(None if type(v).__name__.endswith("Cache") else v for v in args)
        if args and isinstance(args[0], Tensor):
            return cls(args[0], args[1:], kwargs)
        hidden = kwargs.pop("hidden_states", None)
        return cls(hidden, args, kwargs) if isinstance(hidden, Tensor) else None

    def run(self, block: nn.Module) -> Tensor:
        output = block(self.hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple | list) else output


def record_calls(model: nn.Module, blocks: Sequence[nn.Module], batch: Batch) -> list[tuple[int, Call | None]]:
    """Run the model on one batch; the calls of all blocks in the order in which they happen, each with its block's index."""
    calls: list[tuple[int, Call | None]] = []

    def recorder(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((index, Call.of(args, dict(kwargs))))

        return hook

    handles = [block.register_forward_pre_hook(recorder(i), with_kwargs=True) for i, block in enumerate(blocks)]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def record_chain(model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Batch]) -> list[list[Call]]:
    """For each batch the calls of the blocks of a chain, without the hidden states of all but the first.

    Masks and position embeddings may differ from block to block (sliding and global attention), and an encoder's output
    enters every decoder block: each block's own arguments are kept, and only the hidden states are carried from block to block.
    """
    recorded = []
    for batch in batches:
        calls = [call for _, call in record_calls(model, blocks, batch) if call is not None]
        if len(calls) != len(blocks):
            raise ValueError(
                f"a calibration batch runs {len(calls)} of {len(blocks)} blocks that the first batch ran once each; batches must "
                "take the same way through the model"
            )
        recorded.append([call if i == 0 else replace(call, hidden=call.hidden[:0]) for i, call in enumerate(calls)])
    return recorded


def find_chains(model: nn.Module, stages: list[Stage], batch: Batch) -> list[list[Stage]]:
    """Cut the stages into chains: blocks of which each takes just what the one before gave out.

    Stages come in the order in which the model runs them. A block that runs several times in one forward (shared layers), or
    whose hidden states cannot be told from its other arguments, or that never runs, becomes a stage of the whole model: one
    recorded call would not tell its whole story.
    """
    staged = [(stage, stage.block) for stage in stages if stage.block is not None]
    recorded = record_calls(model, [block for _, block in staged], batch)
    ran = list(dict.fromkeys(index for index, _ in recorded))
    chains: list[list[Stage]] = []
    before: tuple[nn.Module, Call] | None = None
    for index in [*ran, *(i for i in range(len(staged)) if i not in ran)]:
        stage, block = staged[index]
        calls = [call for at, call in recorded if at == index]
        if len(calls) != 1 or calls[0] is None:
            chains.append([Stage(None, stage.linears)])
            before = None
            continue
        if before is not None and _gives(before[1].run(before[0]), calls[0].hidden):
            chains[-1].append(stage)
        else:
            chains.append([stage])
        before = (block, calls[0])
    return chains + [[stage] for stage in stages if stage.block is None]


def _gives(output: Tensor, wanted: Tensor) -> bool:
    if not isinstance(output, Tensor) or output.shape != wanted.shape:
        return False
    return bool((output.float() - wanted.float()).norm() <= 1e-3 * wanted.float().norm())


def run_call(calls: Sequence[Call], block: nn.Module, index: int) -> Tensor:
    return calls[index].run(block)
