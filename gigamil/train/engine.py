"""DeepSpeed behind one door: the only import of deepspeed.

An engine here is a model, one gradient reduction per step, an optimiser, and a state that any other engine can load,
whatever its ZeRO stage and number of ranks. What is worked around, and why, stands beside each line (DeepSpeed 0.19).
"""

import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gigamil.errors import EnvironmentFault
from gigamil.models.bag import Bag, Pooled
from gigamil.models.blocks import parameters_by_rate
from gigamil.models.encoder import Cells
from gigamil.parallel.topology import Topology, export_topology
from gigamil.train.step import Ranks

if TYPE_CHECKING:
    from gigamil.config.schema import RunConfig

_MOMENTS: dict[type, tuple[str, ...]] = {torch.optim.AdamW: ("exp_avg", "exp_avg_sq"), torch.optim.SGD: ()}


@dataclass
class TrainingState:
    """Parameters, moments and step count by name, unpartitioned, float32, on the CPU.

    Attributes:
        parameters: every parameter and buffer of the model.
        moments: "<parameter>/<moment>" of every parameter that is trained.
        optimizer_steps: updates counted for each parameter group (Adam's bias correction).
    """

    parameters: dict[str, Tensor]
    moments: dict[str, Tensor]
    optimizer_steps: tuple[int, ...]


def start_distributed(
    topology: Topology, device: torch.device, timeout_s: float, store: dist.Store | None = None
) -> Ranks:
    """Join the other ranks through DeepSpeed and make the groups that pool together.

    Args:
        timeout_s: longest wait in a collective; then the rank gives up with an error.
        store: that all ranks share (`gigamil.parallel.meeting.meet`); None meets at MASTER_ADDR and MASTER_PORT.
    Raises:
        EnvironmentFault: the ranks did not meet.
    """
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # before the import: else DeepSpeed takes a GPU that it finds
    deepspeed = import_deepspeed()
    export_topology(topology)
    if device.type == "cpu":
        skip_kernel_build()
    backend = "nccl" if device.type == "cuda" else "gloo"
    if topology.world_size == 1 and store is None:
        store = dist.HashStore()  # one process needs no address: an in-memory store cannot meet a port in use
    try:
        if store is not None and not dist.is_initialized():
            dist.init_process_group(
                backend,
                store=store,
                rank=topology.rank,
                world_size=topology.world_size,
                timeout=timedelta(seconds=timeout_s),
            )
        deepspeed.init_distributed(
            dist_backend=backend, auto_mpi_discovery=False, timeout=timedelta(seconds=timeout_s), verbose=False
        )
    except (RuntimeError, ValueError) as error:
        raise EnvironmentFault(
            f"rank {topology.rank} of {topology.world_size} could not join the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {error}. Is the port free, is every rank started?"
        ) from error
    return make_ranks(topology, timeout_s)


def skip_kernel_build() -> None:
    """Keep DeepSpeed from compiling a shared-memory all-reduce when it starts on CPUs.

    That takes half a minute and a compiler, and a killed build leaves a lock that hangs every later run. gloo does the
    same sums.
    """
    import_deepspeed().ops.__compatible_ops__["deepspeed_shm_comm"] = False


def make_ranks(topology: Topology, timeout_s: float | None = None) -> Ranks:
    """Process groups of an initialised world; every rank takes part in making every group."""
    timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
    world = dist.group.WORLD
    if topology.num_groups == 1:
        return Ranks(topology, world, world)
    groups = [dist.new_group(topology.group_ranks(g), timeout=timeout) for g in range(topology.num_groups)]
    return Ranks(topology, world, groups[topology.group])  # type: ignore[arg-type]  # never a non-member of its own


def make_optimizer(model: nn.Module, config: "RunConfig") -> torch.optim.Optimizer:
    """AdamW over what is to be trained: a parameter group per learning rate of the encoder, the head's group last.

    Raises:
        ConfigError: layer decay for an encoder whose blocks are not known.
    """
    optim = config.science.optim
    backbone: nn.Module = model.encoder.backbone  # type: ignore[assignment, union-attr]
    groups = [
        {"params": parameters, "lr": optim.lr_encoder * share}
        for share, parameters in parameters_by_rate(backbone, optim.layer_decay).items()
    ]
    head = [parameter for name, parameter in model.named_parameters() if not name.startswith("encoder.")]
    return torch.optim.AdamW(
        [*groups, {"params": head, "lr": optim.lr_head}],
        betas=optim.betas,
        weight_decay=optim.weight_decay,
        fused=torch.cuda.is_available() and config.execution.device != "cpu",
    )


