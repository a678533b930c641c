"""The command line: `llm VERB`, the same as `python -m llm VERB`. Each verb's arguments, and the function it calls."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llm.errors import UserError, exit_code

DOCUMENTS_HELP = (
    "what a document is in a .txt file: auto (one running text if its first MiB holds an empty line, else one document "
    "a line), line, paragraph (what stands between empty lines), or file; .jsonl always holds one document a line, "
    ".parquet one a row"
)
TEXT_KEY_HELP = "the text's key in .jsonl, its column in .parquet (default %(default)s)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code: 0 on success, 1 after a one-line error, 130 when interrupted."""
    # What DeepSpeed compiles at run time it builds with the ninja that is installed beside this Python.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    # Threads that spin while they wait make a step on busy cores several times slower; idle cores lose nothing.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    options = _parser().parse_args(arguments)

    def run() -> None:
        result = options.run(options)
        if options.json and int(os.environ.get("RANK", "0")) == 0:
            from llm.metrics import to_json

            print(to_json(result), flush=True)
        if failed := result.get("failed"):
            raise UserError(f"failed: {', '.join(failed)}; see above")

    return exit_code(run)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llm", description="From raw text to a trained, evaluated, exportable language model."
    )
    parser.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # the deepspeed launcher's; the environment rules
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    corpus = _verb(
        verbs,
        "corpus",
        _corpus,
        "write text that this machine already has, as jsonl",
        "llm corpus --source stdlib --output data/raw/corpus.jsonl",
        "output documents bytes dropped",
    )
    corpus.add_argument("--source", choices=["stdlib"], required=True, help="stdlib: this Python's standard library")
    corpus.add_argument("--output", required=True, help="the .jsonl to write")

    tokenizer = _verb(
        verbs,
        "train_tokenizer",
        _train_tokenizer,
        "train a lossless SentencePiece BPE tokenizer",
        "llm train_tokenizer --input data/raw/corpus.txt --model_prefix artifacts/tokenizer/llm_spm --vocab_size 32000",
        "vocab_size",
    )
    _input(tokenizer)
    tokenizer.add_argument("--model_prefix", required=True, help="writes PREFIX.model and PREFIX.vocab")
    tokenizer.add_argument("--vocab_size", type=int, default=32_000, help="pieces (default %(default)s)")
    tokenizer.add_argument(
        "--strict_vocab_size", action="store_true", help="fail where the corpus is too small for --vocab_size"
    )

    prepare = _verb(
        verbs,
        "prepare_data",
        _prepare_data,
        "turn text into shards of tokens",
        "llm prepare_data --input data/raw/corpus.txt --tok artifacts/tokenizer/llm_spm.model --seq_len 2048 "
        "--shard_tokens 200_000_000 --out_dir data/shards",
        "train_tokens val_tokens documents dropped bytes_per_token dataset_hash",
    )
    _input(prepare)
    prepare.add_argument("--tok", required=True, help="the tokenizer, a .model file")
    prepare.add_argument("--out_dir", required=True, help="the directory of shards to make")
    prepare.add_argument(
        "--seq_len", type=int, default=2048, help="default row length in training (default %(default)s)"
    )
    prepare.add_argument("--shard_tokens", type=int, default=200_000_000, help="tokens a shard (default %(default)s)")
    prepare.add_argument("--val_fraction", type=float, default=0.005, help="held out (default %(default)s)")
    prepare.add_argument(
        "--dedup",
        choices=["off", "exact"],
        default="off",
        help="exact: keep the first of equal documents; takes 100 bytes of memory a document (default %(default)s)",
    )
    prepare.add_argument("--workers", type=int, help="processes (default: one a core)")

    train = _verb(
        verbs,
        "train",
        _train,
        "train a model; one process, or many under deepspeed, torchrun or srun",
        "llm train --config configs/125m.json optimizer.lr=3e-4 train.total_tokens=200_000_000",
        "step tokens train_loss val_loss tokens_per_second mfu checkpoint",
    )
    train.add_argument("--config", required=True, help="a JSON file such as configs/125m.json")
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a key of the config")
    train.add_argument(
        "--resume", default="auto", metavar="auto|never|PATH", help="auto: go on from the newest checkpoint, if any"
    )

    plan = _verb(
        verbs,
        "plan",
        _plan,
        "say what a config will take before it is run: memory by part, micro-batch, speed, hours",
        "llm plan --config configs/1.3b.json --gpus 8 --memory_gb 80 --device H100",
        "parameters memory_bytes micro_batch tokens_per_second hours state_bytes activation_bytes "
        "flops_per_token assumed",
    )
    plan.add_argument("--config", required=True, help="a JSON file such as configs/125m.json")
    plan.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a key of the config")
    plan.add_argument("--gpus", type=_positive, default=1, help="devices, a process each (default %(default)s)")
    plan.add_argument("--memory_gb", type=_above_zero, help="of one device: lowers the micro-batch until it fits")
    plan.add_argument(
        "--device", metavar="NAME", help="a GPU such as H100, by its datasheet; default: this machine, measured"
    )
    plan.add_argument(
        "--mfu", type=_above_zero, default=0.4, help="the share of that rate to count on (default %(default)s)"
    )

    evaluate = _verb(
        verbs,
        "eval",
        _eval,
        "score text, or run tasks of lm-evaluation-harness; one process, or many under deepspeed, torchrun or srun",
        "llm eval --ckpt artifacts/checkpoints/latest --input data/raw/val.txt",
        "nll_per_token perplexity bits_per_byte tokens bytes documents bits_per_character characters "
        "nll_per_token_stderr bits_per_byte_stderr inputs (with --tasks: results versions n-shot n-samples)",
    )
    what = evaluate.add_mutually_exclusive_group(required=True)
    _input(
        evaluate,
        what,
        "files or folders of text as for prepare_data, or directories of shards (their validation split)",
    )
    what.add_argument(
        "--tasks",
        nargs="+",
        action="extend",
        metavar="TASK",
        help="names of lm-evaluation-harness (pip install lm-eval)",
    )
    evaluate.add_argument("--include_path", metavar="DIR", help="with --tasks: a folder of your own tasks' .yaml")
    evaluate.add_argument("--num_fewshot", type=int, metavar="N", help="with --tasks: examples before each question")
    evaluate.add_argument("--limit", type=int, metavar="N", help="with --tasks: the first N documents of each alone")
    _checkpoint(evaluate)
    evaluate.add_argument("--batch_size", type=int, default=8, help="rows at a time (default %(default)s)")
    evaluate.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="where a document is longer than the model's rows: predict N tokens a window; fewer see more before them, "
        "and take longer (default: the rows' length)",
    )
    evaluate.add_argument("--compress", action="store_true", help="show xz -9 and zstd -19 on the same bytes")

    profile = _verb(
        verbs,
        "profile",
        _profile,
        "run some training steps and say where each millisecond goes",
        "llm profile --config configs/125m.json train.micro_batch=8 --steps 30",
        "step_ms tokens_per_second mfu mfu_causal matmul_fraction data_wait_ms forward_ms backward_ms optimizer_ms "
        "communication_ms profiled_step_ms work operators gaps idle_ms gpu_busy our_kernels trace memory_png data",
    )
    profile.add_argument("--config", required=True, help="as of train; random tokens stand for data that is not there")
    profile.add_argument("--steps", type=int, default=20, help="timed without the profiler (default %(default)s)")
    profile.add_argument(
        "--out_dir", default="artifacts/profile", help="for the trace and the pictures (default %(default)s)"
    )
    profile.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the config")

    report = _verb(
        verbs,
        "report",
        _report,
        "draw what one or several runs did: a page for a browser, and pictures",
        "llm report artifacts/checkpoints",
        "report pictures runs",
    )
    report.add_argument(
        "run_dirs", nargs="+", metavar="RUN_DIR", help="a run's folder, the checkpoint.dir of its config"
    )
    report.add_argument("--out_dir", metavar="DIR", help="where to write (default: report in the first RUN_DIR)")

    generate = _verb(
        verbs,
        "generate",
        _generate,
        "continue a prompt",
        'llm generate --ckpt artifacts/checkpoints/latest --prompt "Once upon a time" --max_new_tokens 100',
        "text tokens tokens_per_second prefill_seconds decode_seconds completions",
    )
    _checkpoint(generate)
    prompts = generate.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", help="- reads it from stdin")
    prompts.add_argument(
        "--prompts", metavar="FILE", help='one prompt a line, in a .jsonl as {"prompt": ...}; - reads stdin'
    )
    generate.add_argument("--num_samples", type=int, default=1, help="continuations a prompt (default %(default)s)")
    generate.add_argument("--batch_size", type=int, default=16, help="side by side (default %(default)s)")
    generate.add_argument("--max_new_tokens", type=int, default=100, help="(default %(default)s)")
    generate.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the likeliest (default %(default)s)"
    )
    generate.add_argument("--top_k", type=int, help="sample among the K likeliest")
    generate.add_argument("--top_p", type=float, help="sample among the likeliest that hold this much probability")
    generate.add_argument("--min_p", type=float, help="sample among those with this fraction of the likeliest's")
    generate.add_argument(
        "--repetition_penalty", type=float, default=1.0, help="above 1: less of what is there (default %(default)s)"
    )
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    generate.add_argument("--seed", type=int, default=0, help="(default %(default)s)")

    export = _verb(
        verbs,
        "export",
        _export,
        "write a checkpoint's model for other programs",
        "llm export --ckpt artifacts/checkpoints/latest --out_dir artifacts/export --precision bf16",
        "out_dir format precision parameters files bytes",
    )
    export.add_argument("--ckpt", required=True, help="a checkpoint, or a run's folder (its latest)")
    export.add_argument("--out_dir", required=True, help="the folder to make")
    export.add_argument(
        "--format",
        choices=["hf", "gguf"],
        default="hf",
        help="hf: a Hugging Face model folder; gguf: one file for llama.cpp (default %(default)s)",
    )
    export.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="of the weights (default %(default)s)"
    )
    export.add_argument(
        "--max_file_bytes", type=int, default=5_000_000_000, help="of weights in a file (default %(default)s)"
    )

    importing = _verb(
        verbs,
        "import",
        _import,
        "make a checkpoint of a Hugging Face folder with a Llama or Qwen3 model",
        "llm import --from downloads/model --out_dir artifacts/imported",
        "out_dir parameters model",
    )
    importing.add_argument("--from", dest="source", required=True, metavar="DIR", help="the Hugging Face folder")
    importing.add_argument("--out_dir", required=True, help="the checkpoint to make; train.init_from takes it")
    importing.add_argument("--tok", help="the model's SentencePiece tokenizer (default: DIR/tokenizer.model)")

    doctor = _verb(
        verbs,
        "doctor",
        _doctor,
        "say what this machine has; with --kernels, hold every kernel against plain torch at a config's sizes",
        "llm doctor --kernels --config configs/125m.json",
        "versions devices cpu crc32c kernels failed, with --kernels device checks failed",
    )
    doctor.add_argument("--kernels", action="store_true", help="check the kernels; takes a minute or two")
    doctor.add_argument("--config", help="whose sizes to check at, such as configs/125m.json; with --kernels")
    doctor.add_argument(
        "--backend",
        choices=["auto", "triton", "cpp", "torch"],
        help="what to check (default: what LLM_KERNELS says); with --kernels",
    )

    inspect = _verb(
        verbs,
        "inspect",
        _inspect,
        "show what is in a directory of shards, in a checkpoint, or in a tokenizer's view of a text",
        "llm inspect data/shards --verify",
        "path dataset_hash tokenizer_sha256 vocab_size seq_len train val packing counters lengths samples "
        "(--verify: failed; a checkpoint: path step tokens parameters data model files; --text: tokens bytes "
        "bytes_per_token pieces)",
    )
    inspect.add_argument("path", nargs="?", help="a directory of shards, a checkpoint, or a run's folder")
    inspect.add_argument(
        "--verify", action="store_true", help="read the shards whole; name each bad block, and fail if there is one"
    )
    inspect.add_argument("--samples", type=int, default=3, help="pieces to decode (default %(default)s)")
    inspect.add_argument("--png", metavar="FILE", help="draw the histogram of document lengths")
    inspect.add_argument("--tok", metavar="FILE", help="a tokenizer, with --text")
    inspect.add_argument("--text", help="show how --tok cuts this text")
    return parser


