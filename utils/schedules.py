"""How fast a run learns: the learning rate of each iteration."""

import math


def learning_rate(
    iteration: int, lr: float, schedule: str, iterations: int, warmup: int = 0, gamma: float = 1.0, step: int = 1
) -> float:
    """A rise over `warmup` iterations, then "constant", "cosine" to zero, or "step": times gamma every `step` ones."""
    warm = min(1.0, (iteration + 1) / warmup) if warmup else 1.0
    shape = {
        "constant": lambda: 1.0,
        "cosine": lambda: 0.5 * (1 + math.cos(math.pi * iteration / iterations)),
        "step": lambda: gamma ** (iteration // step),
    }[schedule]()
    return lr * warm * shape
