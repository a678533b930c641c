"""The interface to DeepSpeed: processes, device, precision, and the two halves of an optimizer step over ZeRO 0-3.

The rest of the program uses `start`, `Engine.backward`, `Engine.update`, and the reading and writing of whole fp32
parameters and moments. All differences between ZeRO stages are handled here.
"""

import contextlib
import io
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from kernels.linear import MasterWeights
from llm.config import Config
from llm.errors import UserError
from llm.interrupts import deferred
from llm.model.transformer import Transformer
from llm.rendezvous import form_group, leave_group, meet
from llm.training.cpu_memory import keep_freed_memory
from llm.training.optim import ADAMW_MOMENTS, MUON_MOMENTS, make_optimizer, moments
from llm.training.same_bits import SameBits, micro_batch_order
from llm.world import World, pick_device, pick_dtype

REDUCE_BUCKET = 50_000_000
"""Number of gradients that ZeRO collects before it reduces them. DeepSpeed's default takes a buffer of 2 GB in fp32."""

_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

Phase = Callable[[str], contextlib.AbstractContextManager[Any]]
"""phase(name) is a context manager around one part of a step; see Meter.phase."""


def start(config: Config) -> World:
    """Joins the processes that deepspeed, torchrun or srun started; a single process is a world of one.

    Raises UserError if this machine lacks the device or the precision of the config.
    """
    place = meet()
    device = pick_device(config.train.device, place.local_rank, "train.device=cpu")
    dtype = pick_dtype(config, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    deepspeed = import_deepspeed(device)
    if dtype == torch.float16 and not deepspeed.get_accelerator().is_fp16_supported():
        raise UserError(f"train.precision=fp16: this {device.type} device has no fp16; use bf16 or fp32")
    stop()  # what a run of this process that ended in an error has left
    control = form_group(place, device)
    with contextlib.redirect_stdout(sys.stderr):
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    return World(place.rank, place.local_rank, place.size, device, dtype, control)


def stop() -> None:
    """Leaves the process group and forgets DeepSpeed's, which the next run in this process could not use."""
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    if comm.cdb is not None and dist.is_initialized():
        comm.destroy_process_group()
    elif comm.cdb is not None:
        # Torch's group is gone already: after a run that failed, an evaluation formed one of its own and left it.
        groups._release_process_group_references()
    comm.cdb = None
    leave_group()


def limit_collectives(minutes: float) -> None:
    """Sets the time after which collectives of any group fail, DeepSpeed's too: at least torch's own 30 minutes."""
    # There is no public way for groups that exist, and DeepSpeed gives its own no limit.
    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(timedelta(minutes=max(minutes, 30)), group)


def import_deepspeed(device: torch.device) -> ModuleType:
    """Imports deepspeed for this device. Its logger writes to stderr, because stdout is for results."""
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")  # no CUDA op is compiled, because the optimizer is torch's own
    with contextlib.redirect_stdout(sys.stderr), deferred(), _accelerator_of(device):
        import deepspeed
        import deepspeed.ops

        chosen = deepspeed.get_accelerator().device_name()
    if device.type == "cuda" and chosen == "cpu":
        raise UserError(
            "DeepSpeed takes one kind of device for the life of a process, and this one has trained on a CPU: train on "
            "the GPU in another process (in a notebook: restart the kernel)"
        )
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
    # Without this op DeepSpeed's CPU collectives use gloo. With it the first run compiles for almost a minute, and a
    # killed run leaves segments in /dev/shm.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextlib.contextmanager
def _accelerator_of(device: torch.device) -> Iterator[None]:
    """Lets DeepSpeed's import inside the block choose the run's kind of device; it would take a GPU for a CPU's run."""
    before = os.environ.get("DS_ACCELERATOR")
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        yield
    finally:
        # A process that this one starts may train on a GPU.
        if before is None:
            os.environ.pop("DS_ACCELERATOR", None)
        else:
            os.environ["DS_ACCELERATOR"] = before


def run_stage(stage: int, offload: str, processes: int, dtype: torch.dtype) -> int:
    """Returns the ZeRO stage that runs where the config says `stage`: one process runs 1 and 2 as stage 0.

    One process has no other to partition its state with, and DeepSpeed would keep the weights twice and copy every
    gradient. fp16 stays, since it needs DeepSpeed's loss scaling; so does deepspeed.offload=cpu, which needs masters
    that are separate from the weights.
    """
    return 0 if processes == 1 and stage < 3 and dtype != torch.float16 and offload == "none" else stage


def reduce_bucket(stage: int, processes: int) -> int:
    """Returns how many gradients are collected before they are reduced.

    One process does not reduce, and stages 1 and 2 do not copy a gradient that is larger than the bucket.
    """
    return 1 if processes == 1 and stage < 3 else REDUCE_BUCKET


def deepspeed_config(config: Config, stage: int, world: World, micro_batch: int, accumulation: int) -> dict[str, Any]:
    """Makes DeepSpeed's JSON from our config, for the stage of `run_stage`; deepspeed.extra is merged in last."""
    generated: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optimizer.grad_clip if stage > 0 else 0.0,  # at stage 0 `Engine.update` clips
        # At stage 0 the weights are fp32 and the model rounds them at each use. DeepSpeed's own bf16 mode takes a
        # wrong first step there.
        "bf16": {"enabled": world.dtype == torch.bfloat16 and stage > 0},
        # Dynamic loss scaling as in torch's GradScaler: it starts at 2^16 and is halved at each overflow.
        "fp16": {"enabled": world.dtype == torch.float16, "hysteresis": 1},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": reduce_bucket(stage, world.size),
        },
        # Never, because Display reports the progress.
        "steps_per_print": 2**31,
        "timers": {"throughput": {"enabled": False}},  # it would synchronise the GPU twice per micro-batch
    }
    if config.optimizer.kind == "muon":
        generated["zero_allow_untested_optimizer"] = True  # ours, for which DeepSpeed would else stop
    if stage > 0:
        # In bf16, sums over micro-batches and ranks would lose small contributions.
        generated["data_types"] = {"grad_accum_dtype": "fp32"}
        generated["communication_data_type"] = "fp32"
    if config.deepspeed.offload == "cpu":
        on_gpu = world.device.type == "cuda"
        # A copy to or from the GPU is asynchronous only with pinned memory.
        generated["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
        generated["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW is fused on the host too, without compilation
    return _merge(generated, config.deepspeed.extra)


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    # Merged at every depth, so that one key of extra.zero_optimization does not drop our other keys.
    merged = dict(base)
    for key, value in extra.items():
        both_dicts = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_dicts else value
    return merged


class Engine:
    """A model, its optimizer and its gradients under DeepSpeed.

    A step is `backward` for each of its `accumulation` micro-batches, then one `update`.

    Whole parameters and moments are read and written by name, however the ZeRO stage partitions them. Those calls are
    collective: every rank makes them in the same order.
    """

    def __init__(
        self, build: Callable[[], Transformer], config: Config, world: World, micro_batch: int, accumulation: int
    ) -> None:
        """build: makes the model with compute_dtype world.dtype. `write_parameter` then sets its values."""
        deepspeed = import_deepspeed(world.device)
        self.world = world
        self._accumulation, self._micro_batches = accumulation, 0
        self.micro_batch_order = micro_batch_order(accumulation) if config.train.same_bits else range(accumulation)
        """In which a step's micro-batches are given to `backward`."""
        self._grad_clip = config.optimizer.grad_clip
        self._z_loss = config.train.z_loss
        self._z_losses: list[torch.Tensor] = []
        self.stage = run_stage(config.deepspeed.zero_stage, config.deepspeed.offload, world.size, world.dtype)
        partitions = self.stage == 1
        if config.train.same_bits:
            self.stage = 0  # of DeepSpeed, which leaves gradients and partitions to SameBits
        generated = deepspeed_config(config, self.stage, world, micro_batch, accumulation)
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints the memory of its set-up
            if self.stage == 3:
                # Init partitions weights when they are made, so no rank holds all of them. mem_efficient_linear
                # would replace F.linear in the whole process.
                with deepspeed.zero.Init(config_dict_or_path=generated, mem_efficient_linear=False):
                    model = build()
            else:
                model = build().to(world.device)
            self.parameters = dict(model.named_parameters())
            self.optimizer = make_optimizer(model, config.optimizer, world.dtype)
            self._same_bits: SameBits | None = None
            if config.train.same_bits:
                weights = list(self.parameters.values())
                self._same_bits = SameBits(
                    self.optimizer,
                    weights,
                    world,
                    partitions=partitions,
                    micro_batches=accumulation,
                    communicating=lambda: self._phase("communication"),
                )
            try:
                self._deepspeed, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=generated)
            # DeepSpeed rejects a config with errors of several classes. Without `extra` it is our config, so a bug.
            except Exception as error:
                if not config.deepspeed.extra:
                    raise
                raise UserError(f"DeepSpeed refuses the config with deepspeed.extra: {error}") from error
        # Else one process copies all gradients to one tensor and back, to no end.
        if self.stage == 0 and (world.size == 1 or self._same_bits):
            self._deepspeed.enable_backward_allreduce = False
        self.module: Any = self._deepspeed.module  # the Transformer
        # At other stages DeepSpeed's hooks take the gradients, and it keeps the masters of 16-bit weights itself.
        self._masters = model.master_weights() if self.stage == 0 else MasterWeights([], world.dtype)
        self.reads_in_place = self.stage == 0 and not partitions
        """Whether the values that are read are views of the state, which only `update` changes, and not temporary."""
        self.copied: torch.cuda.Event | None = None
        """Set where a GPU copies the state: the next `update` waits for it, on the device."""
        self._phase: Phase = contextlib.nullcontext
        self._create_optimizer_state(config)
        if self._scaler is not None:
            self._scaler.raise_error_at_min_scale = False  # NonFiniteGuard decides what an overflow means

    @contextlib.contextmanager
    def metered(self, phase: Phase) -> Iterator[None]:
        """Times, inside the block, forward, backward and optimizer as phases, and communication inside them.

        All collectives of DeepSpeed use one global object, which is replaced in the block. There is no public way:
        DeepSpeed's own communication log synchronises the GPU at every collective.
        """
        from deepspeed.comm import comm

        backend = comm.cdb
        self._phase, comm.cdb = phase, _MeteredBackend(backend, phase)
        try:
            yield
        finally:
            self._phase, comm.cdb = contextlib.nullcontext, backend

    def backward(self, inputs: dict[str, torch.Tensor], targets: int) -> torch.Tensor:
        """Runs forward and backward of one micro-batch; returns its part of the step's loss (fp32 scalar).

        That is the micro-batch's summed NLL, without a z_loss, over `targets`: the labels of the whole step on all
        ranks. So the parts of all micro-batches and ranks add up to the step's mean loss. The gradient is that of this
        mean. DeepSpeed averages gradients over the ranks, so the loss is multiplied by their number here, and nowhere
        else. With train.same_bits gradients are summed.
        """
        self._micro_batches += 1
        # DeepSpeed reduces the gradients of ZeRO 0 and 1 only with the backward of the last micro-batch.
        self._deepspeed.set_gradient_accumulation_boundary(self._micro_batches == self._accumulation)
        targets = max(targets, 1)  # a step with only padding has loss 0
        with self._phase("forward"), self._masters:
            loss_sum = self._deepspeed(**inputs, reduction="sum", z_loss=self._z_loss)
        averaged_over = 1 if self._same_bits else self.world.size
        accumulating = self._same_bits.accumulating() if self._same_bits else contextlib.nullcontext()
        with self._phase("backward"), self._masters, accumulating:
            # scale_wrt_gas=False: `targets` counts the whole step, so the accumulation must not divide it again.
            self._deepspeed.backward(loss_sum * (averaged_over / targets), scale_wrt_gas=False)
        loss = loss_sum.detach().float() / targets
        if self._z_loss:
            self._z_losses.append(self.module.lm_head.last_z.float() / targets)
            loss -= self._z_losses[-1]
        return loss

    def take_z_loss(self) -> torch.Tensor:
        """Returns z_loss * lse^2 of each micro-batch since the last call, over the step's targets (fp32)."""
        taken, self._z_losses = torch.stack(self._z_losses), []
        return taken

    def update(self, lr: float) -> tuple[torch.Tensor, bool]:
        """Clips the gradient that a step's micro-batches have accumulated, and updates the weights with it.

        Returns (norm, applied). norm is that of the whole gradient before clipping: an fp32 scalar on the device, inf
        where the gradient is not finite. Such a gradient is not applied: the weights stay as they are, and the loss
        scale of fp16 falls. The host waits for this check, but not for the update.
        """
        self._micro_batches = 0
        self._masters.changed()  # before, so that the update has the memory of the copies
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0)
        if self.copied is not None:
            self.copied.wait()  # the computing stream does, not the host
            self.copied = None
        with self._phase("optimizer"):
            if self._same_bits is not None:
                return self._update_in_order(self._same_bits)
            if self.stage == 0:
                return self._update_whole()
            self._deepspeed.step()
            applied: bool = self._deepspeed.was_step_applied()
            norm = self._deepspeed.get_global_grad_norm() if applied else torch.tensor(torch.inf)
            # With offload the norm is on the host.
            return norm.float().to(self.world.device, non_blocking=True), applied

    def _update_whole(self) -> tuple[torch.Tensor, bool]:
        """`update` at stage 0, where gradients are whole and already averaged over the ranks.

        There DeepSpeed does not return the norm, and does not check that the gradient is finite before it applies it.
        """
        norm = get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        # The only place in the step of this stage where the host waits for the GPU.
        size = float(norm)
        if not math.isfinite(size):
            # Otherwise the next step would add to these gradients.
            self._deepspeed.zero_grad()
            return torch.full_like(norm, torch.inf), False
        # With a norm below the limit, torch would still multiply every gradient, by 1.
        if 0 < self._grad_clip < size:
            clip_grads_with_norm_(self.parameters.values(), self._grad_clip, norm)
        self._deepspeed.step()
        return norm, True

    def _update_in_order(self, same_bits: SameBits) -> tuple[torch.Tensor, bool]:
        """`update` with train.same_bits, where DeepSpeed has not reduced the gradients."""
        size = same_bits.reduce()
        norm = torch.tensor(size, dtype=torch.float32)
        if not math.isfinite(size):
            return torch.full_like(norm, torch.inf), False
        factor = self._grad_clip / size if 0 < self._grad_clip < size else 1.0
        with same_bits.updating(factor):
            self._deepspeed.step()
        return norm, True

    @property
    def loss_scale(self) -> float | None:
        """The factor on the loss in fp16, which keeps small gradients from rounding to 0; None in other precisions."""
        return None if self._scaler is None else float(self._scaler.cur_scale)

    @property
    def muon_lr(self) -> float | None:
        """The rate of the last update of the matrices inside the blocks; None with AdamW."""
        return next((group["lr"] for group in self.optimizer.param_groups if "shapes" in group), None)

    def read_loss_scaler(self) -> dict[str, float] | None:
        """Returns the state of fp16's dynamic loss scaling, for `write_loss_scaler`; None in other precisions."""
        return None if self._scaler is None else {name: getattr(self._scaler, name) for name in _SCALER_STATE}

    def write_loss_scaler(self, state: dict[str, float]) -> None:
        """Restores the state of dynamic loss scaling. Does nothing in precisions other than fp16."""
        if self._scaler is not None:
            for name in _SCALER_STATE:
                setattr(self._scaler, name, state[name])

    @property
    def _scaler(self) -> Any:
        return self._deepspeed.optimizer.loss_scaler if self.world.dtype == torch.float16 else None

    def read_parameter(self, name: str) -> torch.Tensor:
        """Returns the whole fp32 master weight on this rank's device. It may be a view that the next step changes."""
        return self._read(self.parameters[name], None)

    def read_moment(self, name: str, moment: str) -> torch.Tensor:
        """Returns a whole fp32 moment, one of those that llm.training.optim.moments names for the parameter."""
        if self._same_bits is not None:
            return self._same_bits.read_moment(self.parameters[name], moment)
        return self._read(self.parameters[name], moment)

    def read_optimizer_steps(self) -> torch.Tensor:
        """Returns how many updates AdamW has made (the count in its bias correction): an fp32 scalar, a view.

        A tensor, because the host would wait for a number.
        """
        # Muon's matrices have no count.
        return next(state["step"] for state in self.optimizer.state.values() if "step" in state)

    def write_parameter(self, name: str, value: torch.Tensor) -> None:
        """Sets the fp32 master weight and the copy for computation."""
        from deepspeed.runtime.zero import GatheredParameters

        parameter, value = self.parameters[name], value.to(self.world.device, torch.float32)
        if self.stage > 0:
            self._write(parameter, value, None)
        # modifier_rank=0: at the end, DeepSpeed takes rank 0's values and partitions them again.
        with torch.no_grad(), GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3):
            if self.stage < 3 or self.world.rank == 0:
                parameter.copy_(value)
        self._masters.changed()

    def write_moment(self, name: str, moment: str, value: torch.Tensor) -> None:
        value = value.to(self.world.device, torch.float32)
        if self._same_bits is not None:
            self._same_bits.write_moment(self.parameters[name], moment, value)
        else:
            self._write(self.parameters[name], value, moment)

    def write_optimizer_steps(self, steps: float) -> None:
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(steps)

    def _create_optimizer_state(self, config: Config) -> None:
        """Makes the optimizer's state as its first step does, so that it can be read and written before that step.

        ZeRO 1 and 2 link each parameter to its slice of the state once, inside the first step and when only the first
        group's state exists, so that the second group is never linked. Hence the call of a private method: DeepSpeed
        has no public one.
        """
        for tensor, kept in self._optimized_tensors(config):
            self.optimizer.state[tensor] = {moment: torch.zeros_like(tensor) for moment in kept}
            if kept == ADAMW_MOMENTS:
                # torch's fused AdamW keeps this count in fp32 on the parameter's device.
                self.optimizer.state[tensor]["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
        if self.stage in (1, 2):
            self._deepspeed.optimizer._lazy_init_hp_params_optimizer_state()

    def _optimized_tensors(self, config: Config) -> Iterator[tuple[torch.Tensor, tuple[str, ...]]]:
        """Yields the updated tensors and their moments: flat ones with ZeRO and same_bits, at stage 0 parameters."""
        if self.stage == 0 and self._same_bits is None:
            for name, parameter in self.parameters.items():
                yield parameter, moments(name, config.optimizer)
        elif self.stage == 3:
            for flat in self._deepspeed.optimizer.fp32_partitioned_groups_flat:
                yield flat, ADAMW_MOMENTS
        else:
            # DeepSpeed or SameBits has replaced the parameters of these groups with this rank's flat fp32 partitions.
            for group in self.optimizer.param_groups:
                for flat in group["params"]:
                    yield flat, MUON_MOMENTS if "shapes" in group else ADAMW_MOMENTS

    # DeepSpeed's functions for optimizer states take None as the key of the fp32 master.

    def _read(self, parameter: nn.Parameter, moment: str | None) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.stage == 0:
            return (parameter if moment is None else self.optimizer.state[parameter][moment]).detach().float()
        return safe_get_full_optimizer_state(parameter, moment).detach()

    def _write(self, parameter: Any, value: torch.Tensor, moment: str | None) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage == 0:
            (parameter if moment is None else self.optimizer.state[parameter][moment]).data.copy_(value)
        elif self.stage < 3:
            safe_set_full_optimizer_state(parameter, value, moment)
        else:
            # At ZeRO 3 DeepSpeed writes a whole value only if the ranks divide it, so this rank's slice is cut here.
            size = parameter.ds_tensor.numel()
            padded = value.new_zeros(size * self.world.size)
            padded[: value.numel()] = value.flatten()
            safe_set_local_optimizer_state(parameter, padded.narrow(0, size * self.world.rank, size), moment)


class _MeteredBackend:
    """DeepSpeed's communication backend, with its collectives and the waits for asynchronous ones timed as a phase."""

    def __init__(self, backend: Any, phase: Phase) -> None:
        self._backend, self._phase = backend, phase

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        if not name.startswith(("all_", "reduce", "broadcast", "inference_all_reduce", "gather", "scatter")):
            return found

        def metered(*arguments: Any, **options: Any) -> Any:
            with self._phase("communication"):
                result = found(*arguments, **options)
            # A synchronous collective returns nothing to wait for.
            return _MeteredWork(result, self._phase) if hasattr(result, "wait") else result

        return metered


class _MeteredWork:
    """An asynchronous collective whose `wait` is timed."""

    def __init__(self, work: Any, phase: Phase) -> None:
        self._work, self._phase = work, phase

    def wait(self, *arguments: Any) -> Any:
        with self._phase("communication"):
            return self._work.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
