"""The attention weights of a training: recorded in every validation, drawn from time to time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor

from nnunet_xattnres.common.errors import XAttnResError, one_line
from nnunet_xattnres.routing.drawing import draw_history, save_figure
from nnunet_xattnres.routing.recording import PICTURE, RECORD, RoutingHistory, ValidationRecorder
from nnunet_xattnres.training import variables

# Drawing may take this share of the training time. The time of one drawing is measured; this is the first estimate.
DRAWING_SHARE = 0.003
DRAWING_SECONDS = 1.0


class RoutingRecord:
    """Records the mean attention weights in the trainer's output folder, and sends them to its further loggers.

    An error while recording or drawing is a line in the training's log. It does not end the training. The log also says
    what recording costs, after the first epoch and after the last one.
    """

    def __init__(self, trainer: nnUNetTrainer) -> None:
        self.trainer = trainer
        self._started_at = self._drawn_at = monotonic()
        self._drawing_seconds = DRAWING_SECONDS
        self._seconds = 0.0
        self._cost_is_told = False

    def start_validation(self) -> None:
        with self._timed():
            trainer = self.trainer
            self.recorder = ValidationRecorder(trainer.network, trainer.device, trainer.num_iterations_per_epoch)

    def observe(self, data: Tensor) -> None:
        with self._timed(), self._logging_failure("recorded"):
            self.recorder.observe(data)

    def end_validation(self, writes: bool) -> None:
        """All processes of a distributed training take part. writes: whether this is the one that writes."""
        is_last = self.trainer.current_epoch + 1 >= self.trainer.num_epochs
        with self._timed():
            means = self.recorder.means()
            if not means or not writes:
                return
            with self._logging_failure("recorded"):
                history = self._record(means)
                with self._logging_failure("drawn"):
                    self._draw(history, is_last)
        if is_last or not self._cost_is_told:
            self._cost_is_told = True
            self.trainer.print_to_log_file(
                f"recording and drawing the attention weights has taken {self._seconds:.1f} s of "
                f"{monotonic() - self._started_at:.1f} s so far; {variables.RECORD}=false switches it off"
            )

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = monotonic()
        try:
            yield
        finally:
            self._seconds += monotonic() - start

    @contextmanager
    def _logging_failure(self, what: str) -> Iterator[None]:
        """what: what the attention weights were not, "recorded" or "drawn"."""
        try:
            yield
        except Exception as error:
            reason = one_line(f"{type(error).__name__}: {error}")
            self.trainer.print_to_log_file(
                f"the attention weights of epoch {self.trainer.current_epoch} are not {what} ({reason})"
            )

    def _record(self, means: dict[str, list[float | None]]) -> RoutingHistory:
        history, epoch = self._history(), self.trainer.current_epoch
        history.record(epoch, means)
        history.write(Path(self.trainer.output_folder, RECORD))
        for target, sources in history.sources.items():
            for source, weight in zip(sources, means[target], strict=True):
                if weight is not None:
                    for logger in self.trainer.logger.loggers:
                        logger.log(f"routing/{target}/{source}", weight, epoch)
        return history

    def _draw(self, history: RoutingHistory, is_last: bool) -> None:
        """Draw in the first and the last epoch, and otherwise if it takes little of the time since the last drawing."""
        start = monotonic()
        picture = Path(self.trainer.output_folder, PICTURE)
        is_cheap = self._drawing_seconds < DRAWING_SHARE * (start - self._drawn_at)
        if is_last or is_cheap or not picture.exists():
            save_figure(lambda: draw_history(history), picture)
            self._drawn_at = monotonic()
            self._drawing_seconds = self._drawn_at - start

    def _history(self) -> RoutingHistory:
        """The history in the output folder, or a new one. An unusable file is renamed."""
        path = Path(self.trainer.output_folder, RECORD)
        new = RoutingHistory(self.recorder.sources)
        if not path.exists():
            return new
        try:
            history = RoutingHistory.read(path)
            if history.sources != new.sources:
                raise XAttnResError(f"{path} is of another network")
        except XAttnResError as error:
            kept = os.fspath(path.with_suffix(".old.json"))
            os.replace(path, kept)
            self.trainer.print_to_log_file(f"{error}; it is kept as {kept}, and the record starts anew")
            return new
        return history
