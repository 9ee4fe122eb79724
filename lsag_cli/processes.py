"""Which devices a training gets, and whether it runs here, starts ranks, or is one of them."""

import hashlib
import os
import secrets
import subprocess
import sys
from typing import Annotated, Literal

from pydantic import Field

from lsag.distributed.environment import world_in_environment, world_size_here
from lsag.distributed.launch import launch, launched
from lsag.errors import UnavailableError, UsageError
from lsag.runs import check_run_folder, step_files
from lsag.training.options import TrainOptions
from lsag_cli.options import loading


class TrainCommand(TrainOptions):
    """The options of `lsag train`: those of a training, and how its processes are started."""

    gpus: Annotated[str, Field(max_length=100)] | None = None
    procs: Annotated[int, Field(ge=1)] | None = None
    nodes: Annotated[int, Field(ge=1)] = 1
    rdzv_endpoint: str | None = None
    max_restarts: Annotated[int, Field(ge=0)] = 0
    log_to: tuple[Literal["wandb", "mlflow", "tensorboard"], ...] = ()
    log_id: str = Field(default_factory=lambda: secrets.token_hex(8))
    """By which trackers know the run again when it is resumed."""

    NOT_KEPT = TrainOptions.NOT_KEPT | {"nodes", "rdzv_endpoint"}

    @property
    def resume_command(self) -> str:
        """As of TrainOptions; machines meet anew for each start."""
        meeting = f" --nodes {self.nodes} --rdzv-endpoint {self.rdzv_endpoint}" if self.nodes > 1 else ""
        return super().resume_command + meeting

    def with_kept(self, given: set[str]) -> "TrainCommand":
        """These options, with those that were not `given` as the run keeps them.

        A run that saved nothing keeps nothing. Another device or number of processes replaces all that concerns them,
        torchrun or srun brings processes of its own, and $LSAG_DATA counts as given.
        """
        if not step_files(self.out):
            return self
        given = given | ({"data_dir"} if os.environ.get("LSAG_DATA") else set())
        if given & {"device", "gpus", "procs"}:
            given |= {"gpus", "procs"} | ({"device"} if "gpus" in given else set())
        if world_in_environment() and not launched():
            given |= {"gpus", "procs", "max_restarts"}
        kept = self.kept_in(self.out)
        return self.model_copy(update={name: value for name, value in kept.items() if name not in given})


def place(gpus: str | None, device: str, procs: int | None, *, planned: bool = False) -> tuple[str, int]:
    """The device and the number of processes on this machine that `--gpus`, `--device` and `--procs` ask for.

    GPUs that are listed become the visible ones. UsageError for a contradiction, UnavailableError for GPUs that are not
    there, unless the training is only `planned`.
    """
    if procs is not None:
        if device != "cpu" or gpus not in (None, "0"):
            raise UsageError("--procs is for the CPU", "add --device cpu, or use --gpus")
        return device, procs
    if gpus is None:
        return device, 1
    kind = device.partition(":")[0]
    numbers = gpus.rstrip(",").split(",")
    if gpus != "all" and not all(number.isdecimal() and len(number) < 100 for number in numbers):
        raise UsageError(f"--gpus {gpus} is not a number of GPUs", "for example --gpus 2, --gpus all, or --gpus 0,2")
    if gpus == "0" and kind in ("auto", "cpu"):
        return "cpu", 1
    if kind not in ("auto", "cuda") or gpus == "0" or ":" in device:
        raise UsageError(f"--gpus {gpus} contradicts --device {device}", "give one of them")
    if launched():  # the launcher has made these GPUs the visible ones
        return "cuda", int(os.environ["LOCAL_WORLD_SIZE"])
    if planned and gpus != "all":
        return "cuda", len(set(numbers)) if "," in gpus else int(gpus)
    chosen = choose_gpus(gpus, numbers)
    if "," in gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(
            visible[int(index)] if visible != [""] else index for index in chosen
        )
    return "cuda", len(chosen)


def lsag_command() -> list[str]:
    """The start of a command line that runs `lsag` as it runs here: with the interpreter, its flags and its path.

    `python -m lsag_cli` would put the current folder first on the path, and run a queue.py that happens to be in it.
    """
    start = f"import sys; sys.path[:] = {sys.path}; from lsag_cli.__main__ import main; main()"
    return [sys.executable, *subprocess._args_from_interpreter_flags(), "-c", start]  # type: ignore[attr-defined]


def choose_gpus(gpus: str, numbers: list[str]) -> list[str]:
    """The indices of the GPUs that `--gpus N|all|0,2` asks for. UnavailableError for one that is not there."""
    with loading():
        import torch

    found = torch.cuda.device_count()
    chosen = [str(index) for index in range(found)] if gpus == "all" else numbers
    if gpus != "all" and "," not in gpus:
        chosen = [str(index) for index in range(min(int(gpus), found + 1))]
    if not chosen or max(map(int, chosen)) >= found:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hint = f" (CUDA_VISIBLE_DEVICES={visible!r})" if visible is not None else ""
        what = f"asked for GPUs {gpus}" if "," in gpus else f"asked for {gpus} GPUs"
        raise UnavailableError(
            f"{what}, found {found}{hint}", f"use --gpus {found}" + (" to train on the CPU" if not found else "")
        )
    if len(set(chosen)) != len(chosen):
        raise UsageError(f"--gpus {gpus} names a GPU twice", "name each once")
    return chosen


def join_or_launch(options: TrainCommand, *, processes: int, arguments: list[str]) -> int | None:
    """The rank of this process if it is to train; None once the ranks that it started have ended.

    `arguments` are added to those of this command for the ranks. UsageError if the environment makes this process one
    of several and the options ask for others.
    """
    several = processes > 1 or options.nodes > 1 or options.max_restarts > 0
    # In a job of SLURM, --nodes means that one task on each node launches the others.
    world = None if options.nodes > 1 and "RANK" not in os.environ else world_in_environment()
    if world is None and not several:
        return 0
    if world is None:
        if options.max_restarts and not options.resume:
            if options.nodes > 1:
                raise UsageError("--max-restarts on several machines needs --resume", "add it; it also starts a run")
            check_run_folder(options.out, resume=False)
            arguments = [*arguments, "--resume"]  # starts the run, and resumes it after a restart
        with loading():
            import torch.distributed.launcher.api  # noqa: F401  which launch uses

        launch(
            [*lsag_command(), *sys.argv[1:], *arguments],
            processes=processes,
            nodes=options.nodes,
            endpoint=options.rdzv_endpoint,
            meeting_seconds=options.rdzv_timeout,
            # torch makes a folder of that name.
            run_id="lsag-" + hashlib.blake2b(os.fsencode(options.out), digest_size=8).hexdigest(),
            max_restarts=options.max_restarts,
            fix=f"resume with: {options.resume_command}",
        )
        return None
    rank, size, _ = world
    contradiction = options.nodes > 1 or options.max_restarts or processes != world_size_here()
    if several and contradiction and not launched():
        raise UsageError(
            f"RANK or SLURM_PROCID says that this is one of {size} processes, {world_size_here()} of them here",
            "remove --gpus, --procs, --nodes and --max-restarts",
        )
    return rank
