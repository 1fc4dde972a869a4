"""Few tokens through a model as two native calls a block: `fuse` finds the modules that can, `unfuse` undoes it.

record.py     what a model does, recorded on a shadow of it
grammar.py    the record as sentences that the steps know
steps.py      what a step does, said completely, and run in plain torch
native.py     a step bound to its weights
cache.py      keys and values that grow in place
modules.py    a module's `forward`, fused
model.py      all modules of a model
"""

from __future__ import annotations

from torch import nn

FUSED = "fused"
"""What `report` says of a module that is."""


def fuse(model: nn.Module) -> dict[str, str]:
    """Let attention and MLP modules run as native steps on a CPU: of a decoder with a cache and of an
    encoder of BERT's kind, up to 512 tokens at once; a longer prompt of one sequence in pieces.

    What a module does is recorded, matched to what the steps know, and compared with the module's own output on random input;
    what does not fit or does not agree stays as it is. In place, a state of the model in memory: parameters, modules,
    `state_dict` and what is saved are as before. Calls that a step cannot serve (more tokens, no cache or another than
    `DynamicCache`, hooks inside, gradients, training, torch.compile) take the module's own way. Where weights or a precision
    changed, the model is fitted anew at the next call.

    Returns what `report` does.
    """
    from . import model as implementation

    return implementation.fuse(model)


def unfuse(model: nn.Module) -> int:
    """Give every module of the model its own forward back; returns how many were fused."""
    from . import model as implementation

    return implementation.unfuse(model)


def report(model: nn.Module) -> dict[str, str]:
    """Name of a module -> "fused", or the reason why it is not, since the last `fuse`; name "" is the whole model.

    Empty if `fuse` was never called. Of a fused block the modules inside are not listed.
    """
    from . import model as implementation

    return implementation.report(model)
