"""Compares what recipes reach on the same text in the same time: `python -m benchmarks.bench_peers --text FILES`.

rules            `llm train --config configs/tiny.json`: every setting by llm/training/rules.py
tiny before      the settings that configs/tiny.json stated before the rules (AdamW at one rate of 5e-3)
defaults before  the defaults of llm/config.py before the rules (AdamW at one rate of 6e-4)
nanoGPT          its model (LayerNorm, GELU, learned positions, tied embedding) and the settings of its
                 config/train_shakespeare_char.py, with the batch and the dropout of its README's run on a CPU
llama LR         a Llama in a plain PyTorch loop: AdamW at one rate, weight decay 0.1, 2 % of warm-up, cosine to a tenth

All have the layers, the width, the text, the tokenizer and the held-out documents of the first. The two peers are
compiled by torch.compile, whose time does not count, and read random windows, as nanoGPT does.

First the rates: each contestant, in a process of its own, takes steps for a moment in turn with the others, so that the
machine must be idle for a few minutes. From them follow the tokens that each reads in --minutes. Then each trains on
that many tokens, which may happen beside other work; and again on as many as the first (the earlier settings), or with
as many FLOPs as the first (the peers). Every run has a whole schedule. A run that ended is a line of
OUTPUT/peers.jsonl and is not repeated.

A document is scored in windows of the sequence length, one after another, as `llm eval` does.
"""

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.bench_ladder import prepare, run_llm
from benchmarks.bench_train_cpu import PlainModel, answer
from benchmarks.training_step import TrainingStep
from llm.atomic import atomic_text
from llm.config import Config, DataConfig
from llm.config_file import load_config
from llm.data.document_reader import read_documents
from llm.data.object_store import read_data
from llm.data.shards import Loader
from llm.data.tokenizer import Tokenizer, load_tokenizer
from llm.errors import exit_code
from llm.model.flops import flops_per_token
from llm.training.resolve import resolve
from llm.version import source_commit

CONFIG = "configs/tiny.json"
HEAD = """The runs of `python -m benchmarks.bench_peers --text corpus.jsonl`, with the text of
`llm corpus --source stdlib`. `peers-rates.json` has the rates, with threads and version of torch; `LOG.md` the commits
and machines of the runs that have none in `peers.jsonl`.

"""
HELD_OUT = 30
"""One document in so many is held out."""
BEFORE = (
    "model.qk_norm=false optimizer.kind=adamw optimizer.lr={0} optimizer.embed_lr={0} optimizer.head_lr={0} "
    "optimizer.norm_lr={0} optimizer.beta2=0.95 optimizer.weight_decay=0.1 schedule.kind=cosine "
    "schedule.min_lr_ratio=0.1 train.global_batch_tokens=4096 schedule.warmup_tokens={1}"
)
OURS = {
    "rules": "",
    "tiny before": BEFORE.format("5e-3", 50_000),
    "defaults before": BEFORE.format("6e-4", 0),
}
LLAMA_RATES = (4e-3, 8e-3, 1.6e-2)


class GPTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, s, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, s, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, s, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """GPT-2 as nanoGPT builds it, without bias and dropout."""

    def __init__(self, vocab_size: int, context: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(context, width)
        self.layers = nn.ModuleList(GPTBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        initialise(self)
        for block in self.layers:
            for projection in (block.out, block.down):  # the last ones before a sum
                nn.init.normal_(projection.weight, std=0.02 / math.sqrt(2 * layers))

    def logits(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.positions.weight[: input_ids.shape[1]]
        for block in self.layers:
            x = block(x)
        return self.norm(x) @ self.embed.weight.T

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(input_ids).flatten(0, 1), labels.flatten())


def initialise(model: nn.Module) -> None:
    """Draws all matrices from a normal distribution of 0.02, as GPT-2 did."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)


def cosine(step: int, steps: int, warmup: int, least: float) -> float:
    """Returns the fraction of the peak rate of a step: a linear rise, then a cosine that ends at `least`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * progress))


