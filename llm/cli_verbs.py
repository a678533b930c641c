"""Every verb of the command line: its flags, the function that it calls, and its help.

Each flag is declared once, here, and passed to the verb's function as a keyword argument. A flag that is not given is
left out where the function has a default for it. Functions are named by strings and imported when a verb runs, because
importing torch takes seconds that `--help` and the tokenizer need not wait for.
"""

import argparse
from functools import partial
from typing import Any

from llm.cli_parser import MainParser, PrintCompletion, VerbParser, above_zero, numbers, positive, whole
from llm.version import __version__

DOCUMENTS_HELP = (
    "what one document is in text: line, paragraph (the lines between empty lines), file (of a folder all text, also "
    ".md or .py), or auto (file if the first MiB holds an empty line, else line); of JSON and tables always a record"
)
TEXT_KEY_HELP = "key of the text in JSON (a.b: key b of the object a), column in a table (default %(default)s)"


def make_parser() -> MainParser:
    """Makes the parser of the command line, with one parser per verb."""
    parser = MainParser(
        prog="llm",
        description="From raw text to a trained, evaluated, exportable language model.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--version", action="version", version=f"llm-from-scratch {__version__}")
    completion = parser.add_argument("--print-completion", choices=["bash", "zsh"], action=PrintCompletion)
    completion.help = "print a shell's completion script"
    # The deepspeed launcher passes it. The environment has the same number.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=VerbParser)
    parser.verbs = verbs.choices
    add_verb = partial(_add_verb, verbs)

    verb = add_verb(
        "corpus",
        {"source": "llm.data.corpus:write_stdlib_corpus"},
        "write text that this machine already has, as jsonl",
        "llm corpus --source stdlib --output data/raw/corpus.jsonl",
        "output, documents, bytes, dropped",
    )
    verb.ending = ("{output}", "llm train_tokenizer --input {output} --model_prefix artifacts/tokenizer/llm_spm")
    verb.flag("--source", choices=["stdlib"], required=True, help="stdlib: this Python's standard library")
    verb.flag("--output", required=True, help="the .jsonl file to write")

    verb = add_verb(
        "download",
        {"": "llm.data.download:download"},
        "fetch the text of a data set from the Hugging Face Hub",
        "llm download fineweb-edu --tokens 3e9 --out_dir data/raw",
        "out_dir, files, bytes, tokens, repository, commit",
    )
    verb.when_interrupted = "it ends; the same command goes on where it stopped"
    verb.ending = ("{out_dir}", "llm prepare_data --input {out_dir} --vocab_size 32000 --out_dir data/shards")
    verb.flag(
        "name", metavar="NAME", help="fineweb-edu, climbmix, tinystories, wikitext, or hf:OWNER/NAME with --files"
    )
    verb.flag("--out_dir", required=True, help="the files go to OUT_DIR/NAME")
    verb.flag("--tokens", type=positive, help="take only as many files as have about so many tokens (default: all)")
    verb.flag(
        "--files",
        nargs="+",
        metavar="PATTERN",
        help="files of the repository, such as 'data/train-*.parquet'; * stands for any characters, also slashes",
    )

    verb = add_verb(
        "train_tokenizer",
        {"": "llm.data.tokenizer:train_tokenizer"},
        "train a tokenizer that keeps every text: SentencePiece BPE with byte fallback, or byte-level BPE",
        "llm train_tokenizer --input data/raw/corpus.txt --model_prefix artifacts/tokenizer/llm_spm --vocab_size 32000",
        "vocab_size",
    )
    verb.ending = ("{model}", "llm prepare_data --input {inputs} --tok {model} --out_dir data/shards")
    _add_input(verb)
    verb.flag(
        "--model_prefix", required=True, help="the files to write are PREFIX.model (bytelevel: .json) and PREFIX.vocab"
    )
    verb.flag(
        "--kind",
        choices=["sentencepiece", "bytelevel"],
        help="bytelevel: over bytes, in text split with GPT-4's pattern (default %(default)s)",
    )
    verb.flag("--digits", type=whole, choices=[1, 2, 3], help="most digits of a token (default: any; bytelevel: 3)")
    verb.flag(
        "--vocab_size", type=whole, default=32_000, help="number of tokens in the vocabulary (default %(default)s)"
    )
    verb.flag("--strict_vocab_size", action="store_true", help="fail if the corpus is too small for --vocab_size")

    verb = add_verb(
        "prepare_data",
        {"": "llm.data.prepare:prepare_data"},
        "turn text into shards of tokens",
        "llm prepare_data --input data/raw/corpus.txt --tok artifacts/tokenizer/llm_spm.model --seq_len 2048 "
        "--shard_tokens 200_000_000 --out_dir data/shards",
        "train_tokens, val_tokens, documents, dropped, bytes_per_token, dataset_hash",
    )
    verb.when_interrupted = "it ends; the same command goes on from the last whole shard"
    verb.ending = ("{out_dir}", "llm train --config configs/125m.json data.path={out_dir}")
    _add_input(verb)
    # A default of its own, because --vocab_size may take its place.
    verb.flag("--tok", default=None, help="a .model or .json file, tiktoken ranks as FILE:SPLIT, or a folder")
    verb.flag(
        "--vocab_size", type=positive, help="in place of --tok: train a tokenizer of so many tokens on the input first"
    )
    verb.flag(
        "--tokens",
        choices=["auto", "uint16", "uint32"],
        help="the input is token ids of --tok, of this type (nanoGPT: uint16; auto: llm.c and Megatron-LM tell it)",
    )
    verb.flag("--out_dir", required=True, help="the directory of shards to make")
    verb.flag("--seq_len", type=whole, default=2048, help="default sequence length in training (default %(default)s)")
    verb.flag("--shard_tokens", type=whole, default=200_000_000, help="tokens per shard (default %(default)s)")
    verb.flag("--val_fraction", type=float, help="fraction held out for validation (default %(default)s)")
    verb.flag(
        "--dedup",
        choices=["off", "exact"],
        help="exact: keep only the first of equal documents; needs 110 bytes of memory per document "
        "(default %(default)s)",
    )
    verb.flag(
        "--exclude",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="evaluation texts, or task:NAME of lm-evaluation-harness: leave out documents that share a run of words",
    )
    verb.flag("--ngram", type=positive, help="with --exclude: words of such a run (default %(default)s)")
    verb.flag("--workers", type=whole, help="number of processes (default: one per core)")
    verb.flag(
        "--ray",
        metavar="auto|HOST:PORT",
        help="encode on all CPUs of this Ray cluster instead; its nodes need the file of --tok (pip install ray)",
    )

    verb = add_verb(
        "train",
        {"": "llm.training.train:train"},
        "train a model, in one process or in many under deepspeed, torchrun or srun",
        "llm train --config configs/125m.json optimizer.lr=3e-4 train.total_tokens=200_000_000",
        "step, tokens, train_loss, val_loss, bits_per_byte, tokens_per_second, mfu, checkpoint, best; "
        "of a run that ended early, with exit code 75, also stopped",
    )
    verb.ending = ("{checkpoint}", "llm generate --ckpt {best} --prompt TEXT, llm report {run}")
    verb.on_every_rank = True
    verb.check = "llm.training.resolve:check_data"
    verb.when_interrupted = "it ends before the first step; the same command begins again"
    _add_config(verb, "a JSON file such as configs/125m.json", "replaces a key of the config")
    verb.flag("--resume", metavar="auto|never|PATH", help="auto: continue from the newest checkpoint, if there is one")

    verb = add_verb(
        "config",
        {"": "llm.tools.config_keys:describe_config"},
        "describe the keys of a config: type, allowed values, default and meaning",
        "llm config optimizer",
        "keys; with --format schema: schema",
    )
    verb.flag(
        "name", nargs="?", help="a section such as optimizer, or a key such as model.n_layers (default: all keys)"
    )
    verb.flag(
        "--format",
        choices=["text", "markdown", "schema"],
        help="text; markdown: docs/config.md; schema: a JSON schema for editors (default %(default)s)",
    )

    verb = add_verb(
        "plan",
        {"": "llm.tools.plan:forecast"},
        "estimate what a run needs before it starts: memory by part, micro-batch, speed, hours",
        "llm plan --config configs/1.3b.json --gpus 8 --memory_gb 80 --device H100",
        "parameters, memory_bytes, micro_batch, tokens_per_second, hours, device_hours, cost, expected_loss, "
        "expected_loss_band, expected_bits_per_byte, state_bytes, activation_bytes, traffic_bytes, checkpoint_bytes, "
        "save_minutes, flops_per_token, choices, recommended, scaling, assumed",
    )
    verb.check = "llm.tools.first_checks:check_config"
    _add_config(verb, "a JSON file such as configs/125m.json", "replaces a key of the config", dest="path")
    verb.flag(
        "--gpus",
        type=numbers,
        metavar="N",
        help="number of devices, one process each (default 1); 1..64: a table of the powers of two",
    )
    verb.flag(
        "--memory_gb",
        type=above_zero,
        help="memory of one device (default: the datasheet's): the micro-batch is lowered until it fits",
    )
    verb.flag(
        "--device",
        dest="device_name",
        metavar="NAME",
        help="a GPU such as H100, with its datasheet values (default: this machine, measured)",
    )
    verb.flag(
        "--mfu",
        type=above_zero,
        help="fraction of the device's matmul rate in training (default: each op at its measured share; on a CPU 0.4)",
    )
    verb.flag("--node_gpus", type=positive, help="devices of one machine (default %(default)s)")
    verb.flag(
        "--network_gbs",
        type=above_zero,
        help="GB/s of each device between machines, one direction (default %(default)s: 400 Gbit/s InfiniBand)",
    )
    verb.flag(
        "--hours",
        type=above_zero,
        help="choose the shape of the model and train.total_tokens for the least loss in this time",
    )
    verb.flag("--write", metavar="FILE", help="write the config that --hours has chosen")
    verb.flag("--price", type=above_zero, help="of one device for an hour, for the cost of the run")
    verb.flag(
        "--mtbf_hours",
        type=above_zero,
        help="mean time between failures of one device: how often to save",
    )
    verb.flag("--picture", metavar="FILE", help="a PNG of the speed over the numbers of --gpus")

    verb = add_verb(
        "launch",
        {"": "llm.tools.launch:write_launch"},
        "write the files that start a training on a cluster, and say how to start them",
        "llm launch slurm --config configs/1.3b.json --nodes 2 --out_dir launch",
        "files, start, hours",
    )
    verb.check = "llm.tools.first_checks:check_config"
    verb.flag("kind", choices=["slurm", "hosts", "k8s", "skypilot"], help="how the cluster starts programs")
    _add_config(verb, "a JSON file such as configs/125m.json", "replaces a key of the config")
    verb.flag("--out_dir", required=True, help="the folder to write into, which all machines see")
    verb.flag("--nodes", type=positive, help="number of machines (default %(default)s)")
    verb.flag("--gpus", type=positive, help="GPUs in each machine (default %(default)s)")
    verb.flag("--device", dest="device_name", metavar="NAME", help="a GPU such as H100 (default %(default)s)")
    verb.flag("--max_hours", type=above_zero, help="of one job; the run goes on in the next (default %(default)s)")
    verb.flag("--hosts", nargs="+", metavar="HOST", help="names of the machines, for hosts")
    verb.flag("--image", help="the container, for k8s (default %(default)s)")

    verb = add_verb(
        "eval",
        {"inputs": "llm.inference.evaluate:evaluate", "tasks": "llm.inference.eval_tasks:evaluate_tasks"},
        "score text or run lm-evaluation-harness tasks, in one process or in many under deepspeed, torchrun or srun",
        "llm eval --ckpt artifacts/checkpoints/latest --input data/raw/val.txt",
        "nll_per_token, perplexity, bits_per_byte, tokens, bytes, documents, bits_per_character, characters, "
        "nll_per_token_stderr, bits_per_byte_stderr, inputs; with --tasks: results, versions, "
        "n-shot, n-samples",
    )
    verb.check = "llm.tools.first_checks:check_eval"
    verb.on_every_rank = True
    what = verb.add_mutually_exclusive_group(required=True)
    _add_input(
        verb,
        what,
        "files or folders of text as for prepare_data, or directories of shards (their validation split)",
    )
    what.add_argument(
        "--tasks",
        nargs="+",
        action="extend",
        metavar="TASK",
        help="tasks of lm-evaluation-harness, separated by blanks or commas (pip install 'llm-from-scratch[eval]')",
    )
    verb.flag("--include_path", metavar="DIR", help="with --tasks: a folder with the .yaml files of your own tasks")
    verb.flag("--num_fewshot", type=whole, metavar="N", help="with --tasks: examples before each question")
    verb.flag("--limit", type=whole, metavar="N", help="with --tasks: only the first N documents of each task")
    _add_checkpoint(verb)
    verb.flag("--batch_size", type=whole, help="sequences at a time (default %(default)s)")
    verb.flag(
        "--stride",
        type=whole,
        metavar="N",
        help="for a document longer than the model's sequences: predict N tokens per window; a smaller N gives each "
        "token more context and takes longer (default: the sequence length)",
    )
    verb.flag("--compress", action="store_true", help="also compress the same bytes with xz -9 and zstd -19")

    verb = add_verb(
        "profile",
        {"": "llm.tools.profile_step:profile"},
        "run some training steps and show how long each part takes",
        "llm profile --config configs/125m.json train.micro_batch=8 --steps 30",
        "step_ms, tokens_per_second, mfu, mfu_causal, matmul_fraction, data_wait_ms, forward_ms, backward_ms, "
        "optimizer_ms, communication_ms, profiled_step_ms, work, operators, gaps, idle_ms, gpu_busy, our_kernels, "
        "trace, memory_png, data",
    )
    verb.on_every_rank = True
    verb.ending = ("{out_dir}", "")
    _add_config(verb, "as for train; random tokens replace data that does not exist", "replaces a key of the config")
    verb.flag("--steps", type=whole, default=20, help="steps to time without the profiler (default %(default)s)")
    verb.flag(
        "--out_dir", default="artifacts/profile", help="folder for the trace and the pictures (default %(default)s)"
    )

    verb = add_verb(
        "report",
        {"": "llm.tools.report:report"},
        "draw the metrics of one or several runs: a page for a browser, and pictures",
        "llm report artifacts/checkpoints",
        "report, pictures, runs",
    )
    verb.ending = ("{report}", "")
    verb.flag("run_dirs", nargs="+", metavar="RUN_DIR", help="a run's folder, the checkpoint.dir of its config")
    verb.flag("--out_dir", metavar="DIR", help="folder to write to (default: report in the first RUN_DIR)")

    verb = add_verb(
        "generate",
        {"": "llm.inference.generate:generate"},
        "continue a prompt",
        'llm generate --ckpt artifacts/checkpoints/latest --prompt "Once upon a time" --max_new_tokens 100',
        "text, tokens, tokens_per_second, prefill_seconds, decode_seconds, completions",
    )
    verb.check = "llm.tools.first_checks:check_generate"
    _add_checkpoint(verb)
    prompts = verb.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", help="the text to continue; - reads it from stdin")
    prompts.add_argument(
        "--prompts",
        metavar="FILE",
        help='a file with one prompt per line, in a .jsonl as {"prompt": ...}; - reads stdin',
    )
    verb.flag("--num_samples", type=whole, help="continuations per prompt (default %(default)s)")
    verb.flag("--batch_size", type=whole, help="continuations to generate at once (default %(default)s)")
    verb.flag("--max_new_tokens", type=whole, help="tokens to generate at most (default %(default)s)")
    verb.flag("--temperature", type=float, help="0: always take the most likely token (default %(default)s)")
    verb.flag("--top_k", type=whole, help="sample among the K most likely tokens")
    verb.flag("--top_p", type=float, help="sample among the most likely tokens that together have this probability")
    verb.flag("--min_p", type=float, help="sample among tokens with at least this fraction of the highest probability")
    verb.flag(
        "--repetition_penalty",
        type=float,
        help="above 1: makes tokens that already occurred less likely (default %(default)s)",
    )
    verb.flag("--stop", action="append", metavar="TEXT", help="end before this text; may be given several times")
    verb.flag("--seed", type=whole, help="seed of the sampling (default %(default)s)")

    verb = add_verb(
        "export",
        {"": "llm.tools.export:export"},
        "write a checkpoint's model for other programs",
        "llm export --ckpt artifacts/checkpoints/latest --out_dir artifacts/export --precision bf16",
        "out_dir, format, precision, parameters, files, bytes",
    )
    verb.check = "llm.tools.first_checks:check_export"
    verb.ending = ("{out_dir}", "")
    verb.flag("--ckpt", required=True, help="a checkpoint, or a run's folder (its latest)")
    verb.flag("--out_dir", required=True, help="the folder to make")
    verb.flag(
        "--format",
        choices=["hf", "gguf"],
        help="hf: a Hugging Face model folder; gguf: one file for llama.cpp (default %(default)s)",
    )
    verb.flag("--precision", choices=["fp32", "bf16"], help="dtype of the weights (default %(default)s)")
    verb.flag("--max_file_bytes", type=whole, help="bytes of weights per file (default %(default)s)")

    verb = add_verb(
        "import",
        {"": "llm.tools.import_model:import_hf"},
        "make a checkpoint from a Hugging Face folder with a model of the Llama family",
        "llm import --from downloads/model --out_dir artifacts/imported",
        "out_dir, parameters, model, command",
    )
    verb.check = "llm.tools.first_checks:check_import"
    verb.ending = ("{out_dir}", "llm generate --ckpt {out_dir} --prompt TEXT")
    verb.flag("--from", dest="source", required=True, metavar="DIR", help="the Hugging Face folder")
    verb.flag("--out_dir", required=True, help="the checkpoint to make; train.init_from takes it")
    verb.flag("--tok", help="the model's tokenizer (default: the one in DIR)")
    verb.flag("--max_seq_len", type=positive, help="longest sequence of the new model (default: that of the source)")
    verb.flag(
        "--rope_scaling",
        choices=["linear", "llama3", "yarn"],
        help="scale RoPE for the longer sequences (default: as in the source)",
    )

    verb = add_verb(
        "average",
        {"": "llm.tools.average:average"},
        "write the mean of a run's last checkpoints as a model folder",
        "llm average artifacts/checkpoints --last 3",
        "out_dir, parameters, checkpoints",
    )
    verb.check = "llm.tools.first_checks:check_average"
    verb.ending = ("{out_dir}", "llm eval --ckpt {out_dir} --input FILE")
    verb.flag("run_dir", metavar="RUN", help="a run's folder, the checkpoint.dir of its config")
    verb.flag(
        "--last", type=positive, metavar="N", help="checkpoints to average (default: checkpoint.keep_last, at most 5)"
    )
    verb.flag("--out_dir", help="the folder to make (default: RUN/average-N); train.init_from takes it, too")

    verb = add_verb(
        "compare",
        {"": "llm.tools.compare:compare"},
        "say from which step on two runs differ, in which number and which tensor first; fails if they do",
        "llm compare artifacts/checkpoints artifacts/again",
        "same, step, metric, tensor, steps, checkpoints, failed",
    )
    verb.check = "llm.tools.first_checks:check_compare"
    verb.flag("run_a", metavar="RUN_A", help="a run's folder, the checkpoint.dir of its config")
    verb.flag("run_b", metavar="RUN_B", help="the other run's")

    verb = add_verb(
        "doctor",
        {"kernels": "llm.tools.doctor:check_kernels", "": "llm.tools.doctor:describe_machine"},
        "check this machine, or all machines of a launcher; with --kernels, compare every kernel with plain torch at "
        "the sizes of a config",
        "llm doctor --config configs/125m.json",
        "versions, devices, cpu, crc32c, kernels, measured, findings, warnings, failed, under a launcher ranks and "
        "network; with --kernels: device, checks, failed, under a launcher ranks",
    )
    verb.on_every_rank = True
    verb.flag(
        "--kernels",
        action="store_true",
        help="check the kernels; takes a minute or two; under a launcher also whether all ranks compute the same bits",
    )
    verb.check = "llm.tools.first_checks:check_config"
    verb.flag(
        "--config",
        dest="config_path",
        metavar="CONFIG",
        help="the config whose folders are checked; with --kernels: whose sizes are, such as configs/125m.json",
    )
    verb.flag(
        "--seconds",
        type=above_zero,
        help="how long the device computes while its rates are measured (default %(default)s)",
    )
    verb.flag(
        "--backend",
        choices=["auto", "triton", "cpp", "torch"],
        help="with --kernels: the backend to check (default: the value of LLM_KERNELS)",
    )

    verb = add_verb(
        "inspect",
        {"path": "llm.tools.inspect_files:inspect", "text": "llm.tools.inspect_files:inspect_text"},
        "show the contents of a directory of shards or a checkpoint, or the tokens of a text",
        "llm inspect data/shards --verify",
        "path, dataset_hash, tokenizer_sha256, vocab_size, seq_len, train, val, packing, counters, lengths, samples; "
        "with --verify also failed; of a checkpoint: path, step, tokens, parameters, data, model, files, with --verify "
        "path, checkpoints, failed; with --text: tokens, bytes, bytes_per_token, pieces",
    )
    verb.check = "llm.tools.first_checks:check_inspect"
    verb.flag("path", nargs="?", help="a directory of shards, a checkpoint, or a run's folder")
    verb.flag(
        "--verify",
        action="store_true",
        help="read all of every shard, or of a checkpoint or a run's checkpoints; name what is damaged, and fail",
    )
    verb.flag("--samples", type=whole, help="number of samples to decode (default %(default)s)")
    verb.flag("--png", metavar="FILE", help="write a histogram of document lengths to this file")
    verb.flag("--tok", metavar="FILE", help="with --text: the tokenizer")
    verb.flag("--text", help="show the tokens that --tok makes of this text")
    return parser


