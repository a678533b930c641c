"""This project's training step on random tokens, and the timing loop, for bench_train and bench_train_cpu."""

import time
from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import nn

from llm import device_rates
from llm.config import Config
from llm.errors import UserError
from llm.model.transformer import Transformer
from llm.training.batch_plan import Plan, make_plan
from llm.training.engine import Engine, start
from llm.training.optim import make_optimizer
from llm.training.rules import follow
from llm.training.setup import build_engine
from llm.world import World, pick_device, pick_dtype

Batch = dict[str, torch.Tensor]

DOCUMENT = 512
"""Mean tokens of a document: web text has about this many."""

DIFFERENT_BATCHES = 4
"""A step with more micro-batches repeats these, so that their memory is bounded."""


class PlainEngine:
    """The arithmetic of Engine on one device without deepspeed, for hosts that do not have it."""

    stage = 0

    def __init__(self, config: Config, world: World) -> None:
        checkpointing = config.train.activation_checkpointing
        self.model = Transformer(config.model, activation_checkpointing=checkpointing, compute_dtype=world.dtype)
        self.model.init_weights(config.train.seed)
        self.model.to(world.device)
        self.masters = self.model.master_weights()
        self.grad_clip = config.optimizer.grad_clip or float("inf")
        self.optimizer = make_optimizer(self.model, config.optimizer, world.dtype)

    def backward(self, inputs: Batch, targets: int) -> torch.Tensor:
        with self.masters:
            loss = self.model(**inputs, reduction="sum")
            (loss / targets).backward()
        return loss.detach() / targets

    def update(self, lr: float) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.masters.changed()


def has_deepspeed() -> bool:
    return find_spec("deepspeed") is not None


def random_batch(plan: Plan, vocab_size: int, device: torch.device, document: int | None = DOCUMENT) -> Batch:
    """Returns uniformly random tokens with the keys of a loader's batch.

    Args:
        document: mean tokens of a document, with lengths as of a Poisson process; None: each sequence is one document.
    """
    shape = (plan.micro_batch, plan.seq_len)
    tokens = torch.randint(vocab_size, (plan.micro_batch, plan.seq_len + 1))
    begins = torch.rand(shape) < (1 / document if document else 0.0)
    index = torch.arange(plan.seq_len, dtype=torch.int32).expand(shape)
    doc_start = torch.where(begins, index, 0).cummax(dim=1).values
    batch = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "doc_start": doc_start}
    return {name: tensor.contiguous().to(device) for name, tensor in batch.items()}


def random_batches(config: Config, plan: Plan, device: torch.device, document: int | None = DOCUMENT) -> list[Batch]:
    """Returns the micro-batches of one step, the same at each call."""
    assert config.model.vocab_size is not None
    torch.manual_seed(0)
    different = min(plan.accumulation, DIFFERENT_BATCHES)
    batches = [random_batch(plan, config.model.vocab_size, device, document) for _ in range(different)]
    return [batches[i % different] for i in range(plan.accumulation)]


class TrainingStep:
    """A step of `llm train` after a batch has arrived, on one process; without deepspeed, the same in plain torch.

    Every call is one step on the same tokens. `document` is that of `random_batch`.
    """

    def __init__(self, config: Config, document: int | None = DOCUMENT) -> None:
        # The rate of every setting that a rule fills in; its value hardly matters to the time.
        config, _ = follow(config, None)
        self.world = start(config) if has_deepspeed() else _world_without_deepspeed(config)
        self.plan = make_plan(config, 1, self.world.device, dtype=self.world.dtype)
        self.engine: Engine | PlainEngine
        if has_deepspeed():
            self.engine = build_engine(config, self.world, self.plan, None)
        else:
            self.engine = PlainEngine(config, self.world)
        self.lr = config.optimizer.peak_lr
        self.batches = random_batches(config, self.plan, self.world.device, document)

    def __call__(self) -> float:
        """Takes a step, waits for the device, and returns the loss before the update."""
        targets = self.plan.tokens_per_step
        loss = torch.zeros((), device=self.world.device)
        for batch in self.batches:
            loss += self.engine.backward(batch, targets)
        self.engine.update(self.lr)
        device_rates.synchronize(self.world.device)
        return float(loss)


def _world_without_deepspeed(config: Config) -> World:
    if config.train.precision == "fp16" or config.deepspeed.offload == "cpu":
        raise UserError("train.precision=fp16 and deepspeed.offload=cpu need deepspeed, which is not installed here")
    device = pick_device(config.train.device)
    return World(0, 0, 1, device, pick_dtype(config, device))


def repeat(count: int, seconds: float) -> Iterator[int]:
    """Counts up to `count`; ends earlier, but not before the first, when `seconds` are over."""
    end = time.perf_counter() + seconds
    for i in range(count):
        if i and time.perf_counter() > end:
            return
        yield i