class Peer:
    """A model of another project or of a plain loop, with its optimizer, on random windows of a token stream."""

    def __init__(self, name: str, config: Config, stream: Tensor, total_tokens: int) -> None:
        torch.manual_seed(1337)
        shape, context = config.model, config.data.seq_len
        assert shape.vocab_size is not None
        assert context is not None
        self.stream, self.context = stream, context
        self.model: GPT | PlainModel
        if name == "nanoGPT":
            heads = max(4, shape.n_heads)
            self.model = GPT(shape.vocab_size, context, shape.n_layers, shape.d_model, heads)
            self.peak, self.rows, betas, warmup = 1e-3, 12, (0.9, 0.99), 100
        else:
            self.model = PlainModel(shape, context)
            initialise(self.model)
            self.peak, self.rows, betas, warmup = float(name.split()[1]), 4096 // context, (0.9, 0.95), 0
        self.steps = max(1, total_tokens // self.tokens_per_step)
        self.warmup = warmup or self.steps // 50
        matrices = [parameter for parameter in self.model.parameters() if parameter.dim() == 2]
        vectors = [parameter for parameter in self.model.parameters() if parameter.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=self.peak, betas=betas, fused=True)
        self.done = 0
        self.model.compile()

    @property
    def tokens_per_step(self) -> int:
        return self.rows * self.context

    @property
    def flops_per_token(self) -> float:
        """6 for each weight of a product, and 12 for each layer's width and token of the context."""
        weights = sum(parameter.numel() for parameter in self.model.parameters() if parameter.dim() == 2)
        tables = self.model.positions if isinstance(self.model, GPT) else self.model.embed
        width, layers = tables.weight.shape[1], len(self.model.layers)
        return 6 * (weights - tables.weight.numel()) + 12 * layers * width * self.context

    def __call__(self) -> None:
        """Takes a step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak * cosine(self.done, self.steps, self.warmup, 0.1)
        begins = torch.randint(len(self.stream) - self.context, (self.rows, 1))
        windows = self.stream[begins + torch.arange(self.context + 1)].long()
        self.model(windows[:, :-1], windows[:, 1:]).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1


def config_of(name: str, folder: Path, total_tokens: int) -> Config:
    """Returns the config of a run of `llm train`, with every setting that follows filled in."""
    stated = [*OURS[name].split(), f"data.path={folder / 'shards'}", "train.device=cpu", "train.precision=fp32"]
    run = folder / "runs" / f"{name.replace(' ', '-')}-{total_tokens}"
    stated += [f"checkpoint.dir={run}", f"train.total_tokens={total_tokens}", "train.eval_every_steps=1000000000"]
    filled, _ = resolve(load_config(CONFIG, stated), read_data(DataConfig(path=str(folder / "shards"))))
    return filled


def read_stream(folder: Path, seq_len: int) -> Tensor:
    """Returns all tokens of the training split in their order, int32."""
    data = read_data(DataConfig(path=str(folder / "shards")))
    sequences = data.sequences("train", seq_len)
    with Loader(
        data, "train", seq_len=seq_len, seed=0, global_batch=1, micro_batch=1, position=0, end=sequences, shuffle=False
    ) as loader:
        return torch.cat([batch.input_ids.flatten().to(torch.int32) for batch in loader])


def compete(name: str, folder: Path, orders: Connection) -> None:
    """The process of a contestant. Answers each number of seconds with its tokens a second over them."""
    config = config_of(name if name in OURS else "rules", folder, 3_000_000)
    assert config.data.seq_len is not None
    step: TrainingStep | Peer
    if name in OURS:
        step = TrainingStep(config)
        tokens = step.plan.tokens_per_step
    else:
        step = Peer(name, config, read_stream(folder, config.data.seq_len), 3_000_000)
        tokens = step.tokens_per_step
    for _ in range(3):
        step()
    orders.send(True)
    while seconds := orders.recv():
        begin, steps = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            step()
            steps += 1
        orders.send(steps * tokens / (time.perf_counter() - begin))


def measure_rates(names: Sequence[str], folder: Path, rounds: int, seconds: float) -> dict[str, float]:
    """Returns the median tokens a second of each contestant."""
    spawning = multiprocessing.get_context("spawn")
    orders = {}
    for name in names:  # one after another, because each uses all threads while it compiles
        orders[name], other = spawning.Pipe()
        spawning.Process(target=compete, args=(name, folder, other), daemon=True).start()
        other.close()
        answer(name, orders[name])
        print(f"{name} is ready", file=sys.stderr)
    rates: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            orders[name].send(seconds)
            rates[name].append(answer(name, orders[name]))
    for name in names:
        orders[name].send(0)
    return {name: statistics.median(values) for name, values in rates.items()}


@torch.inference_mode()
def score(logits: Callable[[Tensor], Tensor], tokenizer: Tokenizer, text: Path, context: int) -> float:
    """Returns bits per byte of the documents of a file, EOS left out."""
    bits, size = 0.0, 0
    for windows in _batches(_windows(tokenizer, text, context), 16):
        inputs, targets = (torch.tensor(part) for part in zip(*windows, strict=True))
        losses = F.cross_entropy(logits(inputs).flatten(0, 1).float(), targets.flatten(), reduction="none")
        bits += float(losses.double().sum()) / math.log(2)
    for document in read_documents([text]):
        size += len(document.text.encode())
    return bits / size


def _windows(tokenizer: Tokenizer, text: Path, context: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yields (inputs, targets), each `context` long; what has no loss is -100."""
    ids: list[int] = []
    for chunk in read_documents([text]):
        ids += tokenizer.encode(chunk.text)
        if not chunk.last:
            continue
        inputs = [tokenizer.bos_id, *ids[:-1]]
        for begin in range(0, len(ids), context):
            window, targets = inputs[begin : begin + context], ids[begin : begin + context]
            padding = context - len(window)
            yield window + padding * [0], targets + padding * [-100]
        ids = []


def _batches(windows: Iterator[Any], count: int) -> Iterator[list[Any]]:
    batch = []
    for window in windows:
        batch.append(window)
        if len(batch) == count:
            yield batch
            batch = []
    if batch:
        yield batch


def train(name: str, folder: Path, total_tokens: int) -> dict[str, Any]:
    """Trains a contestant on so many tokens, and scores it."""
    config = config_of(name if name in OURS else "rules", folder, total_tokens)
    tokenizer, held_out, context = load_tokenizer(folder / "tokenizer.model"), folder / "held_out.jsonl", 512
    if name in OURS:
        path = folder / f"{name.replace(' ', '-')}.json"
        atomic_text(path, json.dumps(config.model_dump(), indent=2) + "\n")
        trained = json.loads(run_llm("train", "--config", path, "--json").splitlines()[-1])
        command = ["eval", "--ckpt", config.checkpoint.dir, "--input", held_out, "--device", "cpu", "--json"]
        scored = json.loads(run_llm(*command).splitlines()[-1])
        flops = float(flops_per_token(config.model, context).usual)
        return {"bits_per_byte": scored["bits_per_byte"], "tokens": trained["tokens"], "flops_per_token": flops}
    peer = Peer(name, config, read_stream(folder, context), total_tokens)
    while peer.done < peer.steps:
        peer()
        if peer.done % 50 == 0:
            print(f"{name}: step {peer.done:,} of {peer.steps:,}", file=sys.stderr)
    bits = score(peer.model.logits, tokenizer, held_out, context)
    return {
        "bits_per_byte": bits,
        "tokens": peer.steps * peer.tokens_per_step,
        "flops_per_token": peer.flops_per_token,
    }


def wanted(name: str, rates: dict[str, float], minutes: float, flops: dict[str, float]) -> dict[str, int]:
    """Returns {comparison: tokens} of a contestant; `flops` are those per token of each."""
    own, ours = (round(60 * minutes * rates[one]) for one in (name, "rules"))
    if name == "rules":
        return {"equal time": own}
    if name in OURS:
        return {"equal time": own, "equal tokens": ours}
    return {"equal time": own, "equal FLOPs": round(ours * flops["rules"] / flops[name])}


def table(lines: Sequence[dict[str, Any]], rates: dict[str, float]) -> str:
    """A Markdown table. The last column is how much less the rules need."""
    ours = next((line["bits_per_byte"] for line in lines if line["name"] == "rules"), None)
    rows = ["| recipe | comparison | tokens/s | tokens | bits/byte | the rules need |", "|---|---|---|---|---|---|"]
    for line in lines:
        bits = line["bits_per_byte"]
        less = "" if ours is None or line["name"] == "rules" else f"{100 * (ours / bits - 1):+.1f} %"
        read = f"{rates[line['name']]:,.0f} | {line['tokens']:,}"
        rows.append(f"| {line['name']} | {line['comparison']} | {read} | {bits:.4f} | {less} |")
    return "\n".join(rows) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="files that `llm prepare_data` reads")
    parser.add_argument("--minutes", type=float, default=4, help="of each run (default %(default)g)")
    parser.add_argument("--rounds", type=int, default=7, help="of the rates (default %(default)d)")
    parser.add_argument("--rates_only", action="store_true", help="measure the rates, and train nothing")
    parser.add_argument("--llama_rates", type=float, nargs="+", default=LLAMA_RATES, metavar="LR")
    parser.add_argument("--folder", type=Path, default=Path("artifacts/peers"), help="of shards and checkpoints")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="of peers.jsonl, .md and rates")
    options = parser.parse_args(arguments)
    return exit_code(partial(run, options))


