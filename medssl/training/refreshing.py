"""When a method looks at the whole training set, and what follows from it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol, runtime_checkable

from torch.optim import Optimizer

from medssl.core.types import Ints, Method
from medssl.training.embedding import embed_table
from medssl.training.source import BatchSource, Sampler


@runtime_checkable
class ClusterSampler(Protocol):
    """A sampler that can follow pseudo-labels (`medssl.samplers.ClusterBalancedSampler`)."""

    def with_clusters(self, labels: Ints) -> Sampler:
        """The same sampler on these labels ``(heads, n)``, in the order of the training table."""


class Refreshes:
    """The refreshes of a training.

    With a budget in steps they come exactly before the steps that the method names. With one in seconds the number of
    steps is estimated anew before each step from the share of time that is spent, and a refresh is due as soon as more
    of the method's steps have passed than were refreshed at. When several have passed at once, one refresh serves
    them all: nothing was learnt between them.

    Args:
        method: What is trained; told its ``steps_per_epoch`` here.
        source: Gets the sampler that follows the method's clusters.
        optimizer: Forgets what it knew of weights that a refresh drew anew.
        steps: The budget; None: it is in seconds.
    """

    def __init__(self, method: Method, source: BatchSource, optimizer: Optimizer, steps: int | None) -> None:
        self.method, self.source, self.optimizer = method, source, optimizer
        self.sampler = source.sampler
        method.steps_per_epoch = max(1, len(source.reader.table) // source.sampler.batch_size)
        self._planned = None if steps is None else self._ask(steps)

    def due(self, step: int, share: float) -> int:
        """How many refreshes belong before ``step`` or an earlier one.

        Args:
            step: About to be done.
            share: Of the budget that is spent before it, in [0, 1].
        """
        planned = self._planned
        if planned is None:
            # Before the first step nothing is known of its length: one epoch then stands for the whole training.
            planned = self._ask(max(1, round(step / share)) if step and share > 0 else self.method.steps_per_epoch)
        return sum(at <= step for at in planned)

    def next(self, step: int) -> int | None:
        """The first later step with a refresh; None: there is none, or nobody can know."""
        return min((at for at in self._planned or () if at > step), default=None)

    def run(self) -> None:
        """Refresh: embed everything, forget the optimiser state of what was drawn anew, follow the new clusters."""
        self.source.reset()  # batches prepared ahead are of another sampler
        self.method.refresh(lambda: embed_table(self.method, self.source))
        self.method.train()
        for weight in self.method.reinitialised():
            self.optimizer.state.pop(weight, None)
        self.follow()

    def follow(self) -> None:
        """Let the sampler follow the method's clusters as they are now, after a refresh or from a checkpoint."""
        labels = self.method.clusters()
        if labels is not None and isinstance(self.sampler, ClusterSampler):
            self.source.replace_sampler(self.sampler.with_clusters(labels))

    def _ask(self, steps: int) -> Collection[int]:
        return frozenset(int(at) for at in self.method.refresh_steps(steps))