def _verb(
    verbs: Any,
    name: str,
    run: Callable[[argparse.Namespace], dict[str, Any]],
    summary: str,
    example: str,
    keys: str,
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--json", action="store_true", help=f"last line of stdout: an object with {', '.join(keys.split())}"
    )
    parser.set_defaults(run=run)
    return parser


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _above_zero(text: str) -> float:
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def _input(
    parser: argparse.ArgumentParser,
    where: Any = None,
    what: str = "files, folders or quoted patterns: .txt, .jsonl, .parquet, each also .gz or .zst; UTF-8",
) -> None:
    """where: a group of the parser's in which --input is one choice; None: it is required."""
    (where or parser).add_argument(
        "--input", required=where is None, nargs="+", action="extend", metavar="FILE", help=what
    )
    parser.add_argument(
        "--documents", choices=["auto", "line", "file", "paragraph"], default="auto", help=DOCUMENTS_HELP
    )
    parser.add_argument("--text_key", default="text", help=TEXT_KEY_HELP)


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt", required=True, help="a checkpoint, or a run's folder (its latest)")
    parser.add_argument("--tok", help="its tokenizer; may be left out, a checkpoint carries its own")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")


def _speaker(options: argparse.Namespace) -> Callable[[str], None]:
    """Shows a line of a verb's result: on stdout, which with --json is the object's alone."""
    return partial(print, file=sys.stderr if options.json else sys.stdout, flush=True)


