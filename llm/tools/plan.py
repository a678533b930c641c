"""`llm plan`: estimates what a run needs (memory by part, micro-batch, time, cost) and what loss it should reach."""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch

from llm import device_rates, hardware
from llm.atomic import atomic_file, atomic_text
from llm.config import ActivationCheckpointing, Config
from llm.config_file import load_config
from llm.data.object_store import is_copied
from llm.errors import UserError
from llm.model.transformer import parameter_shapes
from llm.tools.charts import Chart, Line, png
from llm.tools.plan_size import choose
from llm.tools.plan_step import (
    HOST_MEMORY,
    USABLE,
    Choice,
    Machine,
    Planner,
    kept_bytes,
    kept_checkpoints,
    saved_bytes,
)
from llm.tools.roofline import Rates, nominal_rates
from llm.training.expected_loss import expect, expect_from
from llm.training.memory import Device
from llm.training.resolve import epoch_tokens, find_data, missing_data, resolve
from llm.training.rules import EPOCHS, describe
from llm.training.sanity import ASSUMED_MFU
from llm.world import DTYPES, auto_precision, pick_dtype


def forecast(
    path: str,
    overrides: list[str],
    *,
    gpus: Sequence[int] = (1,),
    memory_gb: float | None = None,
    device_name: str | None = None,
    mfu: float | None = None,
    node_gpus: int = 8,
    network_gbs: float = 50.0,
    price: float | None = None,
    hours: float | None = None,
    write: str | None = None,
    mtbf_hours: float | None = None,
    picture: str | None = None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Returns the result of `llm plan`, and shows its lines with `say`.

    Args:
        path, overrides: the config.
        gpus: numbers of processes, one per device. The plan is for the first; with several a table compares them.
        memory_gb: of one device, in GB of 10^9 bytes; None: the datasheet's. Without both the micro-batch is training's
            own choice, whether or not it fits.
        device_name: one of hardware.json, in any case; None: the rates are measured on this machine.
        mfu: fraction of the rate of products in training; None: on a GPU each op at its share (roofline.py), else 0.4.
        node_gpus: devices of a machine, which its own link connects.
        network_gbs: bandwidth between machines for each device, in 10^9 bytes/s, one direction.
        price: of a device for an hour.
        hours: replace the config's model and length by those that should reach the least loss in this time.
        write: a file for that config.
        mtbf_hours: mean time between failures of one device, for the interval between checkpoints.
        picture: a PNG file, for the speed over the number of devices.

    Raises UserError if nothing fits or the device is unknown.
    """
    asked = load_config(path, overrides)
    data = find_data(asked.data)
    machine = _machine(asked, device_name, memory_gb, mfu, node_gpus, network_gbs)
    if hours is not None:
        asked = choose(asked, data, machine, gpus[0], hours, path)
        say(f"chosen      {_chosen(asked)}")
        _write(asked, write, say)
    elif write is not None:
        raise UserError("--write stores what --hours chooses: give both")
    config, followed = resolve(asked, data)
    expected = None
    if config.train.init_from is None:  # the law knows nothing of weights that have learned before
        expected = expect(config, None, None) if data is None else expect_from(config, data)
    if data is None:
        for line in _assumptions(asked, config):
            say(line)
    for line in describe(followed):
        say(line)
    planner, processes = Planner(config, machine), gpus[0]
    train, stage, offload = config.train, config.deepspeed.zero_stage, config.deepspeed.offload == "cpu"
    state = planner.state(stage, processes, offload=offload)
    for line in _model_lines(planner):
        say(line)
    choices = list(planner.choices(processes))
    best = planner.recommended(choices)
    for line in _memory_table(planner, processes, choices):
        say(line)
    micro_batch = planner.micro_batch(state, processes, train.activation_checkpointing)
    if micro_batch == 0:
        raise UserError(_what_would_fit(path, planner, processes, best))
    activations = planner.activations(processes, micro_batch, train.activation_checkpointing)
    total = state.peak(activations)
    seconds = planner.step_seconds(stage, processes, micro_batch, train.activation_checkpointing, offload=offload)
    speed, sequences = train.batch / seconds, planner.sequences(processes)
    taken = train.horizon / speed / 3600
    within = "" if math.isinf(machine.memory) else f", within {machine.memory / 1e9:.1f} (90% of the device)"
    say(f"memory      {total / 1e9:.2f} GB a process{within}, without a GPU's context (0.5 to 1 GB)")
    micro_batches = math.ceil(sequences / micro_batch)
    say(f"step        {sequences} sequences a process: {micro_batches} x train.micro_batch={micro_batch}")
    for line in _network_lines(planner, stage, processes, micro_batch):
        say(line)
    say(f"speed       {speed:,.0f} tokens/s, {_assumed_speed(machine)} ({machine.source}) x {processes}")
    for line in _time_lines(planner, micro_batch):
        say(line)
    saved = saved_bytes(config)
    cost = None if price is None else price * taken * processes
    read = ""
    if data is not None and len(data.sources) == 1:  # a mixture's sources have their own
        assert config.data.seq_len is not None
        read = f"; {train.horizon / epoch_tokens(data, config.data.seq_len):,.2f} epochs"
    say(
        f"run         {train.horizon:,} tokens in {_duration(taken)}, {taken * processes:,.1f} device-hours"
        f"{'' if cost is None else f', {cost:,.2f} at {price:g} a device-hour'}, without validation and saving; "
        f"{train.horizon / planner.parameters:.1f} tokens per parameter{read}"
    )
    kept = kept_checkpoints(config)
    say(
        f"disk        {kept_bytes(config) / 1e9:.1f} GB: up to {kept} checkpoints of {saved / 1e9:.2f} GB; host "
        f"memory for a save {min(saved, config.checkpoint.gather_bytes) / 1e9:.2f} GB"
    )
    interval = None
    if mtbf_hours is not None:
        interval = best_interval(60 * mtbf_hours / processes, saved / machine.host_link / 60)
        steps = max(1, round(60 * interval / seconds))
        say(f"saving      checkpoint.every_steps={steps} ({interval:.0f} minutes) loses the least time to failures")
    known = data is not None and is_copied(data.sources)
    if expected is not None:
        say(f"expected    {expected}{'' if known else ', if the text is English from the web'}")
    if best is not None:
        less = 1 - best.seconds / seconds
        why = f"{less:.0%} less time" if less > 0.03 else "as the config has it, within 3% of the shortest step"
        say(f"recommended {best}: {why}")
    scaling = [_scale(planner, count, price) for count in gpus] if len(gpus) > 1 else []
    for line in _scaling_table(scaling):
        say(line)
    if picture is not None:
        with atomic_file(Path(picture)) as file:
            file.write(png(_scaling_chart(scaling)))
        say(f"picture     {picture}")
    return {
        "parameters": planner.parameters,
        "memory_bytes": total,
        "micro_batch": micro_batch,
        "tokens_per_second": speed,
        "hours": taken,
        "device_hours": taken * processes,
        "cost": cost,
        "expected_loss": expected and expected.loss,
        "expected_loss_band": expected and [expected.low, expected.high],
        "expected_bits_per_byte": expected and expected.bits_per_byte,
        "state_bytes": asdict(state),
        "activation_bytes": {
            name: asdict(planner.activations(processes, micro_batch, name))
            for name in get_args(ActivationCheckpointing)
        },
        "traffic_bytes": asdict(planner.traffic(stage, processes, micro_batch)),
        "checkpoint_bytes": saved,
        "save_minutes": interval,
        "flops_per_token": asdict(planner.flops),
        "choices": [asdict(choice) for choice in choices],
        "recommended": None if best is None else str(best),
        "scaling": scaling,
        "assumed": {
            "mfu": machine.mfu,
            "flops": machine.rates.products,
            "bytes_per_second": machine.rates.copy,
            "source": machine.source,
        },
    }


def best_interval(minutes_between_failures: float, save_minutes: float) -> float:
    """Returns the minutes between two saves that lose the least: sqrt(2 C M) - C (Daly 2006, equation 16).

    save_minutes: how long a save stops the run, C, here the copy to the host.
    """
    return max(save_minutes, math.sqrt(2 * save_minutes * minutes_between_failures) - save_minutes)


def _machine(
    config: Config,
    device_name: str | None,
    memory_gb: float | None,
    mfu: float | None,
    node_gpus: int,
    network_gbs: float,
) -> Machine:
    precision = config.train.precision
    if device_name is None:
        on_gpu = config.train.device != "cpu" and torch.cuda.is_available()
        device: Device = "cuda" if on_gpu else "cpu"
        dtype = pick_dtype(config, torch.device(device))
        products = device_rates.measure_matmul_flops(torch.device(device), dtype)
        rates, source = (
            Rates(products, device_rates.measure_copy_bytes(torch.device(device))),
            "measured on this machine",
        )
        known = hardware.recognised(torch.cuda.get_device_name()) if on_gpu else None
    else:
        device, known = "cuda", hardware.named(device_name)
        # The named GPU cannot be asked here.
        dtype = DTYPES[auto_precision(config, bf16=known.bf16, fp16=True) if precision == "auto" else precision]
        rates = Rates(known.flops, 1e9 * known.bandwidth_gbs)
        source = f"{known.name}'s datasheet, dense {'bf16' if known.bf16 else 'fp16'}"
        memory_gb = memory_gb or known.memory_gb
    # The shares of ops are those of the Triton kernels.
    by_op = mfu is None and device == "cuda" and (known is None or known.triton)
    if by_op and device_name is not None and known is not None:
        rates, source = nominal_rates(known)
    if mfu is None and not by_op:
        mfu = ASSUMED_MFU
    memory = math.inf if memory_gb is None else USABLE * memory_gb * 1e9
    return Machine(device, dtype, known, rates, source, mfu, memory, node_gpus, network_gbs)


def _assumed_speed(machine: Machine) -> str:
    products = f"{machine.rates.products / 1e12:.4g} TFLOP/s"
    if machine.mfu is not None:
        return f"assuming {machine.mfu:.0%} of {products}"
    return f"each op at its share of {products} or {machine.rates.copy / 1e12:.3g} TB/s"


def _chosen(config: Config) -> str:
    model = config.model
    return (
        f"n_layers={model.n_layers} d_model={model.d_model} n_heads={model.n_heads} n_kv_heads={model.n_kv_heads} "
        f"d_ff={model.d_ff}, train.total_tokens={config.train.total_tokens:_}"
    )


def _write(config: Config, path: str | None, say: Callable[[str], None]) -> None:
    """Writes what the config states. Raises UserError if the file exists."""
    if path is None:
        return
    if os.path.exists(path):
        raise UserError(f"--write {path}: exists; name a new file")
    atomic_text(path, json.dumps(config.model_dump(exclude_unset=True), indent=2) + "\n")
    say(f"written     {path}: llm train --config {path}")


def _assumptions(asked: Config, config: Config) -> Iterator[str]:
    """Yields what `resolve` has assumed because the data do not exist."""
    if asked.model.vocab_size is None:
        yield (
            f"assumed     a vocabulary of {config.model.vocab_size:,}: {missing_data(asked.data)} is not there "
            "(model.vocab_size states another)"
        )
    if asked.data.seq_len is None:
        length = f"{config.data.seq_len:,} tokens"
        yield f"assumed     sequences of {length}, model.max_seq_len (data.seq_len states another)"
    if asked.train.total_tokens is None:
        yield f"assumed     as much text as a run needs; where the shards exist, at most {EPOCHS} epochs of them"


def _duration(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


def _model_lines(planner: Planner) -> Iterator[str]:
    parts = {"embedding": 0, "attention": 0, "MLP": 0, "norms": 0, "LM head": 0}
    for name, shape in parameter_shapes(planner.config.model).items():
        part = next((p for p, word in _PARTS.items() if re.search(word, name)), "MLP")
        parts[part] += shape.numel()
    listed = ", ".join(f"{part} {number:,}" for part, number in parts.items() if number)
    yield f"model       {planner.parameters:,} parameters: {listed}"
    flops = planner.flops
    yield f"flops       {flops.usual / 1e9:.3f} GFLOP a token, 6N + 12 L d S ({flops.causal / 1e9:.3f} causal-exact)"
    dtype = planner.machine.dtype
    precision = "fp32" if dtype == torch.float32 else f"{str(dtype).removeprefix('torch.')} with fp32 masters"
    known = planner.machine.hardware
    slow = "" if known is None or known.triton else f"; {known.name} is too old for the Triton kernels"
    yield f"precision   {precision}{slow}"


_PARTS = {"norms": "norm", "embedding": "embed", "LM head": "lm_head", "attention": "attention|attn"}


def _memory_table(planner: Planner, processes: int, choices: Sequence[Choice]) -> Iterator[str]:
    """State by part, and the peak of a step by choice; in GB of 10^9 bytes per process."""
    config = planner.config.deepspeed
    rows: dict[tuple[int, bool], list[Choice]] = {}
    for choice in choices:
        rows.setdefault((choice.stage, choice.offload), []).append(choice)
    names = {key: f"ZeRO {key[0]}{' offload' if key[1] else ''}" for key in rows}
    marks = {key: "  <- config" if key == (config.zero_stage, config.offload == "cpu") else "" for key in rows}
    parts = ("weights", "masters", "grads", "moments", "buffers")
    yield "state, GB   " + " " * 14 + "".join(f"{part:>9}" for part in parts)
    for stage, offload in rows:
        state = planner.state(stage, processes, offload=offload)
        buffers = state.buckets + state.gathered + max(state.passing, state.update) + state.partial_sums
        held = (state.weights, state.masters, state.gradients, state.moments, buffers)
        numbers = "".join(f"{number / 1e9:>9.2f}" for number in held)
        yield f"            {names[stage, offload]:<14}{numbers}{marks[stage, offload]}"
    yield "step, GB    " + " " * 14 + "".join(f"{name:>14}" for name in get_args(ActivationCheckpointing))
    for key, row in rows.items():
        found = {choice.checkpointing: choice for choice in row}
        cells = "".join(f"{_cell(found.get(name)):>14}" for name in get_args(ActivationCheckpointing))
        yield f"            {names[key]:<14}{cells}{marks[key]}"
    yield "            (xN): the largest train.micro_batch that fits, up to training's own choice"


def _cell(choice: Choice | None) -> str:
    if choice is None:
        return "-"
    return f"{choice.memory / 1e9:.2f} " + (f"(x{choice.micro_batch})" if choice.micro_batch else "too big")


def _what_would_fit(path: str, planner: Planner, processes: int, best: Choice | None) -> str:
    train, machine = planner.config.train, planner.machine
    stage, offload = planner.config.deepspeed.zero_stage, planner.config.deepspeed.offload == "cpu"
    size = train.micro_batch or 1
    needed = planner.state(stage, processes, offload=offload).peak(
        planner.activations(processes, size, train.activation_checkpointing)
    )
    if best is not None:
        way_out = f"set {best}"
    else:
        way_out = "nothing fits: take more --gpus at deepspeed.zero_stage=3, a smaller model, or a shorter data.seq_len"
    return (
        f"{path}: {needed / 1e9:.1f} GB with train.micro_batch={size} do not fit into {machine.memory / 1e9:.1f} GB "
        f"({USABLE:.0%} of the device's memory); {way_out}"
    )


def _network_lines(planner: Planner, stage: int, processes: int, micro_batch: int) -> Iterator[str]:
    if processes == 1:
        return
    sent = planner.traffic(stage, processes, micro_batch).sent(processes)
    link = planner.machine.link(processes)
    if link is None:
        yield f"network     each process sends {sent / 1e9:.3f} GB a step; the link's rate is unknown"
    else:
        seconds = planner.network_seconds(stage, processes, micro_batch)
        hidden = "while it computes" if stage == 3 else "while nothing computes"
        yield (
            f"network     each process sends {sent / 1e9:.3f} GB a step: {1e3 * seconds:.1f} ms over {link.name} at "
            f"{link.bytes_per_second / 1e9:g} GB/s, {hidden}"
        )


def _time_lines(planner: Planner, micro_batch: int) -> Iterator[str]:
    """Says by which figures the choices' times differ."""
    machine = planner.machine
    selective, full = (planner.recomputed(micro_batch, name) for name in ("selective", "full"))
    yield f"recompute   selective {selective:.1%} more time, full {full:.1%}"
    if machine.device == "cuda":
        link = "an assumption" if machine.hardware is None else f"{machine.hardware.host_link}, datasheet"
        yield (
            f"offload     {machine.host_link / 1e9:g} GB/s to the host ({link}), whose memory updates at "
            f"{HOST_MEMORY / 1e9:g} GB/s (an assumption)"
        )


def _scale(planner: Planner, processes: int, price: float | None) -> dict[str, Any]:
    """Returns the plan of this number of processes in figures; micro_batch 0: it does not fit."""
    train, deepspeed = planner.config.train, planner.config.deepspeed
    offload = deepspeed.offload == "cpu"
    state = planner.state(deepspeed.zero_stage, processes, offload=offload)
    size = planner.micro_batch(state, processes, train.activation_checkpointing)
    arguments = (deepspeed.zero_stage, processes, size or 1)
    seconds = planner.step_seconds(*arguments, train.activation_checkpointing, offload=offload)
    compute = planner.compute_seconds(processes, size or 1, train.activation_checkpointing)
    network = planner.network_seconds(*arguments)
    slots = math.ceil(planner.sequences(processes) / (size or 1)) * (size or 1) * processes
    empty = 1 - train.batch / planner.seq_len / slots
    bound = "memory" if size == 0 else "batch" if empty > 0.2 else "network" if network > compute else "compute"
    hours = train.horizon / (train.batch / seconds) / 3600
    return {
        "gpus": processes,
        "micro_batch": size,
        "memory_bytes": state.peak(planner.activations(processes, size or 1, train.activation_checkpointing)),
        "tokens_per_second": train.batch / seconds,
        "hours": hours,
        "cost": None if price is None else price * hours * processes,
        "bound": bound,
    }


def _scaling_table(scaling: Sequence[dict[str, Any]]) -> Iterator[str]:
    if not scaling:
        return
    first = scaling[0]
    per_gpu = first["tokens_per_second"] / first["gpus"]
    yield "devices     micro-batch   GB each     tokens/s  efficiency        hours      cost  bound by"
    for row in scaling:
        efficiency = row["tokens_per_second"] / row["gpus"] / per_gpu
        cost = "" if row["cost"] is None else f"{row['cost']:,.0f}"
        yield (
            f"{row['gpus']:>7,}     {row['micro_batch'] or '-':>11} {row['memory_bytes'] / 1e9:>9.2f} "
            f"{row['tokens_per_second']:>12,.0f} {efficiency:>11.0%} {row['hours']:>12,.1f} {cost:>9}  {row['bound']}"
        )


def _scaling_chart(scaling: Sequence[dict[str, Any]]) -> Chart:
    if not scaling:
        raise UserError("--picture draws the speed over several numbers of devices: give --gpus as 1..64")
    devices = [row["gpus"] for row in scaling]
    speeds = [row["tokens_per_second"] for row in scaling]
    ideal = [speeds[0] / devices[0] * count for count in devices]
    bounds = ", ".join(f"{row['gpus']}: {row['bound']}" for row in scaling if row["bound"] != "compute")
    lines = (Line(devices, ideal, "in proportion", color=5, style="faint"), Line(devices, speeds, "planned"))
    note = f"bound by something else than computation: {bounds}" if bounds else "bound by computation everywhere"
    return Chart("scaling", "speed over devices", "devices", "tokens/s", lines, note, log_x=True, log_y=True)
