"""The processes of one training: which of them this is, and what they tell each other."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lsag.device import choose_device
from lsag.distributed.environment import world_in_environment
from lsag.distributed.launch import (
    LAUNCH_FOLDER,
    MEETING_SECONDS,
    STUCK_SECONDS,
    in_time,
    keep_alive,
    launched,
    leaving_when_stuck,
    report,
)
from lsag.errors import PeerLostError, UnavailableError, UsageError, first_line

TIMEOUT = timedelta(hours=2)
"""Timeout of a collective; long, because rank 0 may wait for disk space. The launcher notices a dead or silent rank."""


@dataclass(frozen=True)
class World:
    """This process, `rank` of `size`, and `local_rank` on its machine; by default the only one, on the CPU."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes and shows anything."""
        return self.rank == 0

    def total(self, **values: float) -> dict[str, float]:
        """The sum over all ranks of each value, in double precision, in one exchange."""
        sums = self.total_tensor(torch.tensor(list(values.values()), dtype=torch.float64))
        return dict(zip(values, sums.tolist(), strict=True))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.total(here=1)

    def total_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks of a CPU tensor."""
        if self.size == 1:
            return tensor
        tensor = tensor.to(self.device)
        with lost_peers():
            dist.all_reduce(tensor)
        return tensor.cpu()

    def from_main(self, value: Any) -> Any:
        """The value that rank 0 passed."""
        if self.size == 1:
            return value
        values = [value]
        with lost_peers():
            dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def share_buffers(self, model: torch.nn.Module) -> None:
        """Give every rank the buffers of rank 0's model, such as running statistics; DDP does so only before a step."""
        if self.size > 1:
            with lost_peers():
                for buffer in model.buffers():
                    dist.broadcast(buffer, 0)

    def check_equal(self, what: str, value: object) -> None:
        """UsageError on every rank unless all ranks passed the same value."""
        if self.size == 1:
            return
        everyone: list[object] = [None] * self.size
        with lost_peers():
            dist.all_gather_object(everyone, value)
        different = [rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]]
        if different:
            raise UsageError(f"rank {different[0]} has another {what} than rank 0", "start every rank in the same way")


SINGLE = World()


@contextmanager
def lost_peers() -> Iterator[None]:
    """Turn the error of a collective whose peer has gone into PeerLostError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or any(word in str(error).lower() for word in ("gloo", "nccl")):
            raise PeerLostError("another process of this training went away", "resume with --resume") from error
        raise


@contextmanager
def joined(
    device: str = "auto", meeting_seconds: int = MEETING_SECONDS, *, acknowledged: Callable[[], bool] = lambda: False
) -> Iterator[World]:
    """The world of this process, read from its environment, on `device`. All ranks must be there in `meeting_seconds`.

    One process of several leaves when it is stuck after SIGTERM, unless it has `acknowledged` the signal.
    """
    found = world_in_environment()
    rank, size, local_rank = found or (0, 1, 0)
    chosen = choose_device(device)
    if chosen.type == "cuda" and found:
        visible = torch.cuda.device_count()
        if chosen.index is not None and size > 1:
            raise UsageError(f"--device {chosen} is one GPU, this process is one of {size}", "use --device cuda")
        if visible > 1 and local_rank >= visible:
            raise UnavailableError(
                f"local rank {local_rank} has no GPU, {visible} are visible", "start fewer processes"
            )
        # A batch system may show each process only its own GPU.
        chosen = torch.device("cuda", 0 if visible == 1 else local_rank) if chosen.index is None else chosen
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)
    if size == 1:
        with keep_alive() if found else nullcontext():
            yield World(device=chosen)
        return
    if chosen.type not in ("cuda", "cpu"):
        raise UsageError(f"several processes cannot train on {chosen.type}", "use --device cpu or cuda")
    # On one machine the processes meet in a file that only their user can read; no port is opened.
    folder = os.environ.get(LAUNCH_FOLDER)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    with keep_alive(), leaving_when_stuck(acknowledged, last_words=partial(_report_stuck, rank)):
        try:
            if folder and os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
                store: dist.Store = dist.FileStore(str(Path(folder, f"store-{attempt}")), size)
            else:
                limit = timedelta(seconds=meeting_seconds)
                meet = partial(dist.rendezvous, "env://", rank, size, timeout=limit)
                store, _, _ = in_time(meeting_seconds, lambda: next(meet()))
            dist.init_process_group(
                "nccl" if chosen.type == "cuda" else "gloo",
                rank=rank,
                world_size=size,
                timeout=TIMEOUT,
                device_id=chosen if chosen.type == "cuda" else None,
                store=dist.PrefixStore(f"lsag-{attempt}", store),
            )
        except (RuntimeError, ValueError, TimeoutError) as error:
            raise UnavailableError(
                f"rank {rank} cannot meet the others: {first_line(error)}", "see docs/cluster.md"
            ) from error
        yield World(rank, size, local_rank, chosen)
        # Not after an error: a group that has lost a member may wait for it for ever.
        dist.destroy_process_group()


def _report_stuck(rank: int) -> None:
    if launched():
        what = f"rank {rank} did not finish its step within {STUCK_SECONDS} s of SIGTERM, and left without saving"
        report(what, "resume with --resume", 128 + signal.SIGTERM, consequence=True)