# The verbs import what they need when they run: --help and tokenizing should not wait for torch.


def _corpus(options: argparse.Namespace) -> dict[str, Any]:
    from llm.data.corpus import write_stdlib_corpus

    return write_stdlib_corpus(options.output)


def _train_tokenizer(options: argparse.Namespace) -> dict[str, Any]:
    from llm.data.tokenizer import train_tokenizer

    return train_tokenizer(
        options.input,
        options.model_prefix,
        options.vocab_size,
        strict_vocab_size=options.strict_vocab_size,
        documents=options.documents,
        text_key=options.text_key,
    )


def _prepare_data(options: argparse.Namespace) -> dict[str, Any]:
    from llm.data.prepare import prepare_data

    return prepare_data(
        options.input,
        options.tok,
        options.out_dir,
        seq_len=options.seq_len,
        shard_tokens=options.shard_tokens,
        val_fraction=options.val_fraction,
        documents=options.documents,
        text_key=options.text_key,
        dedup=options.dedup,
        workers=options.workers,
    )


def _train(options: argparse.Namespace) -> dict[str, Any]:
    from llm.config import load_config
    from llm.training.train import train

    return train(load_config(options.config, options.overrides), options.resume)


def _plan(options: argparse.Namespace) -> dict[str, Any]:
    from llm.tools.plan import forecast

    return forecast(
        options.config,
        options.overrides,
        gpus=options.gpus,
        memory_gb=options.memory_gb,
        device_name=options.device,
        mfu=options.mfu,
        say=_speaker(options),
    )


