"""Which rows go through the model together: by length, by epoch, by micro-batch and by process."""

from collections.abc import Callable, Iterator

import numpy as np

from rlhf_helpers.core.training.engine import Engine

WINDOW = 16  # batches whose rows are sorted by length together


def epoch_batches(lengths: np.ndarray, size: int, *, seed: list[int]) -> list[np.ndarray]:
    """Cut a seeded permutation of the rows into batches of `size`; the last one may be smaller.

    The rows of 16 batches at a time are sorted by length before the cut, and the batches are shuffled after
    it: little padding, and still a random order.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), WINDOW * size):
        window = order[start : start + WINDOW * size]
        window = window[np.argsort(lengths[window], kind="stable")]
        batches += [window[first : first + size] for first in range(0, len(window), size)]
    return [batches[index] for index in rng.permutation(len(batches))]


def offline_steps(
    engine: Engine, lengths_of: Callable[[int], np.ndarray], size: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (epoch, indices) for every step that is still to do: the loop of all training on fixed data.

    indices: of the `size` rows of this optimizer step, over all micro-batches and processes. The order is a
    function of (seed, epoch) alone, so a resumed run sees the batches that it would have seen.

    Args:
        lengths_of: epoch -> tokens of each row; every epoch has as many rows as the first.
    """
    steps_per_epoch = -(-len(lengths_of(0)) // size)
    planned_epoch = None
    for step in engine.steps():
        epoch, batch_index = divmod(step, steps_per_epoch)
        if epoch != planned_epoch:
            seed = [engine.settings.seed, epoch]
            batches = epoch_batches(lengths_of(epoch), size, seed=seed)
            planned_epoch = epoch
        yield epoch, batches[batch_index]


def micro_batches(
    engine: Engine, indices: np.ndarray, *, same_rows_everywhere: bool = True
) -> Iterator[tuple[np.ndarray, float]]:
    """Split the rows of an optimizer step into micro-batches, and each of them over the processes.

    Yields (indices of this process's rows, row_weight 1.0). In a small last batch a process may be left
    without a row: it then gets (the index of another's row, row_weight 0.0) and must multiply its loss by
    that 0, because with sharded weights every process has to make the same forward calls.

    Args:
        indices: of the batch's rows.
        same_rows_everywhere: every process holds the same indices and takes its part of them. False: each
            process has rows of its own and takes all of them.
    """
    process, processes = engine.accelerator.process_index, engine.accelerator.num_processes
    if not same_rows_everywhere:
        process, processes = 0, 1
    for part in np.array_split(indices, engine.settings.accumulation_steps):
        local = part[process::processes]
        yield (local, 1.0) if len(local) else (indices[:1], 0.0)
