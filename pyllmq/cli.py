"""The command `pyllmq` (also `python -m pyllmq`)."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from .config import CLAQConfig, ColumnCodebookConfig, KMeansConfig, SparseConfig
from .dispatch import PRECISIONS


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    given = parser.parse_args(arguments)
    if given.command in ("compress", "eval", "generate", "bench"):
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = _show_warning
            return given.run(given)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        if given.traceback:
            raise
        print(f"pyllmq {given.command}: {error}", file=sys.stderr)
        there = isinstance(error, FileExistsError | FileNotFoundError)
        if isinstance(error, OSError | RuntimeError) and not there and (left := _left_behind(given)):
            print(left, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        left = _left_behind(given) or "nothing was written"
        print(f"pyllmq {given.command}: interrupted; {left}", file=sys.stderr)
        return 130


def _left_behind(given: argparse.Namespace) -> str:
    """What an ended `compress` kept, and how to go on with it."""
    if given.command != "compress":
        return ""
    from .compression.stream import how_to_go_on

    return how_to_go_on(given.output)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pyllmq", description="Compress language models to packed layers, load and measure them."
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    c = commands.add_parser("compress", help="dense model folder -> packed model folder", formatter_class=_Help)
    c.add_argument("source", metavar="SRC", help="folder of a transformers model (config.json, safetensors, tokenizer)")
    c.add_argument(
        "output", metavar="OUT", help="folder to write; an earlier packed folder of that name is replaced at the end"
    )
    c.add_argument(
        "--method",
        choices=["columns", "claq", "kmeans", *PRUNING, "pack"],
        default="columns",
        help="columns: column codebooks at their best, claq: as published, kmeans: by the weights alone; magnitude, wanda, "
        "sparsegpt and mixed-sparsity prune; pack makes a model pruned elsewhere small",
    )
    c.add_argument("--sparsity", type=float, metavar="SHARE", help="share of the weights to prune; default 0.5")
    c.add_argument("--pattern", default="unstructured", help="of the pruned weights: unstructured or N:M, such as 2:4")
    c.add_argument(
        "--values", choices=["float16", "bfloat16", "float32", "int8"], help="of kept weights; default as in SRC"
    )
    c.add_argument(
        "--bits",
        type=float,
        help="true bits per weight, everything counted; with claq as its paper counts; default 3, with claq 3.12",
    )
    c.add_argument(
        "--size", metavar="SIZE", help="instead of --bits: size of the folder to write, such as 1.9GB or 700MB"
    )
    c.add_argument("--preset", choices=["fast", "balanced", "best"], default="balanced", help="of the method columns")
    c.add_argument("--tune", type=int, metavar="STEPS", help="steps of codebook tuning; default of the preset")
    c.add_argument(
        "--outliers",
        type=float,
        default=None,
        metavar="SHARE",
        help="with claq: share of the weights kept in fp16; default 0.005 for 2.12 and 3.12, 0.01 for 2.24 and 3.23, else 0",
    )
    c.add_argument("--kmeans", choices=["exact", "windowed", "lloyd"], default="exact", help="1-D k-means solver")
    c.add_argument(
        "--calibration",
        metavar="FILE",
        help="UTF-8 text file, or self: the model writes the text (causal models); default: prose of CPython's reference manual",
    )
    c.add_argument("--samples", type=int, default=128, metavar="N", help="calibration windows (encoders: sentences)")
    c.add_argument("--seqlen", type=int, default=512, metavar="L", help="tokens per window")
    c.add_argument(
        "--include", action="append", metavar="PATTERN", help="compress only Linears of this name (repeatable)"
    )
    c.add_argument(
        "--exclude",
        action="append",
        metavar="PATTERN",
        help="leave these Linears dense, besides output heads (repeatable)",
    )
    c.add_argument(
        "--resume", action="store_true", help="go on with the same command after it was ended, to the same bytes"
    )
    c.add_argument("--dry-run", action="store_true", help="print what would be done, sizes and an estimate of the time")
    c.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="with kmeans and magnitude: processes, each on one file of SRC at a time; default 1",
    )
    c.add_argument(
        "--in-memory",
        action="store_true",
        help="hold the whole model instead of one block; needed for --tune and --calibration self; cannot be resumed",
    )
    c.add_argument(
        "--architecture",
        metavar="CLASS",
        help="transformers class of the model, such as LlamaForCausalLM; default: as config.json says",
    )
    c.add_argument("--report", metavar="FILE", help="also write the per-layer report as JSON")
    c.add_argument("--quiet", action="store_true", help="no progress bar, no per-layer table")
    c.set_defaults(run=run_compress)

    e = commands.add_parser(
        "eval", help="perplexity and tokens/s of a causal model, packed or dense", formatter_class=_Help
    )
    e.add_argument("folder", metavar="DIR")
    e.add_argument("--text", metavar="FILE", help="UTF-8 text file; default: prose of CPython's reference manual")
    e.add_argument("--seqlen", type=int, default=512, metavar="L", help="tokens per window")
    e.add_argument("--max-tokens", type=int, default=None, metavar="T", help="evaluate only the first T tokens")
    e.add_argument("--precision", choices=PRECISIONS, help="of the packed layers' arithmetic; default high")
    e.add_argument("--tasks", metavar="T,T", help="instead: tasks of lm-evaluation-harness, such as piqa,arc_easy")
    e.add_argument("--task-folder", metavar="DIR", help="with --tasks: folder of task files of your own")
    e.add_argument(
        "--fewshot", type=int, metavar="N", help="with --tasks: examples before each question; default the task's"
    )
    e.add_argument("--limit", type=int, metavar="N", help="with --tasks: only the first N questions of each")
    e.add_argument("--batch-size", type=int, default=8, metavar="N", help="with --tasks: questions at a time")
    e.add_argument("--json", action="store_true", help="print one JSON line")
    e.set_defaults(run=run_eval)

    g = commands.add_parser("generate", help="continue a prompt", formatter_class=_Help)
    g.add_argument("folder", metavar="DIR")
    g.add_argument("--prompt", required=True)
    g.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="tokens to add")
    g.add_argument("--precision", choices=PRECISIONS, help="of the packed layers' arithmetic; default high")
    g.add_argument("--sample", action="store_true", help="sample instead of taking the likeliest token")
    g.add_argument("--seed", type=int, default=0, help="seed for --sample")
    g.set_defaults(run=run_generate)

    i = commands.add_parser(
        "inspect", help="per-layer bits and bytes of a packed folder; loads no weights", formatter_class=_Help
    )
    i.add_argument("folder", metavar="DIR")
    i.add_argument("--json", action="store_true", help="print JSON")
    i.set_defaults(run=run_inspect)

    b = commands.add_parser("bench", help="kernels beside their rivals", formatter_class=_Help)
    b.add_argument("--op", default="codebook_linear", choices=["codebook_linear", "sparse_linear"], help="operation")
    b.add_argument("--shapes", default="llama-2-7b", help="model names or NxK, comma separated")
    b.add_argument(
        "--bits",
        help="widths, comma separated; 2.1 mixes 2 and 4 bits, 2.1+0.005 keeps outliers; default 2,3,4, with --model 4",
    )
    b.add_argument("--m", default="1,8,512", metavar="M,M", help="numbers of tokens")
    b.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to measure")
    b.add_argument(
        "--precision", default="high", metavar="P,P", help="of our arithmetic: exact, high, fast, comma separated"
    )
    b.add_argument(
        "--csv",
        metavar="FILE",
        help="append the rows to this file; '' for none; default pyllmq_bench.csv, with --model pyllmq_bench_model.csv",
    )
    b.add_argument("--plot", metavar="FILE", help="draw this PNG from the CSV")
    b.add_argument(
        "--goals",
        action="store_true",
        help="instead: the ratios that the kernels are built to reach, beside the measured",
    )
    b.add_argument(
        "--model", metavar="DIR", help="instead: a whole model, packed beside dense; what DIR is not is made from it"
    )
    b.add_argument(
        "--lengths", default="32,128", metavar="L,L", help="with --model: new tokens; encoders: sentences a batch"
    )
    b.set_defaults(run=run_bench)

    d = commands.add_parser("doctor", help="versions, back ends found, and why one is missing", formatter_class=_Help)
    d.set_defaults(run=run_doctor)
    return parser


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def _show_warning(message: Any, category: Any, *where: Any, **more: Any) -> None:
    print(f"WARNING: {message}", file=sys.stderr)


# ---- compress -------------------------------------------------------------------------------------------------------

NAMED_OUTLIERS = {2.12: 0.005, 2.24: 0.01, 3.12: 0.005, 3.23: 0.01}
"""CLAQ's fusion points: at these bits the paper keeps this share of the weights in fp16."""


