"""The seam to DeepSpeed: processes, device, precision, and one optimizer step over ZeRO 0-3.

The rest of the program needs `start`, `Engine.backward`, `Engine.step`, and the reading and writing of whole fp32
parameters and moments; every peculiarity of a stage is handled here.
"""

import contextlib
import io
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from llm.config import Config
from llm.errors import UserError
from llm.model.transformer import Transformer
from llm.training.cpu_memory import keep_freed_memory
from llm.training.optim import ADAMW_MOMENTS, make_optimizer, moments
from llm.world import World, fill_environment, meeting, pick_device, pick_dtype

REDUCE_BUCKET = 50_000_000
"""Gradients that ZeRO gathers before it reduces them: DeepSpeed's own default would be a buffer of 2 GB in fp32."""

_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

Phase = Callable[[str], contextlib.AbstractContextManager[Any]]
"""Entered around a part of a step, by its name; see Meter.phase."""


def start(config: Config) -> World:
    """Joins the processes that deepspeed, torchrun or srun started; a process alone is a world of one.

    Raises UserError where the device or the precision that the config asks for cannot be had.
    """
    fill_environment()
    local_rank = int(os.environ["LOCAL_RANK"])
    device = pick_device(config.train.device, local_rank, "train.device=cpu")
    dtype = pick_dtype(config, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    deepspeed = import_deepspeed(device)
    if dtype == torch.float16 and not deepspeed.get_accelerator().is_fp16_supported():
        raise UserError(f"train.precision=fp16: this {device.type} device has no fp16; use bf16 or fp32")
    with contextlib.redirect_stdout(sys.stderr), meeting():
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
    control = dist.new_group(backend="gloo") if device.type == "cuda" and dist.get_world_size() > 1 else None
    return World(dist.get_rank(), local_rank, dist.get_world_size(), device, dtype, control)


def import_deepspeed(device: torch.device) -> ModuleType:
    """Imports deepspeed for this device, with its logger on stderr: stdout is for results."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")  # no CUDA op is compiled: the optimizer is torch's own
    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed
        import deepspeed.ops

    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
    # Without this op DeepSpeed's CPU collectives go through gloo. With it the first run compiles for most of a minute
    # and a killed one leaves segments in /dev/shm.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def run_stage(stage: int, offload: str, processes: int, dtype: torch.dtype) -> int:
    """The ZeRO stage that runs where `stage` is asked for: for one process 1 and 2 are stage 0.

    It has nobody to share its state with; DeepSpeed would keep the weights twice and copy every gradient. fp16 needs
    DeepSpeed's loss scaling, and deepspeed.offload=cpu the masters apart.
    """
    return 0 if processes == 1 and stage < 3 and dtype != torch.float16 and offload == "none" else stage


def reduce_bucket(stage: int, processes: int) -> int:
    """How many gradients are gathered before they are reduced.

    One process has nobody to reduce them with, and stages 1 and 2 copy no gradient that is larger than the bucket.
    """
    return 1 if processes == 1 and stage < 3 else REDUCE_BUCKET


def deepspeed_config(config: Config, stage: int, world: World, micro_batch: int, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's JSON, made from ours, for the stage of `run_stage`; deepspeed.extra is merged in last."""
    generated: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optimizer.grad_clip if stage > 0 else 0.0,  # at stage 0 `Engine.step` clips
        # Stage 0 keeps fp32 weights and rounds as it computes: DeepSpeed's own bf16 there takes a false first step.
        "bf16": {"enabled": world.dtype == torch.bfloat16 and stage > 0},
        # Dynamic loss scaling as torch's GradScaler has it: from 2^16, halved at each overflow.
        "fp16": {"enabled": world.dtype == torch.float16, "hysteresis": 1},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": reduce_bucket(stage, world.size),
        },
        "steps_per_print": 2**31,
        "timers": {"throughput": {"enabled": False}},  # it would synchronise the GPU twice a micro-batch
    }
    if stage > 0:
        # bf16 sums over micro-batches and ranks lose what small batches add: both stay in fp32.
        generated["data_types"] = {"grad_accum_dtype": "fp32"}
        generated["communication_data_type"] = "fp32"
    if config.deepspeed.offload == "cpu":
        on_gpu = world.device.type == "cuda"
        generated["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
        generated["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW is fused on the host too, and compiles nothing
    return _merge(generated, config.deepspeed.extra)


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both_dicts = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_dicts else value
    return merged


class Update(NamedTuple):
    """What became of a step's gradient."""

    norm: torch.Tensor
    """Of the whole gradient before clipping: an fp32 scalar on the device, inf where it is not finite."""
    applied: bool
    """Whether the gradient is finite. Where not, the weights are those of the step before, and the loss scale is lower,
    if there is one.
    """


class Engine:
    """A model, its optimizer and its gradients under DeepSpeed.

    Whole parameters and moments are read and written by name, whatever the stage has made of them; those calls are
    collective: every rank makes them, in the same order.
    """

    def __init__(
        self, build: Callable[[], Transformer], config: Config, world: World, micro_batch: int, accumulation: int
    ) -> None:
        """build() makes the model, whose compute_dtype is world.dtype; `write_parameter` sets its values afterwards."""
        deepspeed = import_deepspeed(world.device)
        self.world = world
        self.grad_clip = config.optimizer.grad_clip
        self.z_loss = config.train.z_loss
        self.z_sum = torch.zeros((), device=world.device)
        """This rank's part of z_loss * lse^2, averaged over the targets, since the caller last set it to 0."""
        self.stage = run_stage(config.deepspeed.zero_stage, config.deepspeed.offload, world.size, world.dtype)
        generated = deepspeed_config(config, self.stage, world, micro_batch, accumulation)
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints memory figures of its own set-up
            if self.stage == 3:
                with deepspeed.zero.Init(config_dict_or_path=generated, mem_efficient_linear=False):
                    model = build()
            else:
                model = build().to(world.device)
            self.parameters = dict(model.named_parameters())
            self.optimizer = make_optimizer(model, config.optimizer, world.dtype)
            try:
                self._deepspeed, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=generated)
            except Exception as error:
                if not config.deepspeed.extra:
                    raise
                raise UserError(f"DeepSpeed refuses the config with deepspeed.extra: {error}") from error
        if self.stage == 0 and world.size == 1:  # it would copy all gradients to one tensor and back, for nobody
            self._deepspeed.enable_backward_allreduce = False
        self.module: nn.Module = self._deepspeed.module
        self._phase: Phase = contextlib.nullcontext
        self._create_optimizer_state(config)
        if self._scaler is not None:
            self._scaler.raise_error_at_min_scale = False  # `step` tells

    @contextlib.contextmanager
    def metered(self, phase: Phase) -> Iterator[None]:
        """Within, `phase` is entered around forward, backward and optimizer, and around communication inside them."""
        from deepspeed.comm import comm

        backend = comm.cdb
        self._phase, comm.cdb = phase, _MeteredBackend(backend, phase)
        try:
            yield
        finally:
            self._phase, comm.cdb = contextlib.nullcontext, backend

    def backward(self, inputs: dict[str, torch.Tensor], targets: int) -> torch.Tensor:
        """Forward and backward of one micro-batch; returns its summed NLL (a detached fp32 scalar on the device).

        The gradient is that of the loss averaged over `targets`, the labels of the whole step on all ranks. DeepSpeed
        averages gradients over the ranks, so the sum is multiplied by their number here, and nowhere else.
        """
        with self._phase("forward"):
            loss_sum = self._deepspeed(**inputs, reduction="sum", z_loss=self.z_loss)
        with self._phase("backward"):
            self._deepspeed.backward(loss_sum * (self.world.size / max(targets, 1)), scale_wrt_gas=False)
        if not self.z_loss:
            return loss_sum.detach().float()
        z = cast(Transformer, self.module).lm_head.last_z.float()
        self.z_sum += z / max(targets, 1)
        return loss_sum.detach().float() - z  # the metric `loss` is the NLL alone

    def step(self, lr: float | None) -> Update | None:
        """Ends a micro-batch; at the last of a step it clips and updates.

        lr: the step's learning rate at its last micro-batch, None before. Returns None when no update was due. The host
        waits for the check that the gradient is finite, and not for the update.
        """
        with self._phase("optimizer"):
            return self._step(lr)

    def _step(self, lr: float | None) -> Update | None:
        if lr is None:
            self._deepspeed.step()
            return None
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0)
        if self.stage == 0:
            # DeepSpeed keeps no norm here. The gradients are whole and already averaged over the ranks.
            norm = get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
            size = float(norm)  # the host waits for it, as for DeepSpeed's own check at the other stages
            if math.isfinite(size):
                if 0 < self.grad_clip < size:
                    clip_grads_with_norm_(self.parameters.values(), self.grad_clip, norm)
                self._deepspeed.step()
                return Update(norm, True)
            # DeepSpeed would apply it here: what is left of its step is to forget the gradient and count.
            self._deepspeed.zero_grad()
            self._deepspeed.micro_steps += 1
            return Update(torch.full_like(norm, torch.inf), False)
        self._deepspeed.step()
        applied = self._deepspeed.was_step_applied()
        norm = self._deepspeed.get_global_grad_norm() if applied else torch.tensor(torch.inf)
        # With offload the norm is on the host.
        return Update(norm.float().to(self.world.device, non_blocking=True), applied)

    @property
    def loss_scale(self) -> float | None:
        """What fp16 multiplies the loss by, so that small gradients are not rounded to 0; None in other precisions."""
        return None if self._scaler is None else float(self._scaler.cur_scale)

    def read_loss_scaler(self) -> dict[str, float] | None:
        """The state of dynamic loss scaling: numbers that `write_loss_scaler` takes; None without it."""
        return None if self._scaler is None else {name: getattr(self._scaler, name) for name in _SCALER_STATE}

    def write_loss_scaler(self, state: dict[str, float]) -> None:
        """Goes on with a scaler's state; without loss scaling there is nothing to do."""
        if self._scaler is not None:
            for name in _SCALER_STATE:
                setattr(self._scaler, name, state[name])

    @property
    def _scaler(self) -> Any:
        return self._deepspeed.optimizer.loss_scaler if self.world.dtype == torch.float16 else None

    def read_parameter(self, name: str) -> torch.Tensor:
        """The whole fp32 master, on this rank's device; perhaps a view of it, which the next step changes."""
        return self._read(self.parameters[name], None)

    def read_moment(self, name: str, moment: str) -> torch.Tensor:
        """One of the whole fp32 tensors that llm.training.optim.moments names for a parameter."""
        return self._read(self.parameters[name], moment)

    def read_optimizer_steps(self) -> float:
        """How many updates AdamW has made (the count in its bias correction)."""
        return float(next(state["step"] for state in self.optimizer.state.values() if "step" in state))

    def write_parameter(self, name: str, value: torch.Tensor) -> None:
        """Sets the fp32 master and the copy that computes."""
        from deepspeed.runtime.zero import GatheredParameters

        parameter, value = self.parameters[name], value.to(self.world.device, torch.float32)
        if self.stage > 0:
            self._write(parameter, value, None)
        with torch.no_grad(), GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3):
            if self.stage < 3 or self.world.rank == 0:
                parameter.copy_(value)

    def write_moment(self, name: str, moment: str, value: torch.Tensor) -> None:
        self._write(self.parameters[name], value.to(self.world.device, torch.float32), moment)

    def write_optimizer_steps(self, steps: float) -> None:
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(steps)

    def _create_optimizer_state(self, config: Config) -> None:
        """Makes the optimizer's state before its first step, as its first step would.

        So it can be read and written from the start. ZeRO 1 and 2 link parameters to their slices of the state once,
        inside the first step and after its first group only, which leaves the second group without; here all exists.
        """
        for tensor, kept in self._optimized_tensors(config):
            self.optimizer.state[tensor] = {moment: torch.zeros_like(tensor) for moment in kept}
            if kept == ADAMW_MOMENTS:
                self.optimizer.state[tensor]["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
        if self.stage in (1, 2):
            self._deepspeed.optimizer._lazy_init_hp_params_optimizer_state()

    def _optimized_tensors(self, config: Config) -> Iterator[tuple[torch.Tensor, tuple[str, ...]]]:
        """What is really stepped, and its moments: flat fp32 partitions under ZeRO, at stage 0 the parameters."""
        if self.stage == 0:
            for name, parameter in self.parameters.items():
                yield parameter, moments(name, config.optimizer)
        elif self.stage == 3:
            for flat in self._deepspeed.optimizer.fp32_partitioned_groups_flat:
                yield flat, ADAMW_MOMENTS
        else:
            for group in self.optimizer.param_groups:
                for flat in group["params"]:
                    yield flat, ADAMW_MOMENTS

    def _read(self, parameter: nn.Parameter, moment: str | None) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self.stage == 0:
            return (parameter if moment is None else self.optimizer.state[parameter][moment]).detach().float()
        if self.stage < 3 and self.world.size == 1:  # a view of the whole: DeepSpeed would copy it twice
            whole: torch.Tensor = cast(Any, parameter)._hp_mapping.get_hp_fragment(moment)
            return whole.detach().view_as(parameter)
        full = (
            safe_get_full_fp32_param(parameter) if moment is None else safe_get_full_optimizer_state(parameter, moment)
        )
        return full.detach()

    def _write(self, parameter: nn.Parameter, value: torch.Tensor, moment: str | None) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if self.stage == 0:
            (parameter if moment is None else self.optimizer.state[parameter][moment]).data.copy_(value)
        elif self.stage == 3:
            self._write_partition(parameter, value, moment)
        elif moment is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, moment)

    def _write_partition(self, parameter: Any, value: torch.Tensor, moment: str | None) -> None:
        """ZeRO-3: this rank's slice of the flattened value, padded where the ranks do not divide it."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = parameter.ds_tensor.numel()
        padded = value.new_zeros(size * self.world.size)
        padded[: value.numel()] = value.flatten()
        partition = padded.narrow(0, size * self.world.rank, size)
        if moment is None:
            safe_set_local_fp32_param(parameter, partition)
        else:
            safe_set_local_optimizer_state(parameter, partition, moment)


class _MeteredBackend:
    """DeepSpeed's communication backend; its collectives, and the waits for those begun beside, enter a phase."""

    def __init__(self, backend: Any, phase: Phase) -> None:
        self._backend, self._phase = backend, phase

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        if not name.startswith(("all_", "reduce", "broadcast", "inference_all_reduce", "gather", "scatter")):
            return found

        def metered(*arguments: Any, **options: Any) -> Any:
            with self._phase("communication"):
                result = found(*arguments, **options)
            return _MeteredWork(result, self._phase) if hasattr(result, "wait") else result

        return metered


class _MeteredWork:
    """A collective under way."""

    def __init__(self, work: Any, phase: Phase) -> None:
        self._work, self._phase = work, phase

    def wait(self, *arguments: Any) -> Any:
        with self._phase("communication"):
            return self._work.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
