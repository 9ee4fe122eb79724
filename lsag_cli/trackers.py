"""Experiment trackers: they get the figures of a training, and can neither stop nor delay it."""

import hashlib
import importlib
import importlib.util
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType

from lsag.config import flatten
from lsag.errors import UnavailableError, UsageError, first_line
from lsag.training.events import Epoch, Finished, Progress, Started, Step
from lsag_cli.output import status

STEP_FIGURES = ("loss", "lr", "images_per_second", "data_wait")
EPOCH_FIGURES = ("train_loss", "eval_loss", "top1", "top5")
FINISH_SECONDS, STOP_SECONDS = 30, 5
"""How long trackers may take to send the rest after a complete training, and after one that was stopped or failed."""
QUIET = {
    "MLFLOW_CONFIGURE_LOGGING": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_FILE_STORE": "true",  # MLflow wants to be told that its store in files is meant
    "WANDB_ERROR_REPORTING": "false",
}
"""Environment variables of the trackers, where the user has not set them."""

logger = logging.getLogger(__name__)


class Tracker(threading.Thread):
    """A tracker in a thread of its own. If it fails, one warning says so, and the training continues without it."""

    def __init__(self, kind: str, started: Started, log_id: str) -> None:
        super().__init__(name=kind, daemon=True)
        self.started, self.log = started, LOGS[kind]
        self.folder = started.out.resolve()
        self.id = hashlib.blake2b(os.fsencode(f"{log_id} {self.folder.name}"), digest_size=8).hexdigest()
        """The same for each start of a run; a copy of its folder under another name is another run."""
        self.finished = False
        self.events: queue.SimpleQueue[Progress | None] = queue.SimpleQueue()
        self.start()

    def add(self, event: Progress | None) -> None:
        """Hand over what the training reports; None once it has ended."""
        if self.is_alive():
            self.events.put(event)

    def figures(self, *, after_step: int = 0, after_epoch: int = 0) -> Iterator[tuple[str, int, dict[str, float]]]:
        """What the training reports until it ends: "train", a step of the run and values by name, or "epoch" and so on.

        Steps up to `after_step` and epochs up to `after_epoch` are left out.
        """
        for event in iter(self.events.get, None):
            if isinstance(event, Step):
                step = (event.epoch - 1) * self.started.steps_per_epoch + event.step
                if step > after_step:
                    yield "train", step, {f"train/{name}": getattr(event, name) for name in STEP_FIGURES}
            elif isinstance(event, Epoch) and event.epoch > after_epoch:
                yield "epoch", event.epoch, {f"epoch/{name}": getattr(event, name) for name in EPOCH_FIGURES}
            self.finished = isinstance(event, Finished)

    def run(self) -> None:
        try:
            self.log(self)
        except BaseException as error:
            logger.warning("%s: %s; nothing more is logged there", self.name, first_line(error))


def log_to_tensorboard(tracker: Tracker) -> None:
    """A run that is resumed drops what was written of later steps."""
    from torch.utils.tensorboard import SummaryWriter

    first_step = tracker.started.first_step
    with SummaryWriter(tracker.folder / "tensorboard", purge_step=first_step + 1 if first_step else None) as writer:
        for _, x, values in tracker.figures():
            for name, value in values.items():
                writer.add_scalar(name, value, x)


def log_to_wandb(tracker: Tracker) -> None:
    """A run that is resumed continues the one with its id, after what was logged of it."""
    import wandb

    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "lsag",
            id=tracker.id,
            name=tracker.folder.name,
            resume="allow",
            dir=os.environ.get("WANDB_DIR") or tracker.folder,
            config=tracker.started.preset.model_dump(mode="json"),
            allow_val_change=True,
        )
        run.define_metric("epoch/*", step_metric="epoch")
        for kind, x, values in tracker.figures(after_step=run.step - 1, after_epoch=run.summary.get("epoch", 0)):
            if kind == "train":
                run.log(values, step=x)
            else:
                run.log(values | {"epoch": x})
        run.finish(exit_code=0 if tracker.finished else 1)
    finally:
        wandb.teardown()


