"""A watcher for the tests: it keeps what it is told."""

from jobs.train.metrics import EvalMetrics, StepMetrics


class RecordingWatcher:
    """told: what each call was told, in order. fails_at_step: step() raises there, told nothing."""

    def __init__(self, fails_at_step: int = 0) -> None:
        self.told: list[object] = []
        self._fails_at_step = fails_at_step

    def started(self, total_steps: int, first_step: int, description: str) -> None:
        self.told.append((total_steps, first_step, description))

    def step(self, metrics: StepMetrics) -> None:
        if metrics.step == self._fails_at_step:
            raise ConnectionError("the other side\nis away")
        self.told.append(metrics)

    def evaluated(self, metrics: EvalMetrics) -> None:
        self.told.append(metrics)

    def note(self, text: str) -> None:
        self.told.append(text)

    def ended(self, status: str) -> None:
        self.told.append(status)
