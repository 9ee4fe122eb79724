"""How a training is run: all that its preset does not say. A run keeps it, so that its name is enough to resume it."""

import json
import os
import shlex
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lsag.config import Precision, Recompute
from lsag.distributed.launch import MEETING_SECONDS
from lsag.errors import DamagedError, UsageError
from lsag.files import read_bytes
from lsag.runs import OPTIONS


class TrainOptions(BaseModel):
    """What `lsag.training.loop.train` takes beside a preset. Paths may be strings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    out: Path
    """The run folder: new or empty, or with `resume` one that holds a run of the same preset."""
    data_dir: Path
    """Where the dataset is, or is downloaded to."""
    device: str = "auto"
    workers: Annotated[int, Field(ge=0)] | None = None
    """Processes that prepare images; None chooses by the machine. It changes no result."""
    download: bool = True
    skip_broken: bool = False
    """Train on another image in place of one that cannot be read."""
    resume: bool = False
    """Resume the run in `out`, if there is one, as if it had never stopped."""
    allow_change: tuple[str, ...] = ()
    """Settings in which a resumed run may differ from its preset, and "data" for other images."""
    init_from: Path | None = None
    """A checkpoint whose weights are the first ones: fine-tuning."""
    reset_head: bool = False
    """With `init_from`: begin with a new classifier."""
    accum: Annotated[int, Field(ge=1)] = 1
    """Gradient-accumulation steps: the slices into which each process cuts its part of a batch."""
    precision: Precision = "auto"
    compile: bool = False
    """Compile the model in place."""
    recompute: Recompute = "none"
    """Keep fewer activations, of the local block or of all blocks, and compute them again in the backward."""
    deterministic: bool = False
    """Allow only operations that give the same bits every time."""
    rdzv_timeout: Annotated[int, Field(ge=1, le=86_400)] = MEETING_SECONDS
    """Seconds within which all processes must meet."""
    save_minutes: Annotated[float, Field(ge=0)] = 5.0
    save_retry_minutes: Annotated[float, Field(ge=0)] = 30.0
    """How long a checkpoint that cannot be written is tried again."""

    NOT_KEPT: ClassVar[set[str]] = {"out", "resume", "allow_change", "init_from", "reset_head"}
    """Fields that concern one start of a run, and are not kept in it."""

    def __init__(self, **values: Any) -> None:
        """UsageError, in one line, for values that are not possible."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = (f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
            raise UsageError("; ".join(problems), "see lsag.training.options.TrainOptions") from error

    @property
    def resume_command(self) -> str:
        """The command that resumes this run; the run itself says the rest."""
        return shlex.join(["lsag", "train", "--resume", str(self.out)])

    def to_keep(self) -> bytes:
        """The content of a run's options file."""
        kept = self.model_copy(update={"data_dir": self.data_dir.absolute()}).model_dump(exclude=self.NOT_KEPT)
        return json.dumps(kept, indent=2, default=str).encode() + b"\n"

    @classmethod
    def kept_in(cls, out: Path) -> dict[str, Any]:
        """The fields that the run in `out` keeps; none if it is older than its options file, or not there.

        InputError if the file cannot be read, DamagedError if it does not hold them.
        """
        path = out / OPTIONS
        if not os.path.lexists(path):
            return {}
        content = read_bytes(path, what="options")
        try:
            values = json.loads(content)
            names = cls.model_fields.keys() & values.keys() - cls.NOT_KEPT
            found = cls(**{"out": out, "data_dir": out} | {name: values[name] for name in names})
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            reason = error.what if isinstance(error, UsageError) else error
            raise DamagedError(f"{path} is damaged: {reason}", "remove it, and give the run's options again") from error
        return {name: getattr(found, name) for name in names}
