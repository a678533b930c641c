"""Reports a run while it trains: on the display, in metrics.jsonl, and to monitors."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import kernels
from llm import device_rates, metrics
from llm.config import Config
from llm.config_file import changed_settings
from llm.data.mixture import PERIOD, Mixture
from llm.display import Display
from llm.metrics import Outliers, Score
from llm.model.checkpoint import TrainState
from llm.training.batch_plan import Plan, process_counts
from llm.training.engine import run_stage
from llm.training.expected_loss import Expected
from llm.training.meter import Meter
from llm.training.monitor import Monitor
from llm.training.optim import learning_rate
from llm.training.rules import Followed, describe
from llm.training.run_folder import RunFolder
from llm.world import World

WATCHED = ("loss", "grad_norm")
"""The metrics whose outliers are shown."""
JUMP = 1.1
"""The run shows a line if a changed schedule raises the next learning rate by more than this factor."""

Step = dict[str, Any]
"""A step's metrics by name."""


class RunLog:
    """Shows and writes the metrics of a run. Every rank has one, because losses are summed over ranks; rank 0 writes.

    Args:
        folder: on rank 0, the run's folder; None on the other ranks.
        monitors: on rank 0.
        on_log: called with each line that is written.
    """

    def __init__(
        self,
        plan: Plan,
        world: World,
        display: Display,
        meter: Meter,
        folder: RunFolder | None,
        monitors: Sequence[Monitor] = (),
        on_log: Callable[[Step], object] = lambda line: None,
    ) -> None:
        self._monitors, self._on_log = monitors, on_log
        self._plan, self._world, self._display, self._meter, self._folder = plan, world, display, meter, folder
        # Metrics of the steps since the last line: those to sum, and others.
        self._recorded: list[tuple[TrainState, dict[str, torch.Tensor], dict[str, float | torch.Tensor]]] = []
        self._outliers = {name: Outliers() for name in WATCHED}

    def record(
        self, state: TrainState, *, sum_over_ranks: dict[str, torch.Tensor], **same_on_all_ranks: float | torch.Tensor
    ) -> None:
        """Records a step's metrics by name. The next line of metrics.jsonl has those of the newest step.

        Tensors stay on the device until that line is written, so that no step waits for them.

        Args:
            state: the state after the step.
            sum_over_ranks: metrics of which each micro-batch has a part, for this rank's micro-batches [accumulation];
                the sum over all ranks is written, correctly rounded, so that no order changes it.
            same_on_all_ranks: metrics whose value on rank 0 is written; a tensor is a scalar.
        """
        self._recorded.append((state, sum_over_ranks, same_on_all_ranks))

    def write_steps(self) -> None:
        """Writes one line for the steps since the last line: newest metrics, mean times, all outliers. Collective.

        Times are means, because the time of a single step varies; every step is searched for outliers. Writes nothing
        if there was no step since the last line.
        """
        if not self._recorded:
            return
        steps = list(self._read_recorded())
        window = self._meter.window()
        speed = window["tokens_per_second"]
        # Only rank 0 shows rates.
        if self._folder is not None and self._plan.matmul_fraction(speed) > 1:
            # Outside of steps, because the measurement would count as time of the next step.
            with self._meter.outside(None):
                self._plan = self._plan.measured_again(self._world.device, self._world.dtype)
            rate = f"{self._plan.matmul_flops / 1e12:.2f} TFLOP/s"
            self._display.line(f"above 100 % of matmul: its rate was measured again, and the better is taken: {rate}")
        outliers = list(self._find_outliers(steps))
        line = {
            **steps[-1],
            **window,
            "mfu": self._plan.mfu(speed),
            "mfu_causal": self._plan.mfu(speed, causal=True),
            "matmul_fraction": self._plan.matmul_fraction(speed),
            "matmul_fraction_causal": self._plan.matmul_fraction(speed, causal=True),
            "memory": device_rates.peak_memory_bytes(self._world.device),
            **({"outliers": outliers} if outliers else {}),
        }
        self._write(line)
        for outlier in outliers:
            self._display.line(
                f"step {outlier['step']:>6}  outlier: {outlier['metric'].replace('_', ' ')} {outlier['value']:.4f} "
                f"stands {outlier['deviations']:.1f} deviations above the steps before"
            )
        rates = f"lr {line['lr']:.2e}" + (f"  muon lr {line['muon_lr']:.2e}" if "muon_lr" in line else "")
        self._display.line(
            f"step {line['step']:>6}  loss {line['loss']:.4f}  {rates}  grad norm {line['grad_norm']:.2f}  "
            f"{speed:,.0f} tokens/s  {line['step_ms']:,.0f} ms ({_split(window)})"
            f"  MFU {metrics.percent(line['mfu'])}  {metrics.percent(line['matmul_fraction'])} of matmul"
        )
        self._display.update(line["tokens"], f"loss {line['loss']:.3f}  {speed:,.0f} tokens/s")

    def _read_recorded(self) -> Iterator[Step]:
        """Yields the recorded steps as numbers. Reading the first one waits for the device."""
        recorded, self._recorded = self._recorded, []
        # One collective for all steps since the last line, not one per step and metric.
        mine = torch.stack([part for _, to_sum, _ in recorded for part in to_sum.values()])
        parts = mine.new_zeros(len(mine), self._world.size, mine.shape[1])
        parts[:, self._world.rank] = mine
        # In the order of `mine`, because a dict keeps the order of its keys.
        sums = map(metrics.exact_sum, self._world.sum(parts).flatten(1).tolist())
        for state, to_sum, others in recorded:
            yield {
                "step": state.step,
                "tokens": state.tokens,
                **{name: next(sums) for name in to_sum},
                **{name: value.item() if isinstance(value, torch.Tensor) else value for name, value in others.items()},
            }

    def _find_outliers(self, steps: list[Step]) -> Iterator[dict[str, Any]]:
        for step in steps:
            for name in WATCHED:
                deviations = self._outliers[name].deviations(step[name])
                if deviations is not None:
                    where = {"step": step["step"], "tokens": step["tokens"]}
                    yield {**where, "metric": name, "value": step[name], "deviations": deviations}

    def write_validation(
        self, state: TrainState, score: Score, by_source: dict[str, Score], samples: list[dict[str, str]]
    ) -> None:
        """Writes the line of a validation.

        by_source: {path of a source: its score}. samples: {"prompt": ..., "text": the continuation}.
        """
        of_sources = {name: part.nll_per_token for name, part in by_source.items()}
        self._write(
            {
                "step": state.step,
                "tokens": state.tokens,
                "val_loss": score.nll_per_token,
                "perplexity": score.perplexity,
                "bits_per_byte": score.bits_per_byte,
                **({"val_loss_by_source": of_sources} if of_sources else {}),
                **({"samples": samples} if samples else {}),
            }
        )
        self._display.line(
            f"step {state.step:>6}  validation: loss {score.nll_per_token:.4f}  perplexity {score.perplexity:.2f}"
            f"  bits/byte {score.bits_per_byte:.4f}  ({score.tokens:,} targets)"
        )
        if of_sources:
            parts = "  ".join(f"{name} {loss:.4f}" for name, loss in of_sources.items())
            self._display.line(f"step {state.step:>6}  validation by source: {parts}")
        for sample in samples:
            self._display.line(f"step {state.step:>6}  sample: {sample['prompt'] + sample['text']!r}")

    def write_tasks(self, state: TrainState, scores: dict[str, float], seconds: float, share: float) -> None:
        """Writes the line of train.eval_tasks.

        scores: {"task/metric": value}, empty on ranks other than 0. seconds: how long they took. share: of the time of
        the run since its start, with all earlier ones.
        """
        self._write(
            {
                "step": state.step,
                "tokens": state.tokens,
                "tasks": scores,
                "tasks_seconds": seconds,
                "tasks_share": share,
            }
        )
        shown = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
        self._display.line(
            f"step {state.step:>6}  tasks: {shown}  ({seconds:,.1f} s; {metrics.percent(share)} of the run's time)"
        )

    def _write(self, line: dict[str, Any]) -> None:
        if self._folder is not None:
            self._folder.write_metrics(line)
        for monitor in self._monitors:
            monitor.write(line)
        self._on_log(line)

    def show_plan(
        self,
        config: Config,
        data: Mixture,
        resumed: tuple[TrainState, Config] | None,
        followed: Sequence[Followed],
        expected: Expected | None,
    ) -> None:
        """Shows what will be computed, with which data and hardware, the settings from rules, and the expected loss.

        resumed: state and config of the checkpoint.
        """
        sequences, total = data.sequences("train", self._plan.seq_len), config.train.horizon
        unused = data.unused_tokens("train", self._plan.seq_len)
        precision = self._world.precision + ("" if self._world.dtype == torch.float32 else " with fp32 masters")
        self._display.line(
            f"data        {sequences * self._plan.seq_len:,} tokens in {sequences:,} sequences of {self._plan.seq_len} "
            f"from {data.name}; {unused:,} tokens after the shards' last sequences are unused"
        )
        self.show_sources(data, "planned", math.ceil(total / self._plan.seq_len))
        epoch = sequences * self._plan.seq_len if len(data.sources) == 1 else None  # a mixture's sources have their own
        for line in self._plan.describe(total, epoch):
            self._display.line(line)
        zero = config.deepspeed
        offloaded = ", optimizer on the host" if zero.offload == "cpu" else ""
        stage = run_stage(zero.zero_stage, zero.offload, self._world.size, self._world.dtype)
        alone = "" if stage == zero.zero_stage else " (one process has nothing to partition)"
        # Where the fast kernels do not run, such as on a T4. They are the same for all ops of a run.
        chosen = kernels.describe(self._world.device)["attention"]
        plain = f"; kernels torch: {chosen['reason']}" if chosen["backend"] == "torch" else ""
        self._display.line(f"precision   {precision}, ZeRO {stage}{alone}{offloaded}{plain}")
        if config.train.same_bits:
            counts = process_counts(self._plan.accumulation * self._world.size)
            self._display.line(
                f"same bits   on {counts} processes with train.micro_batch={self._plan.micro_batch}, on devices and "
                "versions like these"
            )
        for line in describe(followed):
            self._display.line(line)
        if expected is not None:
            self._display.line(f"expected    {expected}")
        if resumed is not None:
            state, before = resumed
            self._display.line(f"resumed     at step {state.step}, {state.tokens:,} tokens")
            for change in changed_settings(before, config):
                self._display.line(f"changed     {change}")
            if rate := describe_rate(state, before, config):
                self._display.line(f"rate        {rate}")
            if config.data.stages != before.data.stages and set(config.data.paths) != set(before.data.paths):
                self._display.line(
                    f"changed     validation reads the {len(data.sources)} sources of all stages: compare "
                    "val_loss_by_source with what came before, not val_loss"
                )

    def show_sources(self, data: Mixture, when: str, positions: int) -> None:
        """Shows for each stage of a mixture the share of each source, and its epochs in this number of positions."""
        if len(data.sources) == len(data.stages) == 1:
            return
        epochs = data.epochs(positions, self._plan.seq_len, self._plan.sequences_per_step)
        for number, (stage, of_stage) in enumerate(zip(data.stages, epochs, strict=True)):
            if len(data.stages) > 1:
                reached = "" if of_stage.any() else ": not reached"
                self._display.line(f"stage       {self._describe_stage(data, number)}{reached}")
            before = epochs[:number].sum(axis=0)
            for source, count, times, earlier in zip(data.sources, stage.counts, of_stage, before, strict=True):
                if count:
                    self._display.line(
                        f"source      {count}/{PERIOD} ({100 * count / PERIOD:.2f} %) of the sequences from "
                        f"{source.name}: {times:.2f} epochs {when}"
                        + (f", {earlier + times:.2f} with the stages before" if earlier else "")
                    )

    def show_stage(self, data: Mixture, position: int) -> None:
        """Shows the new stage if the step at this position is its first."""
        begins = data.begins(self._plan.seq_len, self._plan.sequences_per_step)
        if position > 0 and position in begins:
            self._display.line(f"stage       {self._describe_stage(data, begins.index(position))} begins")

    def _describe_stage(self, data: Mixture, number: int) -> str:
        begin = data.begins(self._plan.seq_len, self._plan.sequences_per_step)[number] * self._plan.seq_len
        asked = data.stages[number].from_tokens
        rounded = "" if begin == asked else f" (data.stages asks for {asked:,}; rounded up to whole steps)"
        return f"{number + 1} of {len(data.stages)}, from token {begin:,} on{rounded}"