def _add_verb(
    verbs: Any, name: str, functions: dict[str, str], summary: str, example: str, json_keys: str
) -> VerbParser:
    parser: VerbParser = verbs.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        # Other formatters would join the lines of the example.
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # `parse_known_args` above compares whole names, and an abbreviation may become ambiguous with a new flag.
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # a flag that is not given leaves the function its own default
    )
    parser.functions = functions
    parser.add_argument(
        "--json",
        action="store_true",
        # Unlike the other flags it is always in the namespace: `main` takes it out there.
        default=False,
        help=f"print the result as one JSON object, the last line of stdout, with the keys {json_keys}",
    )
    return parser


def _add_input(
    parser: argparse.ArgumentParser,
    where: Any = None,
    what: str = "files, folders, quoted patterns: text, JSON, CSV, .parquet, .arrow, .tar, .gz ... (docs/data.md)",
) -> None:
    """where: a group of exclusive flags that --input is one of; None: --input is required."""
    # extend: a second --input adds to the first; otherwise it would replace it.
    (where or parser).add_argument(
        "--input", dest="inputs", required=where is None, nargs="+", action="extend", metavar="FILE", help=what
    )
    parser.add_argument("--documents", choices=["auto", "line", "file", "paragraph"], help=DOCUMENTS_HELP)
    parser.add_argument("--text_key", help=TEXT_KEY_HELP)
    parser.add_argument(
        "--strict",
        action="store_true",
        help="fail at the first document that cannot be used; otherwise it is left out and counted",
    )


def _add_config(parser: argparse.ArgumentParser, what: str, changes: str, dest: str = "config") -> None:
    parser.add_argument("--config", dest=dest, required=True, metavar="CONFIG", help=what)
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help=changes)


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt", required=True, help="a checkpoint, or a run's folder (its latest)")
    parser.add_argument("--tok", help="the tokenizer (default: the one in the checkpoint)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--precision", choices=["fp32", "bf16"])
