"""torch.compile gives what the model gives, even if the initial state is drawn."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.full

SCRIPT = """
import torch
from tl_looped import LoopedTransformer

torch.set_num_threads(1)
tokens = torch.tensor([[3, 1, 4, 1, 5]])
model = LoopedTransformer.from_config(
    dict(
        d_model=8, d_head=4, n_heads=2, n_ctx=32, d_vocab=11, d_mlp=8, n_prelude=1, n_core=1,
        n_coda=1, n_recurrences=2, injection="linear", initial_state="random",
        initial_state_std=0.4, initializer_range=0.3, dtype="float64",
    )
)
runs = [{}, {"state_seed": 1}, {"state_seed": 2}, {"state_seed": 2**100}, {"n_recurrences": 3}]
hooks = [("recurrence.1.hook_state_out", lambda x, hook: x / 2)]


def logits(run):
    found = [run(tokens, **arguments) for arguments in runs]
    with model.hooks(hooks):
        found.append(run(tokens))
    found.append(run(tokens))
    return found


want = logits(model)
for backend in ("eager", "aot_eager"):
    torch._dynamo.reset()
    found = logits(torch.compile(model, backend=backend))
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    gradients = [
        torch.autograd.grad(out[1].sum(), model.W_E, retain_graph=True)[0] for out in (found, want)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
assert not any(torch.equal(a, b) for a, b in zip(want[:3], want[1:4], strict=True))
assert model.loop.R == 2
print("compiled models agree")
"""


def test_a_compiled_model_with_a_random_state_agrees() -> None:
    # A process of its own: the compiler cannot read the functions whose types tests check.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "compiled models agree\n"), done.stderr[-2000:]
