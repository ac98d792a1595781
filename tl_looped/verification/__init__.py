"""Whether a checkpoint was loaded right: what proves it, and what makes it likely.

*Exactness* checks hold for any weights, trained or not: the model computes what its configuration
says, in every way of running it, and what the authors' own code computes from the same files. They
hold or they do not, and they alone decide the exit code of ``tl-looped verify``. *Plausibility* is
about trained weights: losses, continuations, answers, speed and memory as a right load gives them.
It is reported, never decided by.
"""

from tl_looped.verification.certificate import Certificate, Finding, Outcome
from tl_looped.verification.reference import ReferenceOptions
from tl_looped.verification.run import verify

__all__ = ["Certificate", "Finding", "Outcome", "ReferenceOptions", "verify"]
