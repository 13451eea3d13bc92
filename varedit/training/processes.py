"""One process or many: who we are, sums over all, and sharding of the transformer (FSDP2).

Several processes are started by torchrun. A step's gradient is the sum over micro-batches, in the same order of
additions whichever process computed them (up to how a reduction of more than two terms is grouped).
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

_BUCKET_ELEMENTS = 1 << 24  # 64 MiB of float32: large enough for the network, small beside the model


@dataclass(frozen=True)
class Processes:
    """This process among all of a run.

    Attributes:
        rank: from 0; count: of all; device: what this one computes on.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.count > 1:
            dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over all processes. For replicas only: FSDP2 does it by itself."""
        if self.count == 1:
            return
        waiting: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            waiting.append(parameter.grad)
            if sum(grad.numel() for grad in waiting) >= _BUCKET_ELEMENTS:
                _sum_together(waiting)
                waiting = []
        if waiting:
            _sum_together(waiting)


def _sum_together(gradients: Sequence[Tensor]) -> None:
    flat = torch.cat([grad.flatten() for grad in gradients])
    dist.all_reduce(flat)
    for grad, part in zip(gradients, flat.split([grad.numel() for grad in gradients])):
        grad.copy_(part.view_as(grad))


@contextlib.contextmanager
def joined(device: str = "auto") -> Iterator[Processes]:
    """Join the processes that torchrun started, or be the only one; leave at the end.

    Raises:
        ValueError: the device is not there.
    """
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise ValueError("config field device is cuda, but PyTorch finds no CUDA device; set device to cpu or auto")
    count, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
    if count == 1:
        yield Processes(0, 1, place)
        return
    # Checkpoints are gathered over gloo. The first process may take its time over samples.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=1))
    try:
        yield Processes(rank, count, place)
    finally:
        dist.destroy_process_group()


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it, unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a possibly sharded tensor; every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_transformer(transformer: nn.Module, processes: Processes, bfloat16: bool) -> None:
    """Shard a `VAREditTransformer` over all processes: FSDP2, one group a block and one for the rest.

    The linear layers of a block are one group: a block's parts are called one by one, so that hooks on the block
    itself would not run. They are gathered in bfloat16 where autocast would round them anyway; the rest (tables, norms,
    modulation, head) stays float32.
    """
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    block_policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bfloat16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in transformer.blocks:
        attention, cross = block.self_attention, block.cross_attention
        # In the order of their calls: the group is freed after the last one.
        parts = [attention.to_qkv, cross.to_kv, attention.proj, cross.to_q, cross.proj, block.mlp]
        fully_shard(parts, mesh=mesh, mp_policy=block_policy)
    fully_shard(transformer, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))


def is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def set_gradient_sync(module: nn.Module, wanted: bool) -> None:
    """Whether the next backward pass of a sharded module reduces gradients, or keeps them for the next one."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(wanted)
