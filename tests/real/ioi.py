"""The indirect-object task: prompts, and heads of SmolLM2-135M-Instruct by name.

Prompts after Wang et al. 2023 (arXiv 2211.00593): *When Mary and John went to the store, John gave
a drink to* -> *Mary*, the indirect object; *John* is the subject S, at S1 and S2. The corrupted
prompt has the other name at S2, which exchanges the two roles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tl_looped import LoopedActivationCache, LoopedTransformer

STORE = "When {} and {} went to the store, {} gave a drink to"
OFFICE = "While {} and {} were working at the office, {} gave a book to"
PARK = "After {} and {} went to the park, {} gave a bottle of milk to"
HOSPITAL = "Then, {} and {} were working at the hospital. {} decided to give a basketball to"

Names = tuple[tuple[str, str], tuple[str, str]]
FOUND_ON: tuple[str, Names] = (STORE, (("Mary", "John"), ("Tom", "James")))
HELD_OUT: list[tuple[str, Names]] = [
    (OFFICE, (("Anna", "David"), ("Sarah", "Paul"))),
    (PARK, (("Kate", "Simon"), ("Robert", "Lisa"))),
    (HOSPITAL, (("Alice", "Mark"), ("Martin", "Amy"))),
]
EVERYWHERE = [FOUND_ON, *HELD_OUT]

Head = tuple[int, int]
INDUCTION, INHIBITION, AGAINST_SUBJECT, AGAINST_OBJECT = (17, 4), (20, 0), (23, 3), (24, 4)
IN_CORE = [INDUCTION, INHIBITION, AGAINST_SUBJECT, AGAINST_OBJECT]
SIX = {*IN_CORE, (29, 0), (29, 1)}
CORE = range(17, 25)
N_LAYERS, N_HEADS = 30, 9
LATE = range(15, N_LAYERS)  # notebooks/patching.ipynb sweeps all 30, and finds the same six
EACH = list(range(N_HEADS))


@dataclass(frozen=True)
class Task:
    """Four prompts: each of two pairs of names in both roles, one pair in each order of them.

    ABBA: the indirect object is named first; BABA: the subject is.
    """

    clean: Tensor
    corrupted: Tensor
    answers: Tensor  # [prompt, 2]: the indirect object's token, the subject's

    @classmethod
    def of(cls, tokenizer: Any, template: str, names: Names) -> Task:
        roles = [pair for a, b in names for pair in ((a, b), (b, a))]
        orders = [*roles[:2], *(pair[::-1] for pair in roles[2:])]

        def tokens(last: int) -> Tensor:
            texts = [
                template.format(*order, role[last])
                for order, role in zip(orders, roles, strict=True)
            ]
            return tokenizer(texts, return_tensors="pt").input_ids

        answers = tokenizer([f" {a} {b}" for a, b in roles], return_tensors="pt").input_ids
        return cls(tokens(1), tokens(0), answers)

    def differences(self, logits: Tensor) -> Tensor:
        """Of every prompt: the logit of the indirect object minus that of the subject."""
        last = logits[:, -1].gather(1, self.answers)
        return last[:, 0] - last[:, 1]

    def difference(self, logits: Tensor) -> Tensor:
        return self.differences(logits).mean()

    def places(self, which: int, nth: int) -> Tensor:
        """Where the n-th mention of the indirect object (0) or subject (1) stands, ``[prompt]``."""
        found = (self.clean == self.answers[:, which : which + 1]).nonzero()
        rows = [found[found[:, 0] == row, 1] for row in range(len(self.clean))]
        return torch.stack([row[nth] for row in rows])


def clean_run(model: LoopedTransformer, task: Task) -> tuple[LoopedActivationCache, float]:
    with torch.no_grad():
        logits, cache = model.run_with_cache(task.clean)
    return cache, float(task.difference(logits))
