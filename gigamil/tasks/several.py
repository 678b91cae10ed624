"""Several targets of the same slides at once: one encoder and aggregator, the outputs of all tasks side by side.

Shapes: as in task.py; T tasks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gigamil.tasks.task import Task


class Part(NamedTuple):
    """One of several tasks, and where its numbers are.

    Attributes:
        outputs, targets, values: of all outputs, targets and predicted numbers those of this task.
    """

    name: str
    task: Task
    outputs: slice
    targets: slice
    values: slice


@dataclass(frozen=True)
class Several(Task):
    """Tasks that are learned together: the loss is the mean of theirs, by their weights.

    Each task's loss is a mean over the slides of which its own target is known. In a step in which a task knows nothing of any
    slide the others share its weight.

    Args:
        names: of the tasks, all different; in front of what they predict.
        tasks: the first chooses the best epoch.
        shares: weights of their losses, above 0.
    """

    names: tuple[str, ...]
    tasks: tuple[Task, ...]
    shares: tuple[float, ...]

    @property
    def couples_slides(self) -> bool:  # type: ignore[override]
        """One of them does."""
        return any(task.couples_slides for task in self.tasks)

    @property
    def num_outputs(self) -> int:
        """Of all of them."""
        return sum(task.num_outputs for task in self.tasks)

    @property
    def num_shown(self) -> int:
        """Of the first."""
        return self.tasks[0].num_shown

    @property
    def num_targets(self) -> int:
        """Of all of them."""
        return sum(task.num_targets for task in self.tasks)

    @property
    def predicted_names(self) -> tuple[str, ...]:
        """Of all of them, with the name of the task in front."""
        return tuple(f"{part.name}_{name}" for part in self.parts() for name in part.task.predicted_names)

    def parts(self) -> Iterator[Part]:
        """The tasks, and where their numbers are."""
        outputs = targets = values = 0
        for name, task in zip(self.names, self.tasks, strict=True):
            ends = outputs + task.num_outputs, targets + task.num_targets, values + len(task.predicted_names)
            yield Part(name, task, slice(outputs, ends[0]), slice(targets, ends[1]), slice(values, ends[2]))
            outputs, targets, values = ends

    def losses(self, output_SK: Tensor, target_SX: Tensor) -> Tensor:
        """Loss of each slide and task, (S, T)."""
        found = [part.task.losses(output_SK[:, part.outputs], target_SX[:, part.targets]) for part in self.parts()]
        return torch.stack(found, dim=1)

    def weights(self, target_SX: Tensor) -> Tensor:
        """Weight of each slide and task, (S, T): those of a task sum to its share, or to 0."""
        found = []
        for part, share in zip(self.parts(), self.shares, strict=True):
            weight_S = part.task.weights(target_SX[:, part.targets])
            total = weight_S.sum()
            found.append(weight_S * torch.where(total > 0, share / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0))
        return torch.stack(found, dim=1)

    def predict(self, output_SK: Tensor) -> Tensor:
        """What each of them predicts, side by side."""
        return torch.cat([part.task.predict(output_SK[:, part.outputs]) for part in self.parts()], dim=1)

    def class_numbers(self, target_SX: Tensor) -> Tensor | None:
        """Of the first."""
        part = next(self.parts())
        return part.task.class_numbers(target_SX[:, part.targets])
