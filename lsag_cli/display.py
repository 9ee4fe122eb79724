"""What a person sees of a training while it runs."""

import sys
import time
from typing import TYPE_CHECKING

from lsag_cli.output import is_terminal, mega, note, percent, stderr

if TYPE_CHECKING:
    from lsag.training.events import Epoch, Started, Step

DROP = ("lr", "data wait", "memory", "step", "speed", "epoch", "top-1")
"""What leaves the line of a step first on a narrow terminal."""
BAR_WIDTH = 12
"""Columns of a terminal that the bar keeps."""
LINE_SECONDS = 60
"""Time between two lines of progress if stderr is not a terminal."""


class Display:
    """Progress of a training on stderr: a live bar on a terminal, else a plain line for each epoch and each minute."""

    def __init__(self, started: "Started") -> None:
        self.epochs, self.steps = started.preset.train.epochs, started.steps_per_epoch
        self.begin, self.first_step, self.accuracy = time.monotonic(), started.first_step, "-"
        self.next_line = self.begin + LINE_SECONDS
        cut = (
            "" if started.slice_size == started.preset.train.batch_size else f", {started.slice_size} images at a time"
        )
        note(
            f"{started.preset.name}: {mega(started.parameters)} parameters on "
            f"{f'{started.ranks} x ' if started.ranks > 1 else ''}{started.device}{cut}, "
            f"{started.train_images:,} training and {started.eval_images:,} evaluation images, "
            f"{counted(self.epochs, 'epoch')} of {counted(self.steps, 'step')}; writing to {started.out}"
        )
        for line in started.notes:
            note(line)
        self.bar = None
        if is_terminal(sys.stderr):
            from rich.progress import BarColumn, Progress, TextColumn

            text, bar = TextColumn("{task.description}"), BarColumn(bar_width=None)
            self.bar = Progress(text, bar, console=stderr(), transient=True, expand=True)
            self.task = self.bar.add_task("starting", total=self.epochs * self.steps, completed=self.first_step)
            self.bar.start()

    def step(self, event: "Step") -> None:
        done = (event.epoch - 1) * self.steps + event.step
        parts = {
            "epoch": f"epoch {event.epoch}/{self.epochs}",
            "step": f"step {event.step}/{self.steps}",
            "loss": f"loss {event.loss:.3f}",
            "lr": f"lr {event.lr:.1e}",
            "top-1": f"last top-1 {self.accuracy}",
            "speed": f"{event.images_per_second:,.0f} img/s",
            "data wait": f"data wait {100 * event.data_wait:.0f} %",
            "memory": f"{event.memory / 2**30:.1f} GiB",
            "left": f"{self.left(done)} left",
        }
        if self.bar:
            for name in DROP:
                if len("  ".join(parts.values())) > self.bar.console.width - BAR_WIDTH:
                    del parts[name]
            self.bar.update(self.task, completed=done, description="  ".join(parts.values()))
        elif time.monotonic() > self.next_line:
            note("  ".join(parts.values()))
            self.next_line = time.monotonic() + LINE_SECONDS

    def epoch(self, event: "Epoch") -> None:
        self.accuracy = percent(event.top1)
        line = (
            f"epoch {event.epoch}/{self.epochs}  loss {event.train_loss:.3f}  eval loss {event.eval_loss:.3f}  "
            f"top-1 {self.accuracy}  {event.images_per_second:,.0f} img/s"
        )
        if self.bar:
            self.bar.console.print(line)
        else:
            note(f"{line}  data wait {100 * event.data_wait:.0f} %  {self.left(event.epoch * self.steps)} left")
            self.next_line = time.monotonic() + LINE_SECONDS

    def left(self, steps_done: int) -> str:
        """The time that remains at the speed so far."""
        elapsed, done = time.monotonic() - self.begin, max(steps_done - self.first_step, 1)
        return duration(elapsed / done * (self.epochs * self.steps - steps_done))

    def close(self) -> None:
        if self.bar:
            self.bar.stop()


def counted(number: int, noun: str) -> str:
    """1, "slice" -> "1 slice"; 2, "slice" -> "2 slices"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def duration(seconds: float) -> str:
    """75 -> '1 min 15 s'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