def run(options: argparse.Namespace) -> None:
    folder, output = options.folder, options.output
    output.mkdir(parents=True, exist_ok=True)
    prepare(options.text, folder, HELD_OUT, seq_len=512)
    llamas = [f"llama {rate:g}" for rate in options.llama_rates]
    measured = output / "peers-rates.json"
    if not measured.exists():
        # All Llamas do the same work.
        rates = measure_rates([*OURS, "nanoGPT", llamas[0]], folder, options.rounds, seconds=4)
        found = {"threads": torch.get_num_threads(), "torch": torch.__version__, "tokens_per_second": rates}
        atomic_text(measured, json.dumps(found, indent=1) + "\n")
    rates = json.loads(measured.read_text("utf-8"))["tokens_per_second"]
    rates |= dict.fromkeys(llamas, rates[next(name for name in rates if name.startswith("llama"))])
    if options.rates_only:
        print(json.dumps(rates, indent=1))
        return
    config, path = config_of("rules", folder, 3_000_000), output / "peers.jsonl"
    assert config.data.seq_len is not None
    stream = torch.zeros(config.data.seq_len + 2, dtype=torch.int32)
    flops = {name: Peer(name, config, stream, 1).flops_per_token for name in ("nanoGPT", *llamas)}
    flops["rules"] = float(flops_per_token(config.model, config.data.seq_len).usual)
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    for name in (*OURS, "nanoGPT", *llamas):
        for comparison, tokens in wanted(name, rates, options.minutes, flops).items():
            if (name, comparison) in [(line["name"], line["comparison"]) for line in lines]:
                continue
            origin = {"commit": source_commit(), "versions": {"torch": torch.__version__}}
            lines.append({"name": name, "comparison": comparison, **train(name, folder, tokens), **origin})
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    atomic_text(output / "peers.md", HEAD + table(lines, rates))
    print(table(lines, rates))


if __name__ == "__main__":
    sys.exit(main())
