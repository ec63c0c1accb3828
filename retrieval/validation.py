"""Validation in the course of a training run."""

import logging

from torch.utils.tensorboard import SummaryWriter

from datasets.sets import VALIDATION, EvaluationData
from retrieval.describe import Describer
from retrieval.evaluation import describe_sets, score_sets
from utils import distributed


def validate(
    validation: EvaluationData | None, writer: SummaryWriter, describer: Describer, iteration: int
) -> float | None:
    """R@1 of the validation set, logged and written; None without one."""
    if validation is None or not validation.sets:
        return None
    descriptors, data = describe_sets(describer, validation)

    def score():
        result = score_sets(data, descriptors)
        logging.info(f"Iteration {iteration}: {result.lines()[0]}")
        return result[VALIDATION].recalls[1]

    score = distributed.from_first(score)
    writer.add_scalar("validation/R@1", score, iteration)
    return score
