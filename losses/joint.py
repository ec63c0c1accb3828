"""Several kinds of groups in a batch, a loss for each: quadruplets, and pairs with photos."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn


class JointLoss(nn.Module):
    """The sum of the losses of all kinds. In a batch one kind's images lie after the other's.

    losses: {kind: loss}. sizes: how many images of a batch are of each kind.
    """

    def __init__(self, losses: Mapping[str, nn.Module], sizes: Sequence[int]) -> None:
        super().__init__()
        self.losses, self.sizes = nn.ModuleDict(losses), list(sizes)

    def own_sizes(self, processes: int) -> list[int]:
        """`sizes` in the part of a batch that one of so many processes has."""
        return [size // processes for size in self.sizes]

    def parts(self, descriptors: Tensor, labels: Tensor, neutral: Tensor | None = None) -> dict[str, tuple]:
        """A loss's arguments -> {kind: (its loss, and its own part of each)}."""
        found, start = {}, 0
        for (kind, loss), size in zip(self.losses.items(), self.sizes):
            own = slice(start, start + size)
            found[kind] = loss, descriptors[own], labels[own], None if neutral is None else neutral[own, own]
            start += size
        return found

    def forward(self, descriptors: Tensor, labels: Tensor, neutral: Tensor | None = None) -> Tensor:
        """descriptors (N, D), labels (N,), neutral (N, N) bool -> scalar loss."""
        return sum(loss(*own) for loss, *own in self.parts(descriptors, labels, neutral).values())
