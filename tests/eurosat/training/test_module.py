"""The macro F1 of a validation, against the formula by hand."""

import pytest
import torch

from eurosat.training.module import MacroF1


def macro_f1(predicted: torch.Tensor, labels: torch.Tensor, classes: int) -> float:
    """F1 of each class from the confusion matrix, averaged over the classes that have tiles."""
    pairs = labels * classes + predicted
    counts = torch.bincount(pairs, minlength=classes**2).view(classes, classes).double()
    tiles, guesses = counts.sum(dim=1), counts.sum(dim=0)
    f1 = 2 * counts.diagonal() / (tiles + guesses).clamp(min=1)
    return float(f1[tiles > 0].mean())


@pytest.mark.parametrize(
    ("labels", "predicted"),
    [
        ([0, 0, 1, 1, 2, 2, 3], [0, 1, 1, 1, 2, 0, 3]),
        ([0, 0, 1, 1, 3, 3], [0, 2, 1, 1, 2, 3]),  # class 2 has no tile, but is predicted
        ([0, 0, 1, 1], [0, 1, 1, 1]),  # classes 2 and 3 do not occur at all
        ([2, 2, 3], [0, 0, 0]),  # nothing is right
    ],
)
def test_macro_f1_is_the_mean_over_the_classes_that_have_tiles(
    labels: list[int], predicted: list[int]
) -> None:
    metric, expected = MacroF1(4), macro_f1(torch.tensor(predicted), torch.tensor(labels), 4)
    metric.update(torch.tensor(predicted[:2]), torch.tensor(labels[:2]))
    metric.update(torch.tensor(predicted[2:]), torch.tensor(labels[2:]))
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-7)


def test_macro_f1_of_many_tiles_is_that_of_their_confusion_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    labels, predicted = torch.randint(0, 10, (2, 5000), generator=generator)
    metric = MacroF1(10)
    metric.update(predicted, labels)
    assert float(metric.compute()) == pytest.approx(macro_f1(predicted, labels, 10), abs=1e-6)