def _eval(options: argparse.Namespace) -> dict[str, Any]:
    others = ["stride", "compress"] if options.tasks else ["include_path", "num_fewshot", "limit"]
    for name in others:
        if getattr(options, name) not in (None, False):
            raise UserError(f"--{name} goes with {'--input' if options.tasks else '--tasks'}; leave it out")
    if options.tasks:
        return _eval_tasks(options)
    from llm.inference.evaluate import evaluate, print_table

    result = evaluate(
        options.ckpt,
        options.input,
        tok=options.tok,
        documents=options.documents,
        text_key=options.text_key,
        stride=options.stride,
        batch_size=options.batch_size,
        compress=options.compress,
        device=options.device,
        precision=options.precision,
    )
    if not options.json and os.environ["RANK"] == "0":
        print_table(result)
    return result


def _eval_tasks(options: argparse.Namespace) -> dict[str, Any]:
    from llm.inference.eval_tasks import evaluate_tasks, print_table

    result = evaluate_tasks(
        options.ckpt,
        options.tasks,
        tok=options.tok,
        include_path=options.include_path,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        batch_size=options.batch_size,
        device=options.device,
        precision=options.precision,
    )
    if result and not options.json:
        print_table(result)
    return result


def _profile(options: argparse.Namespace) -> dict[str, Any]:
    from llm.config import load_config
    from llm.tools.profile_step import profile

    config = load_config(options.config, options.overrides)
    return profile(config, steps=options.steps, out_dir=options.out_dir, say=_speaker(options))


