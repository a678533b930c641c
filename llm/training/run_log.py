"""What a run says of itself while it trains: on the display, in metrics.jsonl, and to monitors."""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from llm import metrics
from llm.config import Config
from llm.data.mixture import PERIOD, Mixture
from llm.display import Display
from llm.metrics import Outliers, Score
from llm.model.checkpoint import TrainState
from llm.training.batch_plan import Plan
from llm.training.engine import run_stage
from llm.training.meter import Meter
from llm.training.monitor import Monitor
from llm.training.run_folder import RunFolder
from llm.world import World

WATCHED = ("loss", "grad_norm")
"""The metrics whose outliers are shown."""


class RunLog:
    """One rank's part of it: `write_steps` adds the ranks' losses up, so all call it; rank 0 alone writes.

    Args:
        folder: rank 0's, None elsewhere.
        monitors: rank 0's.
    """

    def __init__(
        self,
        plan: Plan,
        world: World,
        display: Display,
        meter: Meter,
        folder: RunFolder | None,
        monitors: Sequence[Monitor] = (),
    ) -> None:
        self._monitors = monitors
        self._plan, self._world, self._display, self._meter, self._folder = plan, world, display, meter, folder
        self._steps: list[tuple[TrainState, torch.Tensor, float, torch.Tensor]] = []
        self._outliers = {name: Outliers() for name in WATCHED}

    def add_step(self, state: TrainState, loss: torch.Tensor, lr: float, norm: torch.Tensor) -> None:
        """Keeps a step for the next line. loss: this rank's part. It and the norm stay on the device: nobody waits."""
        self._steps.append((state, loss, lr, norm))

    def write_steps(self, also: dict[str, float]) -> None:
        """One line for the steps since the last: the newest one's figures, means of times, all outliers. Collective.

        also: figures that stand in the line beside.
        """
        kept, parts, rates, norms = zip(*self._steps, strict=True)
        losses = self._world.sum(torch.stack(parts))
        figures = zip(*torch.stack((losses, torch.stack(norms))).tolist(), strict=True)
        steps = [
            (state, {"loss": loss, "lr": lr, "grad_norm": norm})
            for state, lr, (loss, norm) in zip(kept, rates, figures, strict=True)
        ]
        self._steps = []
        state, newest = steps[-1]
        window = self._meter.window()
        speed = window["tokens_per_second"]
        outliers = list(self._find_outliers(steps))
        line = {
            "step": state.step,
            "tokens": state.tokens,
            **newest,
            "skipped_steps": state.skipped,
            **also,
            **window,
            "mfu": self._plan.mfu(speed),
            "mfu_causal": self._plan.mfu(speed, causal=True),
            "matmul_fraction": self._plan.matmul_fraction(speed),
            "matmul_fraction_causal": self._plan.matmul_fraction(speed, causal=True),
            "memory": metrics.peak_memory_bytes(self._world.device),
            **({"outliers": outliers} if outliers else {}),
        }
        self._write(line)
        for outlier in outliers:
            self._display.line(
                f"step {outlier['step']:>6}  outlier: {outlier['metric'].replace('_', ' ')} {outlier['value']:.4f} "
                f"stands {outlier['deviations']:.1f} deviations above the steps before"
            )
        self._display.line(
            f"step {state.step:>6}  loss {line['loss']:.4f}  lr {line['lr']:.2e}  grad norm {line['grad_norm']:.2f}  "
            f"{speed:,.0f} tokens/s  {line['step_ms']:,.0f} ms ({_split(window)})"
            f"  MFU {metrics.percent(line['mfu'])}  {metrics.percent(line['matmul_fraction'])} of matmul"
        )
        self._display.update(state.tokens, f"loss {line['loss']:.3f}  {speed:,.0f} tokens/s")

    def _find_outliers(self, steps: list[tuple[TrainState, dict[str, float]]]) -> Iterator[dict[str, Any]]:
        for state, values in steps:
            for name in WATCHED:
                deviations = self._outliers[name].deviations(values[name])
                if deviations is not None:
                    yield {
                        "step": state.step,
                        "tokens": state.tokens,
                        "metric": name,
                        "value": values[name],
                        "deviations": deviations,
                    }

    def write_validation(self, state: TrainState, score: Score, samples: list[dict[str, str]]) -> None:
        """samples: {"prompt", "text"} of what the model wrote."""
        self._write(
            {
                "step": state.step,
                "tokens": state.tokens,
                "val_loss": score.nll_per_token,
                "perplexity": score.perplexity,
                "bits_per_byte": score.bits_per_byte,
                **({"samples": samples} if samples else {}),
            }
        )
        self._display.line(
            f"step {state.step:>6}  validation: loss {score.nll_per_token:.4f}  perplexity {score.perplexity:.2f}"
            f"  bits/byte {score.bits_per_byte:.4f}  ({score.tokens:,} targets)"
        )
        for sample in samples:
            self._display.line(f"step {state.step:>6}  sample: {sample['prompt'] + sample['text']!r}")

    def _write(self, line: dict[str, Any]) -> None:
        if self._folder is not None:
            self._folder.write_metrics(line)
        for monitor in self._monitors:
            monitor.write(line)

    def show_plan(self, config: Config, data: Mixture, resumed: tuple[TrainState, Config] | None) -> None:
        """What will be computed, on what, and for how long. resumed: the checkpoint's state and config."""
        rows, total = data.rows("train", self._plan.seq_len), config.train.total_tokens
        unused = data.unused_tokens("train", self._plan.seq_len)
        precision = self._world.precision + ("" if self._world.dtype == torch.float32 else " with fp32 masters")
        self._display.line(
            f"data        {rows * self._plan.seq_len:,} tokens in {rows:,} rows of {self._plan.seq_len} from "
            f"{data.name}; {unused:,} tokens after the shards' last rows are unused"
        )
        self.show_sources(data, "planned", math.ceil(total / self._plan.seq_len))
        epoch = rows * self._plan.seq_len if len(data.sources) == 1 else None  # each source has epochs of its own
        for line in self._plan.describe(total, epoch):
            self._display.line(line)
        zero = config.deepspeed
        offloaded = ", optimizer on the host" if zero.offload == "cpu" else ""
        stage = run_stage(zero.zero_stage, zero.offload, self._world.size, self._world.dtype)
        alone = "" if stage == zero.zero_stage else " (one process has nothing to partition)"
        self._display.line(f"precision   {precision}, ZeRO {stage}{alone}{offloaded}")
        if resumed is not None:
            state, before = resumed
            self._display.line(f"resumed     at step {state.step}, {state.tokens:,} tokens")
            for change in _changed_settings(before, config):
                self._display.line(f"changed     {change}")

    def show_sources(self, data: Mixture, when: str, positions: int) -> None:
        """Each source's share of a mixture, and how often a run of so many rows goes through it."""
        if len(data.sources) == 1:
            return
        epochs = data.epochs(positions, self._plan.seq_len)
        for source, count, times in zip(data.sources, data.counts, epochs, strict=True):
            self._display.line(
                f"source      {count}/{PERIOD} ({100 * count / PERIOD:.2f} %) of the rows from {source.path}: "
                f"{times:.2f} epochs {when}"
            )


def _changed_settings(before: Config, now: Config) -> Iterator[str]:
    """What a resumed run does otherwise than the one that saved its checkpoint."""
    for section, keys in now.model_dump().items():
        old = getattr(before, section).model_dump()
        for key, value in keys.items():
            if old[key] != value:
                yield f"{section}.{key}: {json.dumps(old[key])} -> {json.dumps(value)}"


def _split(window: dict[str, float]) -> str:
    """Where a step's time goes, in percent of it."""
    parts = {
        "data": "data_wait_ms",
        "fwd": "forward_ms",
        "bwd": "backward_ms",
        "opt": "optimizer_ms",
        "comm": "communication_ms",
    }
    return " ".join(f"{name} {100 * window[key] / window['step_ms']:.0f}" for name, key in parts.items()) + " %"
