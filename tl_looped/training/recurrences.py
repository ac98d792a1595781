"""How many recurrences each training step runs, as a value.

A draw is a function of the run's seed and the step alone: no generator has a state that a resumed
run would have to restore. Uniform bits come from Philox, whose stream numpy guarantees across
versions, and go through the distributions' own quantile functions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tl_looped.checks import checked, number, whole
from tl_looped.errors import ConfigError
from tl_looped.model import limits

_STREAM = 2**63  # keys from here on: apart from those of the random initial states


@checked
@dataclass(frozen=True)
class Constant:
    """The same number of recurrences at every step.

    Args:
        n: Recurrences, at least 1.
    """

    n: int

    def __post_init__(self) -> None:
        n = whole(self.n, "n", 1, limits.most_layers, ConfigError, limits.HOW_TO_RAISE)
        object.__setattr__(self, "n", n)

    @property
    def mean(self) -> float:
        """Mean number of recurrences."""
        return float(self.n)

    @property
    def stated(self) -> int:
        """What a model that was trained so is said to be trained with."""
        return self.n

    @property
    def most(self) -> int | None:
        """The largest number that can come up; None if there is none."""
        return self.n

    @property
    def least(self) -> int:
        """The smallest number that can come up."""
        return self.n

    def at(self, seed: int, step: int) -> int:
        """Recurrences of a step."""
        return self.n


@checked
@dataclass(frozen=True)
class PoissonLogNormal:
    """Huginn's distribution (Geiping et al. 2025, arXiv 2502.05171, Section 3.3).

    ``tau ~ N(ln rate - sigma²/2, sigma²)``, ``R ~ Poisson(e^tau) + 1``. So ``E[e^tau] = rate``,
    ``E[R] = rate + 1`` and ``Var[R] = rate + rate² (e^(sigma²) - 1)``. The paper writes r-bar for
    ``rate`` and trains with 32.

    Args:
        rate: Mean of the Poisson rate, above 0. The mean number of recurrences is one more.
        sigma: Standard deviation of the logarithm of the rate, at least 0.
    """

    rate: float = 32.0
    sigma: float = 0.5

    def __post_init__(self) -> None:
        most, fix = limits.most_layers, limits.HOW_TO_RAISE
        number(self.rate, "rate", above=0, most=most, error=ConfigError, fix=fix)
        number(self.sigma, "sigma", 0, error=ConfigError)

    @property
    def mean(self) -> float:
        """Mean number of recurrences."""
        return self.rate + 1.0

    @property
    def stated(self) -> float:
        """What a model that was trained so is said to be trained with: r-bar, as in the paper."""
        return float(self.rate)

    @property
    def most(self) -> int | None:
        """The largest number that can come up; None if there is none."""
        return None

    @property
    def least(self) -> int:
        """The smallest number that can come up."""
        return 1

    def at(self, seed: int, step: int) -> int:
        """Recurrences of a step."""
        from scipy.special import ndtri
        from scipy.stats import poisson  # a second to import, which `tl-looped --help` spares

        normal, count = _uniform(seed, step)
        tau = np.log(self.rate) - self.sigma**2 / 2 + self.sigma * ndtri(normal)
        return int(poisson.ppf(count, np.exp(tau))) + 1


RecurrenceSampler = Constant | PoissonLogNormal
"""How many recurrences each step of a training runs."""


def state_seed(seed: int, step: int) -> int:
    """Seed of the random initial state of a step; never 0, which evaluation uses."""
    return (seed << 40) + step + 1


def _uniform(seed: int, step: int) -> tuple[float, float]:
    """Two uniform numbers inside (0, 1) for a seed and a step."""
    whole(seed, "seed", 0, _STREAM - 1)
    whole(step, "step")
    raw = np.random.Philox(key=np.array([step, _STREAM | seed], dtype=np.uint64)).random_raw(2)
    first, second = ((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53 + 2.0**-54).tolist()
    return first, second
