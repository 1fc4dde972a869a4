"""The command `pyllmq` (also `python -m pyllmq`)."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from .config import MethodConfig, Option
from .operations import PRECISIONS


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    given = argparse.Namespace(command=next((word for word in arguments if not word.startswith("-")), ""), output=None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = _show_warning
            given = build_parser(arguments).parse_args(arguments)
            if given.command in ("compress", "eval", "generate", "bench"):
                from transformers.utils import logging as transformers_logging

                transformers_logging.disable_progress_bar()
            return given.run(given)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if "--traceback" in arguments:
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
    if given.command != "compress" or given.output is None:
        return ""
    from .compression.jobs.folder import how_to_go_on

    return how_to_go_on(given.output) or how_to_go_on(_narrow_folder(Path(given.output)))


def build_parser(arguments: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of these arguments: the options of `compress` are those of the method that they name."""
    parser = argparse.ArgumentParser(
        prog="pyllmq", description="Compress language models to packed layers, load and measure them."
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_compress(commands, arguments)

    e = commands.add_parser(
        "eval", help="perplexity and tokens/s of a causal model, packed or dense", formatter_class=_Help
    )
    e.set_defaults(run=run_eval)
    e.add_argument("folder", metavar="DIR")
    _value(e, "--text FILE", "UTF-8 text file; default: prose of CPython's reference manual")
    _value(e, "--seqlen L", "tokens per window", int, 512)
    _value(e, "--max-tokens T", "evaluate only the first T tokens", int)
    _precision(e)
    _value(e, "--tasks T,T", "instead: tasks of lm-evaluation-harness, such as piqa,arc_easy")
    _value(e, "--task-folder DIR", "with --tasks: folder of task files of your own")
    _value(e, "--fewshot N", "with --tasks: examples before each question; default the task's", int)
    _value(e, "--limit N", "with --tasks: only the first N questions of each", int)
    _value(e, "--batch-size N", "with --tasks: questions at a time", int, 8)
    _switch(e, "--json", "print one JSON line")

    g = commands.add_parser("generate", help="continue a prompt", formatter_class=_Help)
    g.set_defaults(run=run_generate)
    g.add_argument("folder", metavar="DIR")
    g.add_argument("--prompt", required=True)
    _value(g, "--max-new-tokens N", "tokens to add", int, 64)
    _precision(g)
    _switch(g, "--sample", "sample instead of taking the likeliest token")
    _value(g, "--seed SEED", "seed for --sample", int, 0)

    i = commands.add_parser(
        "inspect", help="per-layer bits and bytes of a packed folder; loads no weights", formatter_class=_Help
    )
    i.set_defaults(run=run_inspect)
    i.add_argument("folder", metavar="DIR")
    _switch(i, "--json", "print JSON")
    _switch(i, "--fused", "instead: load it, and say which modules generate as native steps, and why others not")

    b = commands.add_parser("bench", help="kernels beside their rivals", formatter_class=_Help)
    b.set_defaults(run=run_bench)
    ops = ["codebook_linear", "sparse_linear", "experts"]
    b.add_argument("--op", default="codebook_linear", choices=ops, help="operation")
    _value(b, "--shapes SHAPES", "model names or NxK, comma separated", default="llama-2-7b")
    widths = "widths, comma separated; 2.1 mixes 2 and 4 bits, 2.1+0.005 keeps outliers; default 2,3,4, with --model 4"
    _value(b, "--bits BITS", widths)
    _value(b, "--m M,M", "numbers of tokens; default 1,8,512, with --op experts 1,64")
    _value(
        b, "--experts N", "with --op experts: at most so many in a layer; default: as many as memory holds in fp32", int
    )
    b.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to measure")
    _value(b, "--precision P,P", "of our arithmetic: exact, high, fast, comma separated", default="high")
    files = "default pyllmq_bench.csv, with --model pyllmq_bench_model.csv, with --rivals pyllmq_bench_generation.csv"
    _value(b, "--csv FILE", f"append the rows to this file; '' for none; {files}")
    _value(b, "--plot FILE", "draw this PNG from the CSV")
    _switch(b, "--goals", "instead: the ratios that the kernels are built to reach, beside the measured")
    model = (
        "instead: a whole model. DIR: packed beside dense; what DIR is not is made from it. With --rivals, or the name of a "
        "shape (TinyLlama-1.1B, Llama-3.2-1B, Qwen3-0.6B, 'Qwen3-30B-A3B, 3 layers'): fused, unfused, torch and rivals, with "
        "random weights"
    )
    _value(b, "--model DIR|SHAPE", model)
    _value(b, "--rivals R,R", "with --model: llama.cpp, ik_llama.cpp or none; default for a shape: both")
    _value(b, "--timeline FILE", "with --model: instead draw one token of it, fused, on a time line into this PNG")
    _value(b, "--keep DIR", "with --rivals: folder for the GGUF files, to be used again")
    _value(b, "--lengths L,L", "with --model: new tokens; encoders: sentences a batch", default="32,128")

    d = commands.add_parser("doctor", help="versions, back ends found, and why one is missing", formatter_class=_Help)
    d.set_defaults(run=run_doctor)
    return parser


def _value(parser: Any, words: str, text: str, kind: Any = None, default: Any = None, action: str = "store") -> None:
    """An option with a value, "--word METAVAR"."""
    word, metavar = words.split()
    parser.add_argument(word, metavar=metavar, type=kind, default=default, action=action, help=text)


def _switch(parser: argparse.ArgumentParser, word: str, text: str) -> None:
    parser.add_argument(word, action="store_true", help=text)


def _precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--precision", choices=PRECISIONS, help="of the packed layers' arithmetic; default high")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def _show_warning(message: Any, category: Any, *where: Any, **more: Any) -> None:
    print(f"WARNING: {message}", file=sys.stderr)


# ---- compress -------------------------------------------------------------------------------------------------------

DEFAULT_METHOD = "column-codebook"
FORMER_WORDS = {"columns": "column-codebook"}


def _add_compress(commands: Any, arguments: Sequence[str]) -> None:
    """The command `compress` with the options of the method that the arguments name."""
    c = commands.add_parser(
        "compress",
        help="dense model folder -> packed model folder",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    c.set_defaults(run=run_compress)
    c.add_argument("source", metavar="SRC", help="folder of a transformers model (config.json, safetensors, tokenizer)")
    folder = "folder to write; an earlier packed folder of that name is replaced at the end"
    c.add_argument("output", metavar="OUT", help=folder)
    _value(c, "--method WORD", "how to compress, see below", default=DEFAULT_METHOD)
    _value(c, "--plugin MODULE", "import this module, which registers a method (repeatable)", action="append")
    text = (
        "UTF-8 text file; a folder of .wav files or images, where the model takes those; or self: the model writes the text "
        "(causal models); default: prose of CPython's reference manual"
    )
    _value(c, "--calibration FILE", text)
    _value(c, "--samples N", "calibration windows (encoders: sentences; folders: files); default 128", int)
    _value(c, "--seqlen L", "tokens per window; default 512", int)
    _value(c, "--include PATTERN", "compress only Linears of this name (repeatable)", action="append")
    dense = "leave these Linears dense, besides output heads (repeatable)"
    _value(c, "--exclude PATTERN", dense, action="append")
    _value(c, "--embeddings BITS", "pack the input embeddings too, at so many bits (1 to 8)", int)
    _value(c, "--head BITS", "pack the output head too; one that is tied goes with the embeddings", int)
    _switch(c, "--resume", "go on with the same command after it was ended, to the same bytes")
    _switch(c, "--dry-run", "print what would be done, sizes and an estimate of the time")
    workers = "with methods without calibration: processes, each on one file of SRC at a time; default 1"
    _value(c, "--workers N", workers, int)
    whole = "hold the whole model instead of one block; needed for --tune and --calibration self; cannot be resumed"
    _switch(c, "--in-memory", whole)
    architecture = "transformers class of the model, such as LlamaForCausalLM; default: as config.json says"
    _value(c, "--architecture CLASS", architecture)
    _value(c, "--report FILE", "also write the per-layer report as JSON")
    _switch(c, "--quiet", "no progress bar, no per-layer table")
    if "compress" in arguments:
        _add_method_options(c, arguments)


def _add_method_options(c: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", default=DEFAULT_METHOD)
    first.add_argument("--plugin", action="append", default=[])
    known, _ = first.parse_known_args(arguments)
    methods = _methods(known.plugin)
    c.epilog = (
        f"{_listed(methods)} `pyllmq compress --method WORD --help` lists the options of another method.".replace(
            "%", "%%"
        )
    )
    word = known.method
    if word in FORMER_WORDS:
        raise ValueError(f"--method {word} is called {FORMER_WORDS[word]} now; give --method {FORMER_WORDS[word]}")
    if word not in methods:
        raise ValueError(f"--method is {word!r}; allowed: {', '.join(methods)}, and those of a --plugin")
    group = c.add_argument_group(f"options of --method {word}")
    own = {option.word: option for option in _options(methods[word])}
    # Those of other methods are known, so that they are refused with a word on whose they are.
    others = {option.word: option for method in methods.values() for option in _options(method)}
    for option in (*own.values(), *(option for other, option in others.items() if other not in own)):
        mine = option.word in own
        shown: dict[str, Any] = {
            "help": option.help.replace("%", "%%") if mine else argparse.SUPPRESS,
            "dest": f"option {option.field}" if mine else f"other {option.word}",
        }
        if option.values is bool:
            shown |= {"action": "store_const", "const": option.switch_to if mine else ""}
        else:
            shown["metavar"] = option.metavar
        (group if mine else c).add_argument(option.word, **shown)


def _listed(methods: Mapping[str, Any]) -> str:
    """The words of the methods, with the first sentence of each config."""
    words: dict[str, list[str]] = {}
    for word, registered in methods.items():
        first = (registered.method.config_type.__doc__ or "").split("\n\n")[0]
        words.setdefault(" ".join(first.split()), []).append(word)
    return "Methods. " + " ".join(f"{', '.join(some)}: {first}" for first, some in words.items())


def _methods(plugins: Sequence[str]) -> dict[str, Any]:
    """Every method by its word: ours, those of installed packages, those of `--plugin`."""
    from importlib import import_module
    from importlib.metadata import entry_points

    from .compression.methods import METHODS

    for entry in entry_points(group="pyllmq.methods"):
        try:
            entry.load()
        except Exception as error:  # whatever it is, the methods of others work
            package = entry.dist.name if entry.dist else "an installed package"
            warnings.warn(
                f"the method {entry.name} = {entry.value} of {package} cannot be imported: {error!r}; it is left out",
                stacklevel=2,
            )
    for module in plugins:
        import_module(module)
    return METHODS


def _options(registered: Any) -> list[Option]:
    size = Option(
        "--size", "size", str, "instead of --bits: size of the folder to write, such as 1.9GB or 700MB", "SIZE"
    )
    more = [size] if registered.method.true_bits else []
    if registered.method.packs_after:
        more += [
            Option("--bits", "bits", float, "then pack what stays, as column-codebook does", "B"),
            Option(
                "--pattern",
                "pattern",
                str,
                "then prune what stays, as mixed-sparsity does; with --bits to codebooks",
                "N:M",
            ),
        ]
    return [*registered.options(), *more]


def _settings(given: argparse.Namespace) -> dict[str, Any]:
    """field -> value of the method's options that were given. Raises ValueError for those of other methods."""
    from .compression.methods import METHODS

    for name, value in vars(given).items():
        if name.startswith("other ") and value is not None:
            other = name.removeprefix("other ")
            having = [w for w, method in METHODS.items() if other in {known.word for known in _options(method)}]
            what = f"{other} {value}".strip()
            raise ValueError(f"{what} does not go with --method {given.method}; choose --method {' or '.join(having)}")
    found = {}
    for option in _options(METHODS[given.method]):
        value = getattr(given, f"option {option.field}")
        if value is not None:
            found[option.field] = value if option.values is bool else option.parse(value)
    return found


def run_compress(given: argparse.Namespace) -> int:
    from .compression.methods import METHODS, method_of
    from .folders import is_dense, is_packed, quantization_method, read_config

    settings = _settings(given)
    size = settings.pop("size", None)
    if size is not None and "bits" in settings:
        raise ValueError(f"--bits {settings['bits']:g} and --size {size} are two targets; give one of them")
    then: dict[str, Any] = {}
    if METHODS[given.method].method.reshapes:
        then = {field: settings.pop(field) for field in ("bits", "pattern") if field in settings}
    config = METHODS[given.method].config(settings)
    packing = METHODS["mixed-sparsity" if "pattern" in then else DEFAULT_METHOD].config(then) if then else None
    needs = method_of(config).needs
    said = read_config(given.source)
    quantized = quantization_method(said)
    output = Path(given.output)
    if output.resolve() == Path(given.source).resolve():
        raise ValueError(f"SRC and OUT are the same folder, {output}; give another OUT")
    if output.exists() and not (output.is_dir() and (is_packed(output) or not any(output.iterdir()))):
        raise FileExistsError(
            f"{output} exists and is no packed folder; give a new name, so that nothing of yours is replaced"
        )
    if given.report and not (folder := Path(given.report).parent).is_dir():
        raise FileNotFoundError(f"--report is {given.report}, and there is no folder {folder}; make it first")
    dense = is_dense(said)
    if is_packed(given.source) and not dense:
        raise ValueError(f"{given.source} is already packed; compress the dense model that it was made from")
    if not dense:
        raise ValueError(
            f"{given.source} is quantized already ({quantized}); compress the dense model that it was made from"
        )
    if method_of(config).reshapes:
        return _reshape(given, config, packing)
    if needs.calibration and given.workers is not None:
        raise ValueError(
            f"--workers {given.workers} does not go with --method {given.method} with these settings, which needs calibration: "
            f"use torchrun for several processes, or choose --method {_words(calibration=False)}"
        )
    for word in ("calibration", "samples", "seqlen"):
        if (value := getattr(given, word)) is not None and not needs.calibration:
            raise ValueError(
                f"--{word} {value} does not go with --method {given.method} with these settings, which looks at weights alone; "
                f"choose --method {_words(calibration=True)}"
            )
    reason = "--in-memory was given" if given.in_memory else needs.whole_model
    if given.calibration == "self":
        reason = reason or "--calibration self lets the model write text"
    if _in_folder(given) and _must_transcribe(given):
        reason = (
            reason or f"the model writes the texts of those files in {given.calibration} that have no .txt beside them"
        )
    if not reason:
        return _compress_streamed(given, config, size, needs.calibration)
    for option, value in (("--resume", given.resume), ("--dry-run", given.dry_run), ("--workers", given.workers)):
        if value:
            raise ValueError(f"{option} goes block by block, which is not possible here: {reason}")
    if not given.in_memory:
        print(f"pyllmq compress: {reason}, so the whole model is loaded", file=sys.stderr)
    return _compress_in_memory(given, config, size)


def _words(calibration: bool) -> str:
    """The methods that need calibration with the settings that they have by default, or those that do not."""
    from .compression.methods import METHODS, method_of

    found = {word: method_of(registered.config({})) for word, registered in METHODS.items()}
    return " or ".join(w for w, m in found.items() if m.needs.calibration == calibration and not m.reshapes)


def _names(given: argparse.Namespace) -> dict[str, Any]:
    from .linears import DEFAULT_EXCLUDE

    return {
        "include": given.include,
        "exclude": (*DEFAULT_EXCLUDE, *(given.exclude or ())),
        "embeddings": given.embeddings,
        "head": given.head,
    }


def _reshape(given: argparse.Namespace, config: MethodConfig, packing: MethodConfig | None) -> int:
    """A smaller dense folder, for transformers as it is; with `packing` its Linears are packed besides."""
    from . import compress, save_pretrained
    from .compression.methods import method_of
    from .compression.methods.vocabulary import stale_files
    from .folders import copy_others, new_folder
    from .loading import load_model, load_tokenizer

    method = method_of(config)
    transcribed = method.needs.calibration and _in_folder(given) and _must_transcribe(given)
    in_blocks = method.needs.calibration and not (given.in_memory or given.dry_run or transcribed)
    dense = () if packing else ("include", "exclude", "embeddings", "head", "report")
    calibrated = method.needs.calibration or packing is not None
    whole = () if in_blocks else ("resume",)
    for word in ("workers", *whole, *dense, *(() if calibrated else ("samples", "seqlen"))):
        if (value := getattr(given, word)) not in (None, False):
            why = "packs no layer without --bits or --pattern"
            if packing or word in ("workers", "resume"):
                why = "holds the whole model in memory, or one block in one process"
            raise ValueError(f"--{word} {value} does not go with --method {given.method}, which {why}; leave it out")
    if given.calibration == "self":
        raise ValueError(f"--calibration self does not go with --method {given.method}; give a file of text")
    if in_blocks:
        return _reshape_streamed(given, config, packing)
    model = load_model(given.source, given.architecture)
    batches = _calibration_batches(model, given) if method.needs.calibration else []
    text = "" if method.needs.calibration else _text(given.calibration)
    tokenizer = None if method.needs.calibration else load_tokenizer(given.source)
    tokenizer, report = method.reshape(model, tokenizer, text, batches)
    print(report)
    if given.dry_run:
        print("nothing was written")
        return 0
    if packing is not None:
        packed = compress(model, packing, batches, progress=not given.quiet, **_names(given))
        save_pretrained(model, given.output, source=given.source)
        _print_report(packed, given)
        return 0
    with new_folder(given.output) as part:
        model.save_pretrained(part)
        stale: set[str] = set()
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
            stale = stale_files(tokenizer) - {file.name for file in part.iterdir()}
        copy_others(Path(given.source), part, skip=(Path(given.output),))
        for name in stale:
            (part / name).unlink(missing_ok=True)
    print(f"written to {given.output}; load it with {report.loads_with}")
    return 0


def _reshape_streamed(given: argparse.Namespace, config: Any, packing: MethodConfig | None) -> int:
    """As `_reshape`, block by block; what is to be packed is kept dense in OUT.narrow until it is."""
    from . import compress_folder
    from .compression.jobs.manifest import working_folder
    from .compression.jobs.pruned_folder import prune_folder
    from .integrations.checkpoint import StreamedModel

    output, progress = Path(given.output), not given.quiet
    with _ended_by_signal():
        streamed = StreamedModel(given.source, architecture=given.architecture)
        batches = _calibration_batches(streamed.model, given)
        if packing is None:
            pruned = prune_folder(streamed, output, config, batches, resume=given.resume, progress=progress)
            print(f"{pruned}\nwritten to {output}; load it with {pruned.loads_with}")
            return 0
        narrow = _narrow_folder(output)
        print(prune_folder(streamed, narrow, config, batches, resume=given.resume, keep=True, progress=progress))
        begun = given.resume and (working_folder(output) / "manifest.json").exists()
        report = compress_folder(narrow, output, packing, batches, resume=begun, progress=progress, **_names(given))
        for folder in (narrow, working_folder(narrow)):
            shutil.rmtree(folder)
        _print_report(report, given)
    return 0


def _narrow_folder(output: Path) -> Path:
    return output.with_name(f"{output.name}.narrow")


def _compress_in_memory(given: argparse.Namespace, config: MethodConfig, size: str | None) -> int:
    from . import compress, save_pretrained
    from .compression.methods import method_of
    from .loading import load_model

    model = load_model(given.source, given.architecture)
    config = _with_size(model, given, config, size)
    batches = _calibration_batches(model, given) if method_of(config).needs.calibration else None
    report = compress(model, config, batches, progress=not given.quiet, **_names(given))
    save_pretrained(model, given.output, source=given.source)
    _print_report(report, given)
    return 0


def _compress_streamed(given: argparse.Namespace, config: MethodConfig, size: str | None, calibrated: bool) -> int:
    from .compression.jobs.dry_run import plan_folder
    from .compression.jobs.files import compress_files
    from .compression.jobs.folder import compress_folder
    from .compression.ranks import ALONE, joined
    from .integrations.checkpoint import StreamedModel

    with _ended_by_signal(), joined() if calibrated else nullcontext(ALONE) as ranks:
        streamed = StreamedModel(given.source, architecture=given.architecture)
        job = (streamed, given.output, _with_size(streamed.model, given, config, size, streamed.copied_bytes()))
        batches = _calibration_batches(streamed.model, given) if calibrated else []
        if given.dry_run:
            print(plan_folder(*job, batches, **_names(given)))
            return 0
        how: dict[str, Any] = {"resume": given.resume, "progress": not given.quiet, **_names(given)}
        if calibrated:
            report = compress_folder(*job, batches, ranks=ranks, **how)
        else:
            report = compress_files(*job, workers=1 if given.workers is None else given.workers, **how)
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


def _with_size(model: Any, given: argparse.Namespace, config: Any, size: str | None, copied: int = 0) -> Any:
    """The config with the bits at which the folder has this size. `copied`: bytes of tensors that the model has no place for."""
    from .compression.jobs.in_memory import bits_for_size
    from .folders import other_files

    if size is None:
        return config
    names = _names(given)
    source = Path(given.source)
    other = copied + sum((source / name).stat().st_size for name in other_files(source))
    return replace(
        config, bits=bits_for_size(model, _bytes("--size", size), other, indexed=not given.in_memory, **names)
    )


def _bytes(name: str, text: str) -> int:
    units = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "B": 1.0}
    for unit, factor in units.items():
        if text.upper().endswith(unit):
            try:
                return round(float(text[: -len(unit)]) * factor)
            except ValueError:
                break
    raise ValueError(f"{name} is {text!r}; give a number with a unit: {', '.join(units)}, for example 1.9GB")


def _calibration_batches(model: Any, given: argparse.Namespace) -> list[dict[str, Any]]:
    from .compression import calibration
    from .compression.media import batches_of_files, check_takes_text
    from .loading import load_tokenizer

    samples, seqlen = _windows(given)
    if _in_folder(given):
        return batches_of_files(model, given.source, _media(model, given)[:samples])
    check_takes_text(model)
    try:
        tokenizer = load_tokenizer(given.source)
    except ValueError as error:
        other = f"--method {_words(calibration=False)}"
        raise ValueError(f"{error}. Methods without calibration need no tokenizer: {other}") from error
    if given.calibration == "self":
        return calibration.self_written(model, tokenizer, samples, seqlen, progress=not given.quiet)
    text = None if given.calibration is None else _text(given.calibration)
    return calibration.batches_of_text(model, tokenizer, text, samples, seqlen)


def _in_folder(given: argparse.Namespace) -> bool:
    return given.calibration not in (None, "self") and Path(given.calibration).is_dir()


def _media(model: Any, given: argparse.Namespace) -> list[Path]:
    """Files of the folder that --calibration names."""
    from .compression.media import media_files

    if given.seqlen is not None:
        raise ValueError(f"--seqlen {given.seqlen} is about text, and {given.calibration} is a folder; leave it out")
    return media_files(model, given.calibration)


def _must_transcribe(given: argparse.Namespace) -> bool:
    from .compression.media import must_transcribe
    from .integrations.checkpoint import StreamedModel

    model = StreamedModel(given.source, architecture=given.architecture).model
    return must_transcribe(model, _media(model, given)[: _windows(given)[0]])


def _windows(given: argparse.Namespace) -> tuple[int, int]:
    """(how many of the calibration text, how long)."""
    return 128 if given.samples is None else given.samples, 512 if given.seqlen is None else given.seqlen


def _text(file: str | None) -> str:
    from .compression.calibration import builtin_paragraphs

    if file is None:
        return "\n\n".join(builtin_paragraphs())
    try:
        return Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error})") from error


