"""Compares decoding with transformers on the same weights, and with the speed of memory.

    python -m benchmarks.bench_generate [--configs tiny 125m] [--batch_sizes 1 16] [--precisions fp32 bf16]

Greedy continuation of random prompts by `llm.inference.decode` and by transformers' `generate`, on the same checkpoint
(random weights), with the same dtype and number of threads, in turn in one process; medians over the rounds. Without
transformers, only ours is measured. A first call of each is not timed. On a GPU ours makes its cache and captures its
CUDA graphs there, and the model keeps them (llm.inference.device_decoder), so no time below has a capture. Columns:

ours, theirs   new tokens per second over all sequences, with the prompts' pass
ratio          ours / theirs
step ms        ours: one token in every sequence, without the prompts' pass
limit          tokens per second if a step took only the time to read its bytes: every weight but the embedding table
               once, and the keys and values so far (on average); at the rate measured in the same rounds, on as many
               bytes, by torch's sum
of limit       speed of our steps relative to this limit
same tokens    number of equal tokens; in bf16 the two round differently, and random weights cause near ties
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.timing import wall_seconds
from llm.atomic import atomic_text
from llm.config import ModelConfig
from llm.config_file import load_config
from llm.errors import UserError
from llm.inference.decode import generate_batch
from llm.inference.sampling import Sampling
from llm.model.hf import to_hf
from llm.model.hf_config import hf_config
from llm.model.transformer import Transformer, parameter_count

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RIVAL = find_spec("transformers") is not None


def build(config: ModelConfig, folder: Path) -> None:
    """Writes a Hugging Face folder. With its random weights, logits differ so much that rounding changes no token."""
    model = Transformer(config)
    model.init_weights(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in model.named_parameters():
        value = value.detach() * (8 if name == "lm_head.weight" else 1)
        tensors |= {key: part.clone() for key, part in to_hf(config, name, value).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config(config, 1, 2)))


def load(config: ModelConfig, folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[Transformer, Any]:
    """Returns (our model, transformers' model or None), with the same weights."""
    theirs = None
    if RIVAL:
        import transformers

        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        theirs.generation_config.eos_token_id = None
        theirs.generation_config.pad_token_id = 0
    ours = Transformer(config)
    ours.init_weights(0)
    with torch.no_grad():
        ours.lm_head.weight.mul_(8)
    return ours.to(device, dtype).eval(), theirs


def measure(
    config: ModelConfig, folder: Path, precision: str, batch: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Measures one line of the table."""
    device, dtype = torch.device(options.device), DTYPES[precision]
    ours, theirs = load(config, folder, device, dtype)
    assert config.vocab_size is not None
    prompts = torch.randint(3, config.vocab_size, (batch, options.prompt_tokens))
    new = options.new_tokens
    weights = sum(p.nbytes for name, p in ours.named_parameters() if name != "embed_tokens.weight")
    slot = 2 * config.n_layers * config.n_kv_heads * config.head_size * (4 if device.type == "cpu" else dtype.itemsize)
    step_bytes = weights + batch * slot * (options.prompt_tokens + new // 2)
    memory = torch.zeros(step_bytes // 4, device=device)
    tokens: list[list[int]] = [[] for _ in range(batch)]

    def continue_ours(count: int) -> None:
        for sequence in tokens:
            sequence.clear()
        sampling = Sampling(temperature=0)
        for token in generate_batch(ours, prompts.tolist(), max_new_tokens=count, sampling=sampling):
            tokens[token.sequence].append(token.id)

    def continue_theirs() -> torch.Tensor:
        mask = torch.ones_like(prompts).to(device)
        made = theirs.generate(
            prompts.to(device), attention_mask=mask, do_sample=False, max_new_tokens=new, min_new_tokens=new
        )
        return made[:, options.prompt_tokens :]  # type: ignore[no-any-return]

    continue_ours(new)
    agreed = float((continue_theirs().cpu() == torch.tensor(tokens)).float().mean()) if theirs else None
    taken: dict[str, list[float]] = {"ours": [], "prompt": [], "theirs": [], "read": []}
    for _ in range(options.rounds):
        taken["ours"].append(wall_seconds(lambda: continue_ours(new), device))
        if theirs:
            taken["theirs"].append(wall_seconds(continue_theirs, device))
        taken["prompt"].append(wall_seconds(lambda: continue_ours(1), device))
        taken["read"].append(min(wall_seconds(memory.sum, device) for _ in range(10)))
    median = {name: statistics.median(values) for name, values in taken.items() if values}
    step = (median["ours"] - median["prompt"]) / (new - 1)
    ratios = sorted(theirs / ours for ours, theirs in zip(taken["ours"], taken["theirs"], strict=False))
    return {
        "parameters": parameter_count(config),
        "precision": precision,
        "batch": batch,
        "ours_tokens_per_second": batch * new / median["ours"],
        "theirs_tokens_per_second": batch * new / median["theirs"] if theirs else None,
        "ratio": statistics.median(ratios) if theirs else None,
        "ratio_range": [ratios[0], ratios[-1]] if theirs else None,
        "step_ms": 1e3 * step,
        "step_bytes": step_bytes,
        "read_bytes_per_second": step_bytes / median["read"],
        "limit_tokens_per_second": batch / median["read"],
        "of_limit": median["read"] / step,
        "same_tokens": agreed,
    }


def describe(device: torch.device) -> dict[str, Any]:
    """Returns the machine and the versions that a result belongs to."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpus = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        name = next((line.split(":")[1].strip() for line in cpus if line.startswith("model name")), platform.machine())
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "versions": {"torch": torch.__version__} | ({"transformers": version("transformers")} if RIVAL else {}),
    }


def table(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    versions += "" if "transformers" in result["versions"] else "; transformers not installed"
    lines = [
        f"{result['device']}, {result['threads']} threads on {result['cores']} cores, load {result['load_before']:.1f} "
        f"before, {result['load_after']:.1f} after; {versions}",
        f"{result['new_tokens']} new tokens after {result['prompt_tokens']}, median of {result['rounds']} rounds",
        "",
        "config  dtype  batch  ours/s  theirs/s  ratio  step ms   limit/s  of limit  same tokens",
    ]
    lines += [
        f"{line['config']:<6}  {line['precision']:<5}  {line['batch']:>5}  {line['ours_tokens_per_second']:>6,.0f}  "
        f"{_number(line['theirs_tokens_per_second'], ',.0f'):>8}  {_number(line['ratio'], '.1f'):>5}  "
        f"{line['step_ms']:>7.2f}  {line['limit_tokens_per_second']:>8,.0f}  {100 * line['of_limit']:>6.0f} %  "
        f"{_number(line['same_tokens'], '.0%'):>11}"
        for line in result["lines"]
    ]
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--configs", nargs="+", default=["tiny", "125m"], help="names in configs/, or JSON files")
    parser.add_argument("--vocab_size", type=int, default=32_000)
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--precisions", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--prompt_tokens", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=128, help="at least 2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="also write the result there, as JSON")
    options = parser.parse_args(arguments)
    sizes = {name: getattr(options, name) for name in ("prompt_tokens", "new_tokens", "rounds")}
    result = describe(torch.device(options.device)) | sizes | {"lines": []}
    try:
        for name in options.configs:
            path = CONFIGS / f"{name}.json" if (CONFIGS / f"{name}.json").exists() else Path(name)
            config = load_config(path).model.model_copy(update={"vocab_size": options.vocab_size})
            with tempfile.TemporaryDirectory() as folder:
                build(config, Path(folder))
                for precision in options.precisions:
                    for batch in options.batch_sizes:
                        line = measure(config, Path(folder), precision, batch, options)
                        result["lines"].append({"config": path.stem} | line)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    result["load_after"] = os.getloadavg()[0]
    print(table(result))
    if options.output:
        atomic_text(options.output, json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