def describe_rate(state: TrainState, before: Config, now: Config) -> str:
    """Describes the change of the learning rate if a run continues with another schedule; empty: the same schedule.

    state, before: state and config of the checkpoint.
    """
    if (before.schedule, before.optimizer.lr, before.train.total_tokens) == (
        now.schedule,
        now.optimizer.lr,
        now.train.total_tokens,
    ):
        return ""
    batch = now.train.batch
    # The rate of a step depends on the tokens before it.
    last = learning_rate(max(state.tokens - before.train.batch, 0), before)
    next_, end = learning_rate(state.tokens, now), learning_rate(max(now.train.horizon - batch, state.tokens), now)
    line = f"{last:.2e} at step {state.step}, {next_:.2e} at step {state.step + 1}, {end:.2e} at the end"
    if next_ > JUMP * learning_rate(state.tokens, before):
        line += (
            "; it rises without a warm-up: for one, begin another run with train.init_from=CHECKPOINT, "
            "schedule.warmup_tokens and another checkpoint.dir"
        )
    return line


def _split(window: dict[str, float]) -> str:
    """Formats the parts of a step's time as percentages."""
    parts = {
        "data": "data_wait_ms",
        "fwd": "forward_ms",
        "bwd": "backward_ms",
        "opt": "optimizer_ms",
        "comm": "communication_ms",
    }
    return " ".join(f"{name} {100 * window[key] / window['step_ms']:.0f}" for name, key in parts.items()) + " %"
