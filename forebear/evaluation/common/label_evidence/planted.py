"""Probabilities of a wrong label that were measured on flips which were planted before the model was trained."""

from __future__ import annotations

import numpy as np

from forebear.errors import InputError

LEAST_PLANTED = 20


def calibrated(estimated: np.ndarray, planted: np.ndarray) -> np.ndarray:
    """The probability that each label is wrong, ``(n,)``; of planted rows 1.

    Estimates have the density f1 in planted rows and f = (1 - pi) f0 + pi f1 in the rest, of which pi f1 / f are wrong.
    log(f1 / f0) is a straight line of the logit, the one under which planted rows and the rest are likeliest. pi is the
    mean estimate of the rest. Right where that is, and where the other wrong labels are of the planted kind.

    Args:
        estimated: Estimated probabilities, ``(n,)``.
        planted: Whether the row's label was made wrong on purpose, ``(n,)`` bool.

    Raises:
        InputError: Fewer than ``LEAST_PLANTED`` rows are planted, or no other row is there.
    """
    from scipy.optimize import minimize
    from scipy.special import logit

    n, n_planted = len(planted), int(planted.sum())
    if n_planted < LEAST_PLANTED or n_planted == n:
        raise InputError(
            f"{n_planted} of {n} rows are planted; expected at least {LEAST_PLANTED}, not all. Plant more flips before "
            "the model is trained.",
            of="audit mislabelled",
        )
    share = float(np.clip(estimated[~planted].mean(), 1e-6, 1 - 1e-6))
    suspicion = logit(np.clip(estimated, 1e-12, 1 - 1e-12))
    share_planted = n_planted / n

    def chances(line: np.ndarray) -> np.ndarray:
        """Logarithms of f1 / f at each row."""
        ratio = line[0] * suspicion + line[1]
        return np.asarray(ratio - np.logaddexp(np.log(share) + ratio, np.log1p(-share)))

    def unlikelihood(line: np.ndarray) -> float:
        odds = chances(line) + logit(share_planted)
        return float(np.logaddexp(0, np.where(planted, -odds, odds)).mean())

    line = minimize(unlikelihood, np.array([1.0, 0.0]), method="Nelder-Mead").x
    return np.where(planted, 1.0, np.exp(np.minimum(np.log(share) + chances(line), 0.0)))