def _report(options: argparse.Namespace) -> dict[str, Any]:
    from llm.tools.report import report

    result = report(options.run_dirs, options.out_dir)
    if not options.json:
        print(result["report"])
    return result


def _generate(options: argparse.Namespace) -> dict[str, Any]:
    from llm.inference.decode import Sampling
    from llm.inference.generate import read_prompts, run

    return run(
        options.ckpt,
        read_prompts(options.prompt, options.prompts),
        tok=options.tok,
        max_new_tokens=options.max_new_tokens,
        num_samples=options.num_samples,
        batch_size=options.batch_size,
        stop=options.stop,
        sampling=Sampling(
            repetition_penalty=options.repetition_penalty,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            seed=options.seed,
        ),
        device=options.device,
        precision=options.precision,
        stream=not options.json,
    )


def _export(options: argparse.Namespace) -> dict[str, Any]:
    from llm.tools.export import export

    made = export(
        options.ckpt,
        options.out_dir,
        format=options.format,
        precision=options.precision,
        max_file_bytes=options.max_file_bytes,
    )
    print(f"{made['out_dir']}: {', '.join(made['files'])}, {made['bytes']:,} bytes", file=sys.stderr)
    return made


def _import(options: argparse.Namespace) -> dict[str, Any]:
    from llm.tools.import_model import import_hf

    made = import_hf(options.source, options.out_dir, tok=options.tok)
    shape = " ".join(f"model.{key}={str(value).lower()}" for key, value in made["model"].items())
    print(f"{made['out_dir']}: {made['parameters']:,} parameters", file=sys.stderr)
    print(f"to train it: train.init_from={made['out_dir']} {shape}", file=sys.stderr)
    return made


def _doctor(options: argparse.Namespace) -> dict[str, Any]:
    from llm.tools.doctor import check_kernels, describe_machine

    if not options.kernels and (options.config or options.backend):
        raise UserError("--config and --backend say what to check: add --kernels, or leave them out")
    if options.kernels and not options.config:
        raise UserError("--kernels needs --config FILE, such as configs/125m.json")

    say = _speaker(options)
    if options.kernels:
        return check_kernels(options.config, options.backend, say)
    return describe_machine(say)


def _inspect(options: argparse.Namespace) -> dict[str, Any]:
    from llm.tools.inspect_files import inspect, inspect_text, print_report

    if (options.path is None) == (options.tok is None) or (options.tok is None) != (options.text is None):
        raise UserError("inspect wants a path, or --tok FILE with --text TEXT")
    if options.path is None:
        result = inspect_text(options.tok, options.text)
    else:
        result = inspect(options.path, verify=options.verify, samples=options.samples, png=options.png)
    if not options.json:
        print_report(result)
    return result