PRUNING = {"magnitude": "magnitude", "wanda": "wanda", "sparsegpt": "sparsegpt", "mixed-sparsity": "mixed"}
"""--method -> `SparseConfig.method`."""


def run_compress(given: argparse.Namespace) -> int:
    from . import compress, pack_pruned, save_pretrained
    from .folders import is_packed
    from .loading import load_model, load_tokenizer
    from .linears import DEFAULT_EXCLUDE

    config = _compression_config(given)
    output = Path(given.output)
    if output.exists() and not (output.is_dir() and (is_packed(output) or not any(output.iterdir()))):
        raise FileExistsError(
            f"{output} exists and is no packed folder; give a new name, so that nothing of yours is replaced"
        )
    if output.resolve() == Path(given.source).resolve():
        raise ValueError(f"SRC and OUT are the same folder, {output}; give another OUT")
    if is_packed(given.source):
        raise ValueError(f"{given.source} is already packed; compress the dense model that it was made from")
    if _is_data_free(config) and not given.in_memory:
        return _compress_files(given, config)
    if given.workers is not None:
        raise ValueError(
            f"--workers {given.workers} is for methods without calibration; use torchrun for several processes"
        )
    if isinstance(config, KMeansConfig):
        raise ValueError("--in-memory does not go with --method kmeans, which never holds more than one file of SRC")
    whole = _needs_whole_model(given, config)
    if not whole:
        return _compress_streamed(given, config)
    if given.resume or given.dry_run:
        option = "--resume" if given.resume else "--dry-run"
        raise ValueError(f"{option} goes block by block, which is not possible here: {whole}")
    if not given.in_memory:
        print(f"pyllmq compress: {whole}, so the whole model is loaded", file=sys.stderr)
    tokenizer = load_tokenizer(given.source)
    model = load_model(given.source, given.architecture)
    names = {"include": given.include, "exclude": (*DEFAULT_EXCLUDE, *(given.exclude or ()))}
    if config is None:
        report = pack_pruned(model, values=given.values, **names)
    else:
        if given.size is not None:
            config = replace(config, bits=_bits_for_size(model, given))
        batches = _calibration_batches(model, tokenizer, given)
        report = compress(model, config, batches, progress=not given.quiet, **names)
    save_pretrained(model, output, tokenizer, source=given.source)
    _print_report(report, given)
    return 0


