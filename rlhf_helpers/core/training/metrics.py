"""Means of metrics over the micro-batches and processes of a step."""

from collections.abc import Mapping

import torch

from rlhf_helpers.core.tensors import require_shapes
from rlhf_helpers.core.training.engine import Engine


class MeanMetrics:
    """Weighted means: sum(weights x values) / sum(weights) for each name, whatever the sizes of the parts."""

    def __init__(self) -> None:
        """Start with no metric."""
        self._totals: dict[str, list[float]] = {}

    def add(
        self,
        losses: torch.Tensor,
        metrics: Mapping[str, torch.Tensor],
        weights: torch.Tensor | float = 1.0,
    ) -> None:
        """Add one micro-batch: losses and metrics of one shape, per row or per token, and their weights.

        A row whose entry in a metric is NaN does not count in that metric: mark only rows that cannot have
        it, since a diverged value is left out as well. A NaN loss counts, and shows.

        Raises:
            ValueError: the shapes of losses and weights differ.
        """
        weights = weights * torch.ones_like(losses)
        require_shapes("...", weights=weights, loss=losses)
        self._add("loss", losses, weights)
        for name, values in metrics.items():
            counts = ~values.isnan()
            self._add(name, values[counts], weights[counts])

    def _add(self, name: str, values: torch.Tensor, weights: torch.Tensor) -> None:
        total = self._totals.setdefault(name, [0.0, 0.0])
        total[0] += (values.detach() * weights).sum().item()
        total[1] += weights.sum().item()

    def means(self, engine: Engine | None = None) -> dict[str, float]:
        """Return name -> mean, over all processes where an engine is given; no entry for a weight of 0."""
        if engine is not None and engine.accelerator.num_processes > 1:
            self._totals = {name: [engine.sum(x) for x in total] for name, total in self._totals.items()}
        return {name: total / weight for name, (total, weight) in self._totals.items() if weight}