def log_to_mlflow(tracker: Tracker) -> None:
    """A run that is resumed continues the one with its tag, after what was logged of it."""
    import mlflow

    if not os.environ.get("MLFLOW_TRACKING_URI"):
        mlflow.set_tracking_uri((tracker.folder / "mlruns").as_uri())
    if not os.environ.get("MLFLOW_EXPERIMENT_ID"):
        os.environ.setdefault("MLFLOW_EXPERIMENT_NAME", "lsag")
    known = mlflow.search_runs(filter_string=f"tags.`lsag.id` = '{tracker.id}'", max_results=1, output_format="list")
    run_id, last_step, last_epoch = None, 0, 0
    if known:
        run_id, client = known[0].info.run_id, mlflow.MlflowClient()
        last_step, last_epoch = (
            max((figure.step for figure in client.get_metric_history(run_id, name)), default=0)
            for name in ("train/lr", "epoch/top1")
        )
    mlflow.start_run(run_id, run_name=tracker.folder.name, tags={"lsag.id": tracker.id})
    if not known:
        mlflow.log_params(flatten(tracker.started.preset.model_dump(mode="json")))
    for _, x, values in tracker.figures(after_step=last_step, after_epoch=last_epoch):
        mlflow.log_metrics(values, step=x)
    mlflow.end_run("FINISHED" if tracker.finished else "KILLED")


LOGS: dict[str, Callable[[Tracker], None]] = {
    "wandb": log_to_wandb,
    "mlflow": log_to_mlflow,
    "tensorboard": log_to_tensorboard,
}
"""By the name of the tracker, which is also that of its package and of the extra that installs it."""


def chosen(kinds: Iterable[str]) -> tuple[str, ...]:
    """Each of the trackers once; "none", which stands alone, is none of them. UsageError for others."""
    names = tuple(dict.fromkeys(kinds))
    if names == ("none",):
        return ()
    for name in names:
        if name not in LOGS:
            raise UsageError(
                f"--log-to '{name}' is not possible here", f"choose from {', '.join(LOGS)}; or none, alone"
            )
    return names


def check_installed(kinds: Iterable[str]) -> None:
    """UnavailableError for a tracker whose package is not installed."""
    for kind in kinds:
        found = importlib.util.find_spec(kind)
        if found is None or found.origin is None:  # a folder of that name is no package
            raise UnavailableError(f"the package {kind} is not installed", f"pip install 'lsag[{kind}]'")


def load(kinds: Sequence[str]) -> None:
    """Import the packages. UnavailableError for one that cannot be, and for wandb where nobody has logged in."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if kinds:
        threading.excepthook = lambda args: None  # their own threads would print tracebacks; Tracker.run hears of it
    for kind in kinds:
        try:
            module = importlib.import_module(kind)
            ready = kind != "wandb" or wandb_is_ready(module)
        except Exception as error:
            raise UnavailableError(f"{kind} cannot be used: {error}", f"fix that, or omit --log-to {kind}") from error
        if not ready:
            raise UnavailableError("wandb is not logged in", "run wandb login, or set WANDB_MODE=offline")


def wandb_is_ready(wandb: ModuleType) -> bool:
    """Whether wandb may log without asking anything; from now on it is silent, and ends in time."""
    quiet = wandb.Settings(silent=True, console="off", finish_timeout=FINISH_SECONDS - 5, finish_timeout_raises=True)
    settings = wandb.setup(quiet).settings
    return settings.mode in ("offline", "dryrun", "disabled") or wandb.login(verify=False, prompt=False)


def close(trackers: Sequence[Tracker], *, finished: bool) -> None:
    """Let the trackers end; a warning names one that takes too long."""
    seconds = FINISH_SECONDS if finished else STOP_SECONDS
    end = time.monotonic() + seconds
    for tracker in trackers:
        tracker.add(None)
    for tracker in trackers:
        with status(f"waiting for {tracker.name}"):
            tracker.join(max(0.0, end - time.monotonic()))
        if tracker.is_alive():
            logger.warning("%s did not end within %d s, and may lack the last figures", tracker.name, seconds)


def stuck() -> bool:
    """Whether a tracker did not end: what its package does when Python exits might then take as long."""
    return any(isinstance(thread, Tracker) for thread in threading.enumerate())
