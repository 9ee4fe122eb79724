"""What torchrun, srun or our launcher say of this process in its environment. Nothing here imports torch."""

import os
import re

from lsag.errors import UsageError


def world_size_here() -> int:
    """How many of the ranks run on this machine."""
    per_node = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")
    return int(re.split(r"\D", per_node)[0] or 1)


def world_in_environment() -> tuple[int, int, int] | None:
    """(rank, world size, local rank) as set by torchrun or srun, None if they are not set. UsageError if incomplete."""
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK"]
    if os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1" and "RANK" not in os.environ:
        names = ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"]
    elif not any(os.environ.get(name) for name in names):
        return None
    missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UsageError(
            f"the environment has {next(name for name in names if os.environ.get(name))}, but not {', '.join(missing)}",
            "see docs/cluster.md, or unset all of them",
        )
    try:
        rank, size, local_rank = (int(os.environ[name]) for name in names)
    except ValueError as error:
        raise UsageError(
            f"one of {', '.join(names)} is not a number", "unset them, or let torchrun set them"
        ) from error
    if not 0 <= rank < size or local_rank < 0:
        raise UsageError(f"{names[0]} {rank} does not fit {names[1]} {size}", "unset them, or let torchrun set them")
    return rank, size, local_rank