def _is_data_free(config: Any) -> bool:
    if isinstance(config, SparseConfig):
        return config.method == "magnitude" and config.quantize is None and config.allocation == "uniform"
    return isinstance(config, KMeansConfig)


def _compress_files(given: argparse.Namespace, config: Any) -> int:
    from .compression.files import compress_files
    from .integrations.checkpoint import StreamedModel
    from .loading import load_tokenizer
    from .linears import DEFAULT_EXCLUDE

    if given.dry_run:
        raise ValueError(f"--dry-run does not go with --method {given.method}, which takes minutes")
    with _ended_by_signal():
        report = compress_files(
            StreamedModel(given.source, architecture=given.architecture),
            given.output,
            config,
            include=given.include,
            exclude=(*DEFAULT_EXCLUDE, *(given.exclude or ())),
            others=[load_tokenizer(given.source)],
            workers=given.workers or 1,
            resume=given.resume,
            progress=not given.quiet,
        )
    _print_report(report, given)
    return 0


def _needs_whole_model(given: argparse.Namespace, config: Any) -> str:
    """Why the model has to be in memory as a whole; empty if it does not."""
    from .compression.stream import needs_whole_model

    if given.in_memory:
        return "--in-memory was given"
    if config is None:
        return "--method pack looks at all weights"
    if given.calibration == "self":
        return "--calibration self lets the model write text"
    return "; ".join(needs_whole_model(config))


