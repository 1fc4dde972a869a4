"""Load malformed packed folders, thousands of them: each must be refused with a clear error, or load as its config.json says.

    python tests/fuzz_folders.py --folders 100000
    python tests/fuzz_folders.py --first 4711 --folders 1      # one of them again

Folder number i of a seed is always the same. They are loaded in forked children by `pyllmq.from_pretrained`, one in ten by
transformers' auto class. Failures: a child that dies (by a signal, or by a sanitizer: `make fuzz` runs this on the sanitized
build), one that takes more than 5 s, an error that nobody meant to raise, and a model of other shapes than its config.json says.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import argparse
import json
import linecache
import multiprocessing
import random
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import transformers.core_model_loading
import transformers.generation
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama
import transformers.quantizers
from safetensors import SafetensorError

import pyllmq
from pyllmq import CodebookLinear, Sparse24CodebookLinear, Sparse24Linear, SparseLinear
from pyllmq.folders import is_packed, read_config
from pyllmq.formats import CodebookWeight, structure_from_dict
from pyllmq.integrations.skeletons import packed_modules
from pyllmq.integrations.transformers import describe_packed

if __package__:
    from .damage import Files, damaged
else:
    from damage import Files, damaged

MOST_SECONDS, MOST_HALF_SECONDS = 5, 120  # of a child's own time; of anybody's, who may have the processor meanwhile
FOLDERS_A_CHILD = 2000  # what transformers caches of each load stays small
ADDRESSES = 32 << 30  # an absurd size fails at once instead of filling the machine; a sanitizer needs terabytes of them

# ---- the folders to damage ---------------------------------------------------------------------------------------------


def two_segments(linear: torch.nn.Linear) -> CodebookLinear:
    parts = [CodebookLinear.from_dense(rows, 3).packed_weight() for rows in linear.weight.detach().split([11, 18])]
    return CodebookLinear.from_weight(CodebookWeight.concatenate(parts), linear.bias, linear.weight.dtype)


def mixed_widths(linear: torch.nn.Linear) -> CodebookLinear:
    widths = [1 + column % 8 for column in range(linear.in_features)]
    return CodebookLinear.from_dense(linear, column_bits=widths, outlier_fraction=0.03, row_scale=True)


LAYERS: dict[str, Callable[[Any], Any]] = {
    "q_proj": mixed_widths,
    "k_proj": lambda linear: SparseLinear.from_dense(linear, 0.5),
    "v_proj": lambda linear: SparseLinear.from_dense(linear, 0.97, value_dtype=torch.int8),
    "o_proj": lambda linear: Sparse24Linear.from_dense(linear, value_dtype=torch.int8),
    "gate_proj": lambda linear: Sparse24CodebookLinear.from_dense(linear, 3, outlier_fraction=0.05),
    "up_proj": two_segments,
    "down_proj": lambda linear: Sparse24Linear.from_dense(linear, value_dtype=torch.bfloat16),
    "c_attn": mixed_widths,
    "attn.c_proj": lambda linear: Sparse24CodebookLinear.from_dense(linear, 2),
    "c_fc": lambda linear: CodebookLinear.from_dense(linear, 4),
    "mlp.c_proj": lambda linear: SparseLinear.from_dense(linear, 0.8, value_dtype=torch.float32),
}


def write_folders(place: Path) -> None:
    torch.manual_seed(0)
    llama = transformers.LlamaConfig(
        vocab_size=16, hidden_size=18, intermediate_size=29, num_hidden_layers=1, num_attention_heads=3, num_key_value_heads=1,
        max_position_embeddings=32, attention_bias=True,
    )  # fmt: skip
    gpt2 = transformers.GPT2Config(vocab_size=16, n_embd=18, n_layer=1, n_head=3, n_positions=32)
    for name, model, shard in (
        ("one-file", transformers.LlamaForCausalLM(llama), "1GB"),
        ("shards", transformers.LlamaForCausalLM(llama).bfloat16(), "3KB"),
        ("transposed", transformers.GPT2LMHeadModel(gpt2), "5KB"),
        ("widths", transformers.LlamaForCausalLM(llama), "1GB"),
    ):
        if name == "widths":  # the config says another one
            model.config.intermediate_size = 40
            shapes = {f"model.layers.0.mlp.{own}_proj": (29, 18) for own in ("gate", "up")}
            describe_packed(model, {}, shapes | {"model.layers.0.mlp.down_proj": (18, 29)})
        for pattern, make_layer in LAYERS.items():
            if any(f".{pattern}" in module for module, _ in model.named_modules()):
                pyllmq.swap_linear(model, make_layer, include=[pattern])
        model.save_pretrained(place / name, max_shard_size=shard)


# ---- one folder --------------------------------------------------------------------------------------------------------

MANY_LAYERS = 20
LOADERS = (*[pyllmq.from_pretrained] * 9, transformers.AutoModelForCausalLM.from_pretrained)


class WrongShape(Exception):
    """A model that loaded, but not as its config.json says."""


def load_and_run(folder: Path, load: Callable[[Path], Any]) -> None:
    config = read_config(folder)
    layers = config.get("n_layer", config.get("num_hidden_layers"))
    if not is_packed(folder) or (isinstance(layers, int) and layers > MANY_LAYERS):
        # transformers is right to load it without asking pyllmq; or builds so many layers before it asks.
        load = pyllmq.from_pretrained
    model = load(folder)
    described = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
    found = dict(packed_modules(model))
    if len(found) != len(described):
        raise WrongShape(f"{len(described)} modules are described, {len(found)} are packed")
    for name, layer in found.items():
        structure = structure_from_dict(next(v for k, v in described.items() if name.endswith(k) or k.endswith(name)))
        shape = structure.out_features, structure.in_features
        if layer.packed_weight().structure != structure or layer.weight.shape != shape:
            raise WrongShape(f"{name} is {layer} with a weight {tuple(layer.weight.shape)}, described as {structure}")
        for tokens in (1, 19):
            y = layer(torch.ones(tokens, layer.in_features))
            if y.shape != (tokens, layer.out_features) or y.dtype != torch.float32:
                raise WrongShape(f"{name} gives {y.dtype} {tuple(y.shape)} for {tokens} tokens")
    with torch.no_grad():
        y = model(input_ids=torch.zeros(2, 5, dtype=torch.long))[0]
    width = model.config.vocab_size if model.can_generate() else model.config.hidden_size
    if y.shape != (2, 5, width):
        raise WrongShape(f"the model gives {tuple(y.shape)}, its config says {(2, 5, width)}")


OURS = str(Path(pyllmq.__file__).parent)
THEIRS = str(Path(transformers.__file__).parent.parent)


def outcome(folder: Path, load: Callable[[Path], Any]) -> tuple[str, str]:
    """("loaded", "refused by pyllmq", "refused by another" or "failure", what was raised)."""
    try:
        load_and_run(folder, load)
    except WrongShape as error:
        return "failure", str(error)
    except Exception as error:
        *_, innermost = traceback.extract_tb(error.__traceback__)
        frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        raised = innermost.filename.startswith(OURS) and (innermost.line or "").startswith("raise ")
        clear = isinstance(error, ValueError | OSError | RuntimeError) and not isinstance(error, RecursionError)
        # Whose code let it come this far: the innermost frame of a package that reads folders, pyllmq or transformers.
        reader = next((f for f in reversed(frames) if f.startswith(OURS) or f"{THEIRS}/transformers" in f), OURS)
        if raised or (clear and reader.startswith(OURS)):
            return "refused by pyllmq", type(error).__name__
        if isinstance(error, SafetensorError) or not reader.startswith(OURS):
            return "refused by another", type(error).__name__
        return "failure", traceback.format_exc()
    return "loaded", ""


def write(files: Files, folder: Path) -> None:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def work(originals: list[Files], place: Path, seed: int, first: int, stop: int, report: Any) -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    transformers.PreTrainedConfig.__repr__ = object.__repr__  # of log lines that nobody sees, a fifth of the time
    if "PYLLMQ_SANITIZED" not in os.environ:
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    for number in range(first, stop):
        chance = random.Random(f"{seed} {number}")
        files, damages = damaged(chance, chance.choice(originals))
        folder = place / str(number)
        write(files, folder)
        what, detail = outcome(folder, chance.choice(LOADERS))
        report.send((number, what, detail if what != "failure" else f"{damages}: {detail}"))
        shutil.rmtree(folder)
        linecache.clearcache()


# ---- all of them -------------------------------------------------------------------------------------------------------


def answers(process: int, receive: Any) -> bool:
    began = None
    for _ in range(MOST_HALF_SECONDS):
        if receive.poll(0.5):
            return True
        used = cpu_seconds(process)
        began = used if began is None else began
        if used - began > MOST_SECONDS:
            return False
    return False


def cpu_seconds(process: int) -> float:
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def run(folders: int, place: Path, seed: int = 0, first: int = 0) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    maker = context.Process(target=write_folders, args=(place,))
    maker.start()
    maker.join()
    originals = [
        {file.name: file.read_bytes() for file in sorted(folder.iterdir())} for folder in sorted(place.iterdir())
    ]
    counted: Counter[str] = Counter()
    raised: Counter[str] = Counter()
    failures: dict[int, str] = {}
    number = first
    while number < first + folders:
        stop = min(number + FOLDERS_A_CHILD, first + folders)
        receive, send = context.Pipe(duplex=False)
        child = context.Process(target=work, args=(originals, place, seed, number, stop, send))
        child.start()
        send.close()
        while number < stop:
            if not answers(child.pid, receive):
                child.kill()
                child.join()
                what, detail = "failure", "no end within 5 s"
            else:
                try:
                    _, what, detail = receive.recv()
                except EOFError:
                    child.join()
                    what, detail = "failure", f"the process ended with {child.exitcode}"
            counted[what] += 1
            if what == "failure":
                failures[number] = detail
                print(f"folder {number} of seed {seed}: {detail}", file=sys.stderr, flush=True)
            else:
                raised[f"{what}: {detail}"] += bool(detail)
            number += 1
            if number % 1000 == 0:
                print(f"{number - first} folders, {len(failures)} failures", file=sys.stderr, flush=True)
            if what == "failure" and child.exitcode is not None:
                break
        child.join()
        shutil.rmtree(place / str(number - 1), ignore_errors=True)
    return {
        "folders": folders, "seed": seed, **counted, "errors": dict(raised.most_common()), "failures": failures,
    }  # fmt: skip


if __name__ == "__main__":
    sanitized = "PYLLMQ_SANITIZED" in os.environ
    assert not sanitized or "sanitize" in pyllmq.__file__, f"the ordinary build is imported: {pyllmq.__file__}"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folders", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(given.folders, Path(folder), given.seed, given.first)
    print(json.dumps(found))
    sys.exit(bool(found["failures"]))