def deepspeed_config(config: "RunConfig") -> dict[str, Any]:
    """The DeepSpeed JSON of a run: every key on purpose, no "auto", no default that changes results."""
    optim = config.science.optim
    settings: dict[str, Any] = {
        # Slides are our micro-batches, and the step is ours: DeepSpeed only counts to one.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.clip_norm or 0.0,  # DeepSpeed's own default is 1.0, not off
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": config.execution.zero_stage,
            "overlap_comm": False,
            "reduce_bucket_size": 50_000_000,  # 200 MB; the default is a buffer of 2 GB beside the model
            "stage3_param_persistence_threshold": 0,  # small ones are gathered with the others (`gathered`)
        },
    }
    if config.execution.offload:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if config.science.precision == "bfloat16":
        # The empty list keeps the gradients of every module in float32 when they are reduced.
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return settings


class DeepSpeedEngine:
    """`Engine` over `deepspeed.initialize`, ZeRO 0 to 3.

    ZeRO 3 partitions parameters between steps; within a step they are whole on every rank. DeepSpeed would gather them
    module by module, and again in every chunk's forward and backward: all ranks would have to make the same calls, and
    one that runs out of memory in the middle would leave the others waiting. It would save little, because the gradients
    of a step are whole on every rank anyway, and are as large as the parameters that are trained.

    Args:
        model: slide model, float32, on any device.
        optimizer: over all of its parameters that want a gradient; AdamW or SGD.
        settings: DeepSpeed JSON (`deepspeed_config`).
        device: where to train.
        timeout_s: longest wait in a reduction; None leaves torch's.
    """

    dtype = torch.float32

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: dict[str, Any],
        device: torch.device,
        *,
        timeout_s: float | None = None,
    ) -> None:
        deepspeed = import_deepspeed()
        self._saved_buffers = model.state_dict().keys() & dict(model.named_buffers()).keys()
        self.device = device
        self._base_optimizer = optimizer
        self._moments = _MOMENTS[type(optimizer)]
        self._engine = deepspeed.initialize(model=model.to(device), optimizer=optimizer, config=settings)[0]
        self.module: nn.Module = self._engine.module
        self.stage = int(settings["zero_optimization"]["stage"])
        self._is_whole = self.stage < 3
        if self.stage == 3:
            self._engine.optimizer.parameter_offload.destroy()  # the hooks that gather per module: see `gathered`
        self._initialise_moments()
        if timeout_s is not None:
            # DeepSpeed makes a group of its own for reductions, with torch's default timeout of up to half an hour.
            _set_timeout(timeout_s, self._engine.seq_data_parallel_group)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Parameters are whole inside, where the model is called. A collective at ZeRO 3: all ranks enter.

        What a rank does inside, and whether it breaks off, is nothing to the others. It may be entered again inside.

        Cost: at ZeRO 3 one all-gather of the parameters, and their bytes.
        """
        if self._is_whole:
            yield
            return
        with import_deepspeed().zero.GatheredParameters(list(self.module.parameters())):
            self._is_whole = True
            try:
                yield
            finally:
                self._is_whole = False
                # Where a forward broke off it was left out, and a parameter that is looked at would still be gathered.
                self._engine._forward_epilogue()

    def encode(self, image_nCHW: Tensor, tile_key_n: Tensor | None, cells: Cells | None = None) -> Tensor:
        """Tiles -> embeddings, or a block -> those of its cells; with a graph if grad mode is on."""
        result: Tensor = self._engine("encode", image_nCHW, tile_key_n, cells)
        return result

    def classify(self, bag: Bag) -> tuple[Tensor, Pooled]:
        """Bag -> logits (B, K) and all that the aggregator gave."""
        result: tuple[Tensor, Pooled] = self._engine("classify", bag)
        return result

    def backward(self, scalar: Tensor) -> None:
        """Add a scalar's gradient to the local gradients; only inside `one_reduction`."""
        self._engine.backward(scalar)

    @contextmanager
    def one_reduction(self) -> Iterator[None]:
        """All backwards of a step, with parameters `gathered`; on exit the mean over all ranks is taken once.

        After an error inside, nothing is reduced (the other ranks would not take part) and the engine is spent.
        """
        engine = self._engine
        context = engine.no_sync() if self.stage == 0 else engine.coalesce_grad_reduction()
        context.__enter__()
        try:
            with self.gathered():
                yield
        except BaseException:
            # The context reduces in its `finally`, at the latest when it is collected: take that from it.
            engine._flush_coalesced_reduction_zero12 = engine._flush_coalesced_reduction_zero3 = lambda _: None
            raise
        context.__exit__(None, None, None)
        if self.stage == 0:
            engine.allreduce_gradients()

    def step(self, learning_rates: Sequence[float]) -> float:
        """Clip, update with one learning rate per parameter group, clear gradients; returns the gradient's norm.

        A norm that is not finite leaves weights and moments as they are.
        """
        for group, rate in zip(self._engine.optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = rate
        if self.stage == 0:  # without ZeRO, DeepSpeed clips but does not tell the norm
            gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
            if math.isfinite(norm):
                self._engine.step()
            else:
                self._engine.zero_grad()
            return norm
        self._engine.step()  # with a norm that is not finite, ZeRO leaves the weights and reports infinity
        return float(self._engine.get_global_grad_norm())

    def state(self) -> TrainingState:
        """Unpartitioned state, equal on every rank. A collective: all ranks call it."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameters, moments = {}, {}
        trained = self._trained()
        for name, parameter in self.module.named_parameters():
            if name not in trained:
                parameters[name] = self._fixed(parameter)
                continue
            if self.stage == 0:
                full: Tensor = parameter
                states = {moment: self._base_optimizer.state[parameter][moment] for moment in self._moments}
            else:
                full = safe_get_full_fp32_param(parameter)
                states = {moment: safe_get_full_optimizer_state(parameter, moment) for moment in self._moments}
            parameters[name] = _to_cpu(full)
            moments.update({f"{name}/{moment}": _to_cpu(values) for moment, values in states.items()})
        buffers = dict(self.module.named_buffers())
        parameters.update({name: _to_cpu(buffers[name]) for name in sorted(self._saved_buffers)})
        return TrainingState(parameters, moments, self._optimizer_steps())

    def load_parameters(self, values: Mapping[str, Tensor]) -> None:
        """Set parameters and buffers from unpartitioned values; moments stay as they are."""
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                self._set(parameter, values[name], None)
            buffers = dict(self.module.named_buffers())
            for name in self._saved_buffers:
                buffers[name].copy_(values[name].to(buffers[name]))

    def load_state(self, state: TrainingState) -> None:
        """Continue from a state that was saved at any ZeRO stage and number of ranks."""
        self.load_parameters(state.parameters)
        with torch.no_grad():
            for name, parameter in self._trained().items():
                for moment in self._moments:
                    self._set(parameter, state.moments[f"{name}/{moment}"], moment)
        self._set_optimizer_steps(state.optimizer_steps)

    def working_parts(self) -> dict[str, Tensor]:
        """What this rank holds of each trained parameter, as the next forward uses it: all of it, at ZeRO 3 a flat part."""
        if self.stage < 3:
            return {name: parameter.data for name, parameter in self._trained().items()}
        return {name: parameter.ds_tensor.data for name, parameter in self._trained().items()}  # type: ignore[attr-defined]

    def own_part(self, name: str, whole: Tensor) -> Tensor:
        """The part of a whole tensor that `working_parts` would hold of the parameter with that name."""
        if self.stage < 3:
            return whole.to(self.device)
        return self._stage3_part(self._trained()[name], whole.to(self.device))

    def _trained(self) -> dict[str, nn.Parameter]:
        """Parameters that the optimiser has; the others (frozen blocks, what LoRA updates) never change."""
        return {name: parameter for name, parameter in self.module.named_parameters() if parameter.requires_grad}

    def _fixed(self, parameter: nn.Parameter) -> Tensor:
        """Value of a parameter that no optimiser has: DeepSpeed's safe_get_* know nothing of it."""
        if self.stage < 3:
            return _to_cpu(parameter)
        with import_deepspeed().zero.GatheredParameters([parameter]):
            return _to_cpu(parameter)

    def _set(self, parameter: nn.Parameter, value: Tensor, moment: str | None) -> None:
        value = value.to(self.device)
        if self.stage == 0 or (self.stage < 3 and not parameter.requires_grad):
            target = parameter if moment is None else self._base_optimizer.state[parameter][moment]
            target.copy_(value)
        elif self.stage == 3:
            self._set_stage3(parameter, value, moment)
        else:
            from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

            if moment is not None:
                safe_set_full_optimizer_state(parameter, value, moment)
            else:
                safe_set_full_fp32_param(parameter, value)
                parameter.copy_(value)  # the working copy: without this the first forward uses the old weights

    def _set_stage3(self, parameter: nn.Parameter, value: Tensor, moment: str | None) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        part = self._stage3_part(parameter, value)  # safe_set_full_* fails where the ranks do not divide the size
        if moment is not None:
            safe_set_local_optimizer_state(parameter, part, moment)
            return
        if parameter.requires_grad:
            safe_set_local_fp32_param(parameter, part)
        parameter.ds_tensor.copy_(part)  # type: ignore[attr-defined]  # what the next gather sends

    def _stage3_part(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This rank's part of a whole tensor, padded to what the ranks divide."""
        size, rank = parameter.ds_tensor.ds_numel, dist.get_rank()  # type: ignore[attr-defined]
        padded = torch.zeros(size * dist.get_world_size(), dtype=torch.float32, device=self.device)
        padded[: value.numel()] = value.flatten()
        return padded.narrow(0, rank * size, size)

    def restart_bias_correction(self, groups: Collection[int]) -> None:
        """Count the updates of parameter groups from zero: their moments are zero too, after epochs without a gradient.

        With the count of the frozen epochs Adam would not correct its young second moment, and the first updates
        would be several times the learning rate.
        """
        self._set_optimizer_steps([0 if i in groups else steps for i, steps in enumerate(self._optimizer_steps())])

    def _optimizer_steps(self) -> tuple[int, ...]:
        first = (self._base_optimizer.state[tensors[0]] for tensors in self._tensors_by_group())
        return tuple(int(state.get("step", 0)) for state in first)

    def _set_optimizer_steps(self, steps: Sequence[int]) -> None:
        for tensors, count in zip(self._tensors_by_group(), steps, strict=True):
            for tensor in tensors:
                state = self._base_optimizer.state[tensor]
                if "step" in state:
                    state["step"].fill_(count)

    def _initialise_moments(self) -> None:
        """Make the optimiser's state before its first step, zero as the optimiser would make it.

        DeepSpeed links the moments of parameters to the optimiser's after the first parameter group has stepped, when
        those of the other groups do not exist yet, and never again (ZeRO 1 and 2): their moments could not be saved.
        """
        fused = bool(self._base_optimizer.defaults.get("fused"))
        for tensors in self._tensors_by_group():
            for tensor in tensors:
                state = {moment: torch.zeros_like(tensor) for moment in self._moments}
                if self._moments:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device if fused else "cpu")
                self._base_optimizer.state[tensor] = state
        if self.stage in (1, 2):
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _tensors_by_group(self) -> list[list[Tensor]]:
        """What the torch optimiser steps, per parameter group: parameters, or this rank's flat parts of them."""
        groups = self._base_optimizer.param_groups
        if self.stage < 3:
            return [list(group["params"]) for group in groups]
        sharded = self._engine.optimizer
        flats: list[list[Tensor]] = [[] for _ in groups]
        for number, flat in enumerate(sharded.fp32_partitioned_groups_flat):
            flats[sharded.sub_group_to_group_id[number]].append(flat)
        return flats


def _set_timeout(timeout_s: float, group: dist.ProcessGroup) -> None:
    # Public from torch 2.15 on; before, only the private function of the same signature.
    set_timeout = getattr(dist.distributed_c10d, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    set_timeout(timedelta(seconds=timeout_s), group)


def _to_cpu(values: Tensor) -> Tensor:
    return values.detach().to("cpu", copy=True).contiguous()


def import_deepspeed() -> Any:
    """The module.

    Raises:
        EnvironmentFault: it cannot be imported.
    """
    try:
        import deepspeed
    except (ImportError, RuntimeError, OSError) as error:
        raise EnvironmentFault(f"deepspeed cannot be imported: {error}. Run `gigamil doctor` for the cure.") from error
    return deepspeed