def _compress_streamed(given: argparse.Namespace, config: Any) -> int:
    from .compression.ranks import joined
    from .compression.stream import compress_folder
    from .integrations.checkpoint import StreamedModel
    from .loading import load_tokenizer
    from .linears import DEFAULT_EXCLUDE

    tokenizer = load_tokenizer(given.source)
    with _ended_by_signal(), joined() as ranks:
        streamed = StreamedModel(given.source, architecture=given.architecture)
        if given.size is not None:
            config = replace(config, bits=_bits_for_size(streamed.model, given, indexed=True))
        batches = _calibration_batches(streamed.model, tokenizer, given)
        names = {"include": given.include, "exclude": (*DEFAULT_EXCLUDE, *(given.exclude or ()))}
        if given.dry_run:
            from .compression.dry_run import plan_folder

            print(plan_folder(streamed, given.output, config, batches, **names))
            return 0
        report = compress_folder(
            streamed,
            given.output,
            config,
            batches,
            others=[tokenizer],
            resume=given.resume,
            progress=not given.quiet,
            ranks=ranks,
            **names,
        )
        if ranks.first:
            _print_report(report, given)
    return 0


@contextmanager
def _ended_by_signal() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does: with a word on how to go on."""

    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_report(report: Any, given: argparse.Namespace) -> None:
    if given.report:
        report.save(given.report)
    print(report.totals() if given.quiet else report)
    print(f"written to {given.output}; load it with pyllmq.from_pretrained({str(given.output)!r})")


def _compression_config(given: argparse.Namespace) -> Any:
    """None for `pack`. A target size becomes bits when the model is known."""
    for option, value, methods in (
        ("--size", given.size, ("columns",)),
        ("--tune", given.tune, ("columns",)),
        ("--outliers", given.outliers, ("claq", *PRUNING)),
        ("--sparsity", given.sparsity, tuple(PRUNING)),
        ("--pattern", None if given.pattern == "unstructured" else given.pattern, tuple(PRUNING)),
        ("--values", given.values, (*PRUNING, "pack")),
        ("--bits", given.bits, ("columns", "claq", "kmeans", *PRUNING)),
        ("--workers", given.workers, ("kmeans", "magnitude")),
    ):
        if value is not None and given.method not in methods:
            raise ValueError(
                f"{option} {value} does not go with --method {given.method}; choose --method {' or '.join(methods)}"
            )
    if given.method == "pack":
        return None
    if given.method == "claq":
        return _published(given)
    if given.method == "kmeans":
        bits = 3.0 if given.bits is None else given.bits
        if bits != int(bits):
            raise ValueError(
                f"--bits {bits:g} does not go with --method kmeans, where all columns have one width; give 1 to 8"
            )
        return KMeansConfig(int(bits))
    if given.method in PRUNING:
        sparsity = 0.5 if given.sparsity is None and given.pattern == "unstructured" else given.sparsity
        quantizer = None if given.bits is None else _published(given)
        return SparseConfig(sparsity, given.pattern, PRUNING[given.method], values=given.values, quantize=quantizer)
    if given.bits is not None and given.size is not None:
        raise ValueError(f"--bits {given.bits:g} and --size {given.size} are two targets; give one of them")
    tuned = {} if given.tune is None else {"tune_steps": given.tune}
    return ColumnCodebookConfig.preset(given.preset, 3.0 if given.bits is None else given.bits, **tuned)


def _published(given: argparse.Namespace) -> CLAQConfig:
    bits = 3.12 if given.bits is None else given.bits
    outliers = NAMED_OUTLIERS.get(bits, 0.0) if given.outliers is None else given.outliers
    return CLAQConfig(bits=bits, outliers=outliers, kmeans=given.kmeans)


def _bits_for_size(model: Any, given: argparse.Namespace, indexed: bool = False) -> float:
    from .compression.model import bits_for_size
    from .linears import DEFAULT_EXCLUDE

    # Tokenizer and configuration are written again, much as they were.
    weights = (".safetensors", ".bin", ".pt", ".h5", ".msgpack", ".onnx")
    other = sum(f.stat().st_size for f in Path(given.source).iterdir() if f.is_file() and f.suffix not in weights)
    exclude = (*DEFAULT_EXCLUDE, *(given.exclude or ()))
    return bits_for_size(model, _bytes("--size", given.size), other, given.include, exclude, indexed)


def _bytes(name: str, text: str) -> int:
    units = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "B": 1.0}
    for unit, factor in units.items():
        if text.upper().endswith(unit):
            try:
                return round(float(text[: -len(unit)]) * factor)
            except ValueError:
                break
    raise ValueError(f"{name} is {text!r}; give a number with a unit: {', '.join(units)}, for example 1.9GB")


def _calibration_batches(model: Any, tokenizer: Any, given: argparse.Namespace) -> list[dict[str, Any]]:
    from .compression import calibration
    from .loading import is_causal

    if is_causal(model):
        limit = getattr(model.config, "max_position_embeddings", None) or given.seqlen
        seqlen = min(given.seqlen, limit)
        if given.calibration == "self":
            return calibration.self_generated(model, tokenizer, given.samples, seqlen, progress=not given.quiet)
        return calibration.token_windows(tokenizer, _text(given.calibration), given.samples, seqlen)
    if given.calibration == "self":
        raise ValueError(f"{type(model).__name__} writes no text; --calibration self needs a causal language model")
    if given.calibration:
        sentences = [line.strip() for line in _text(given.calibration).splitlines() if line.strip()]
    else:
        sentences = calibration.builtin_sentences()
    if not sentences:
        raise ValueError(f"{given.calibration} holds no text")
    return calibration.sentence_batches(tokenizer, sentences[: given.samples], max_length=given.seqlen)


def _text(file: str | None) -> str:
    from .compression.calibration import builtin_paragraphs

    if file is None:
        return "\n\n".join(builtin_paragraphs())
    try:
        return Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error})") from error


# ---- eval, generate, inspect ----------------------------------------------------------------------------------------


def run_eval(given: argparse.Namespace) -> int:
    from .evaluate import decoding_speed, perplexity
    from .loading import load_causal_model, load_tokenizer

    tokenizer, model = load_tokenizer(given.folder), load_causal_model(given.folder)
    _apply_precision(model, given.precision)
    if given.tasks is not None:
        return _run_tasks(model, tokenizer, given)
    text = _text(given.text)
    found = perplexity(model, tokenizer, text, given.seqlen, given.max_tokens, progress=not given.json)
    speed = decoding_speed(model, tokenizer, text[:200])
    row = {
        "perplexity": found.perplexity,
        "tokens": found.tokens,
        "seqlen": found.seqlen,
        "prefill_tokens_per_second": found.tokens_per_second,
        "decode_tokens_per_second": speed.tokens_per_second,
    }
    if given.json:
        print(json.dumps(row))
    else:
        print(f"perplexity {found.perplexity:.4f} over {found.tokens} tokens in windows of {found.seqlen}")
        print(f"{found.tokens_per_second:.1f} tokens/s reading, {speed.tokens_per_second:.1f} tokens/s generating")
    return 0


def _run_tasks(model: Any, tokenizer: Any, given: argparse.Namespace) -> int:
    from .evaluate import harness

    found = harness(
        model,
        tokenizer,
        [task.strip() for task in given.tasks.split(",") if task.strip()],
        task_folder=given.task_folder,
        fewshot=given.fewshot,
        limit=given.limit,
        batch_size=given.batch_size,
    )
    if given.json:
        print(json.dumps(found))
        return 0
    width = max(len(task) for task in found)
    for task, metrics in found.items():
        print(f"{task:<{width}}  " + "  ".join(f"{metric} {value:.4f}" for metric, value in metrics.items()))
    return 0


def run_generate(given: argparse.Namespace) -> int:
    import torch

    from .loading import load_causal_model, load_tokenizer

    tokenizer, model = load_tokenizer(given.folder), load_causal_model(given.folder)
    _apply_precision(model, given.precision)
    torch.manual_seed(given.seed)
    inputs = tokenizer(given.prompt, return_tensors="pt")
    ids = model.generate(
        inputs["input_ids"],
        attention_mask=inputs.get("attention_mask"),
        max_new_tokens=given.max_new_tokens,
        do_sample=given.sample,
    )
    print(tokenizer.decode(ids[0], skip_special_tokens=True))
    return 0


def _apply_precision(model: Any, precision: str | None) -> None:
    """A dense model has no packed layer to set: asking for a precision there is an error."""
    from .nn import set_precision

    if precision is not None:
        set_precision(model, precision)


def run_inspect(given: argparse.Namespace) -> int:
    from .folders import PackedFolder, other_files

    structures = PackedFolder.open(given.folder).structures
    if given.json:
        rows = {
            name: {**s.to_dict(), "bits_per_weight": s.bits_per_weight, "nbytes": s.nbytes}
            for name, s in structures.items()
        }
        print(json.dumps(rows, indent=1))
        return 0
    width = max(len(name) for name in structures)
    print(f"{'layer':<{width}}  {'shape':>13}  true bits      bytes  format")
    for name, s in structures.items():
        shape = f"{s.out_features}x{s.in_features}"
        print(f"{name:<{width}}  {shape:>13}  {s.bits_per_weight:9.3f}  {s.nbytes:9d}  {s.kind}: {s.describe()}")
    weights = sum(s.out_features * s.in_features for s in structures.values())
    nbytes = sum(s.nbytes for s in structures.values())
    print(
        f"{len(structures)} packed Linears, {weights / 1e6:.2f} M weights, {nbytes / 1e6:.2f} MB, "
        f"{8 * nbytes / weights:.3f} true bits per weight"
    )
    print(f"other files: {', '.join(map(str, other_files(Path(given.folder)))) or 'none'}")
    return 0


# ---- bench, doctor --------------------------------------------------------------------------------------------------


def run_bench(given: argparse.Namespace) -> int:
    precision = given.precision.split(",")
    if given.model:
        from .benchmarks.model import run_model

        csv = "pyllmq_bench_model.csv" if given.csv is None else given.csv
        lengths = _integers("--lengths", given.lengths)
        run_model(given.model, bits=given.bits or "4", lengths=lengths, precision=precision, csv=csv or None)
        return 0
    csv = "pyllmq_bench.csv" if given.csv is None else given.csv
    if given.goals:
        from .benchmarks.goals import run_goals

        run_goals(csv=csv or None)
        return 0
    from .benchmarks.run import run

    run(
        op=given.op,
        shapes=given.shapes.split(","),
        bits=(given.bits or "2,3,4").split(","),
        tokens=_integers("--m", given.m),
        device=given.device,
        precision=precision,
        csv=csv or None,
        plot=given.plot,
    )
    return 0


def _integers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{name} is {text!r}; give integers separated by commas, for example 1,8,512") from error


def run_doctor(given: argparse.Namespace) -> int:
    import torch

    from . import __version__, backends
    from .dispatch import Kernel, kernel_for, rows

    print(f"pyllmq-kernels {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in ("torch", "transformers", "safetensors", "numpy", "triton", "matplotlib"):
        print(f"  {package:<13} {_version(package)}")
    print(f"  threads       {torch.get_num_threads()} (torch.set_num_threads), {os.cpu_count()} cores")
    print(f"  GPU           {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none that torch can use'}")
    print("back ends:")
    for name, (ok, why) in backends.report().items():
        print(f"  {name:<10} {'works' if ok else 'missing'}: {why}")
    print("codebook_linear with fp16 activations runs here, by device and number of tokens:")
    for device in ("cpu", "cuda"):
        layout = backends.machine_layout(device)
        print(f"  {device:<10} layout {layout}")
        tokens: dict[Kernel, list[str]] = {}
        for m in (1, 2, 16, 64, 65, 512):
            tokens.setdefault(kernel_for("codebook_linear", layout, device, torch.float16, m), []).append(str(m))
        for kernel, numbers in tokens.items():
            print(f"  {'':<10} {kernel.name} for {', '.join(numbers)}: {kernel.because}")
    print("kernels, in the order in which they are tried:")
    for row in rows():
        print(f"  {row.op:<20} {row.name:<32} {row.because}")
    return 0


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
