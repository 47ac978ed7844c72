"""What the labels of a classifier mean, by the configuration or by the labels themselves."""

from collections.abc import Iterable

SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"
PROBLEMS = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)


def problem_of(
    problem_type: str | None,
    num_labels: int | None,
    integers: bool,
    labels: tuple[int | None, ...],
    logits: tuple[int | None, ...],
) -> tuple[str, bool]:
    """One of `PROBLEMS`, and whether the labels are class indices.

    Args:
        problem_type: the configuration's; None to infer the problem from the labels.
        num_labels: the configuration's.
        integers: whether the labels are integers.
        labels: their shape; None, here and there, fits any number.
        logits: the shape of the logits, (B, K).

    Raises:
        ValueError: there is no such problem, or the shape of the labels does not fit.
    """
    likely = SINGLE_LABEL if integers else MULTI_LABEL
    problem = problem_type or (REGRESSION if num_labels == 1 else likely)
    if problem not in PROBLEMS:
        raise ValueError(f"problem_type = {problem!r}: must be one of {', '.join(PROBLEMS)}")
    indices = problem == SINGLE_LABEL and integers
    columns = 1 if indices else logits[1]
    fits = (len(labels) == 2 and labels[1] in (columns, None)) or (len(labels) == columns == 1)
    has_batches = None not in (labels[:1] + logits[:1])
    if not fits or (has_batches and labels[0] != logits[0]):
        raise ValueError(
            f"labels have shape {labels}, which does not fit {problem} with logits of shape "
            f"{logits}"
        )
    return problem, indices


def unknown_classes(labels: Iterable[int], classes: int) -> ValueError:
    """The error for labels some of which are indices of no class.

    Args:
        labels: class indices.
        classes: how many classes there are.
    """
    wrong = sorted({label for label in labels if not 0 <= label < classes})
    named = ", ".join(map(str, wrong[:10])) + (", ..." if len(wrong) > 10 else "")
    return ValueError(
        f"labels hold {named}: the indices of {classes} classes are 0 to {classes - 1}"
    )