# ---- eval, generate, inspect ----------------------------------------------------------------------------------------


def _load_causal(given: argparse.Namespace) -> tuple[Any, Any]:
    """(model, tokenizer), fused after its precision is set: fusing compares at that precision.

    A dense model has no packed layer to set: asking for a precision there is an error.
    """
    from . import fusion
    from .folders import is_packed
    from .loading import load_causal_model, load_tokenizer
    from .nn import set_precision

    tokenizer, model = load_tokenizer(given.folder), load_causal_model(given.folder, fuse=False)
    if given.precision is not None:
        set_precision(model, given.precision)
    if is_packed(given.folder):
        fusion.fuse(model)
    return model, tokenizer


def run_eval(given: argparse.Namespace) -> int:
    from .evaluate import decoding_speed, perplexity

    model, tokenizer = _load_causal(given)
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

    from .compression.calibration import within_positions

    model, tokenizer = _load_causal(given)
    torch.manual_seed(given.seed)
    inputs = tokenizer(given.prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise ValueError(f"--prompt is {given.prompt!r}, which has no tokens; give at least one")
    with within_positions(model, length + given.max_new_tokens):
        ids = model.generate(
            inputs["input_ids"],
            attention_mask=inputs.get("attention_mask"),
            max_new_tokens=given.max_new_tokens,
            do_sample=given.sample,
        )
    print(tokenizer.decode(ids[0], skip_special_tokens=True))
    return 0


def run_inspect(given: argparse.Namespace) -> int:
    from .folders import PackedFolder, other_files

    if given.fused:
        return _inspect_fused(given)
    opened = PackedFolder.open(given.folder)
    structures = opened.structures
    if not structures and not given.json:
        for name, (n, k) in opened.description.shapes.items():
            print(f"{name}  {n}x{k}")
        print(f"{len(opened.description.shapes)} dense Linears of widths of their own; nothing is packed")
        return 0
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


def _inspect_fused(given: argparse.Namespace) -> int:
    from . import from_pretrained, fusion

    found = fusion.fuse(from_pretrained(given.folder, fuse=False))
    if given.json:
        print(json.dumps(found, indent=1))
        return 0
    width = max(len(name) for name in found)
    for name, why in found.items():
        print(f"{name or 'the model':<{width}}  {why}")
    print(f"{sum(why == fusion.FUSED for why in found.values())} of {len(found)} modules run as native steps")
    return 0


# ---- bench, doctor --------------------------------------------------------------------------------------------------


def run_bench(given: argparse.Namespace) -> int:
    precision = given.precision.split(",")
    if given.timeline:
        from .benchmarks.timeline import run_timeline

        if not given.model:
            raise ValueError("--timeline needs --model: a folder or the name of a shape")
        run_timeline(given.model, given.timeline, bits=(given.bits or "4").split(",")[0], precision=precision[0])
        return 0
    if given.model and (given.rivals or not Path(given.model).is_dir()):
        from .benchmarks.generation import RIVALS, run_generation

        run_generation(
            given.model,
            bits=given.bits or "4,2,2.1+0.005",
            rivals=given.rivals.split(",") if given.rivals else RIVALS[1:],
            precision=precision,
            csv=_csv(given, "pyllmq_bench_generation.csv"),
            plot=given.plot,
            keep=given.keep,
        )
        return 0
    if given.model:
        from .benchmarks.model import run_model

        csv, lengths = _csv(given, "pyllmq_bench_model.csv"), _integers("--lengths", given.lengths)
        run_model(given.model, bits=given.bits or "4", lengths=lengths, precision=precision, csv=csv)
        return 0
    csv = _csv(given, "pyllmq_bench.csv")
    if given.goals:
        from .benchmarks.goals import run_goals

        run_goals(csv=csv)
        return 0
    if given.op == "experts":
        from .benchmarks.experts import run_experts

        run_experts(
            given.shapes.split(","),
            (given.bits or "3,4").split(","),
            _integers("--m", given.m or "1,64"),
            given.experts,
            precision[0],
            csv,
        )
        return 0
    from .benchmarks.run import run

    run(
        op=given.op,
        shapes=given.shapes.split(","),
        bits=(given.bits or "2,3,4").split(","),
        tokens=_integers("--m", given.m or "1,8,512"),
        device=given.device,
        precision=precision,
        csv=csv,
        plot=given.plot,
    )
    return 0


def _csv(given: argparse.Namespace, default: str) -> str | None:
    return (default if given.csv is None else given.csv) or None


def _integers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{name} is {text!r}; give integers separated by commas, for example 1,8,512") from error


def run_doctor(given: argparse.Namespace) -> int:
    import torch

    from . import __version__, backends
    from .dispatch import Kernel, choose, rows
    from .layouts import layout_for
    from .operations import WeightProblem

    print(f"pyllmq-kernels {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in ("torch", "transformers", "safetensors", "numpy", "triton", "matplotlib"):
        print(f"  {package:<13} {_version(package)}")
    print(f"  threads       {torch.get_num_threads()} (torch.set_num_threads), {os.cpu_count()} cores")
    print(f"  GPU           {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none that torch can use'}")
    print("back ends:")
    for name, (ok, why) in backends.report().items():
        print(f"  {name:<10} {'works' if ok else 'missing'}: {why}")
    ok, why = backends.cpu.runtime.available()
    if ok:
        from .backends.cpu.instruction_sets import FASTER, SERVED

        isa = backends.cpu.runtime.extension().isa()
        print(f"kernels of pyllmq._cpu on this processor ({isa}); faster would be {FASTER[isa]}:")
        for part, served_by in SERVED[isa].items():
            print(f"  {part:<43}{served_by}")
    print(f"blocks as native steps (pyllmq.fuse): {'works' if ok else 'missing'}: {why}")
    print("codebook_linear of 4 bits with fp16 activations runs here, by device and number of tokens:")
    broken = False
    for device in ("cpu", "cuda"):
        try:
            found = layout_for("codebook", device)
            layout = "checkpoint.codebook" if found is None else found.name
            tokens: dict[Kernel, list[str]] = {}
            for m in (1, 2, 16, 64, 65, 512):
                problem = WeightProblem("packed_linear", device, torch.float16, layout, m, meta=(4,))
                tokens.setdefault(choose(problem), []).append(str(m))
        except (ValueError, RuntimeError) as error:
            broken = True
            print(f"  {device:<10} nothing: {error}")
            continue
        print(f"  {device:<10} layout {layout}")
        for kernel, numbers in tokens.items():
            print(f"  {'':<10} {kernel.name} for {', '.join(numbers)}: {kernel.because}")
    print("kernels, in the order in which they are tried:")
    for each in rows():
        print(f"  {each.op:<20} {each.name:<32} {each.because}")
    return int(broken)


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
