"""From a finished training run of a bundled model to the folder that is shipped.

The folder holds bf16 weights, tokenizer, config, the log, the loss curve and a model card. The
card's numbers come from the run's log and from the shipped weights themselves.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch

from tl_looped._version import __version__
from tl_looped.experiments.files import write_figure
from tl_looped.files import make_folder, write_text
from tl_looped.plots import loss_curve
from tl_looped.training.corpus import pack, read_problems, split
from tl_looped.training.demo import DEMO_CONTEXT, DEMO_HELD_OUT
from tl_looped.training.evaluation import EVALUATED_ROWS, held_out_loss
from tl_looped.training.spec import TrainSpec
from tl_looped.transformer import LoopedTransformer

_SHOWN = (1, 2, 4, 8, 16, 32)

_CARD = """# Demo model

A small looped language model for trying out `tl_looped`: shape {shape}, linear injection,
{d_model} dimensions, {heads} heads, pre-norm RMSNorm, SwiGLU, RoPE, tied embeddings, context
{context}, {parameters:,} parameters (bf16). Byte-level BPE tokenizer of {vocabulary:,} tokens;
digits are tokens of their own. It writes text that looks like worked word problems; it does not
solve them.

## Training

- Data: the training split of GSM8K (Cobbe et al. 2021, MIT), {n_training:,} problems,
  question and worked answer without the calculator notes; {n_held_out} more are held out.
- {tokens:,} tokens ({epochs:.1f} epochs), {steps:,} steps of {batch} rows of {context} tokens,
  AdamW, peak learning rate {rate:g}, {warmup} steps of warm-up, cosine decay, weight decay
  {decay:g}.
- Four recurrences throughout, cross entropy of the final state. The random initial state has a new
  seed at every step.
- Seed {seed}. bfloat16 matrix products. Best held-out loss {held_out:.3f} nats per token, at step
  {best_step:,} of {evaluations} evaluations.
- Command: `tl-looped train-demo gsm8k_train.jsonl --out runs/demo` with tl_looped {version}. Other
  numbers of threads or other PyTorch versions may round differently.

![loss](loss.png)

`log.csv` holds every point of the curve.

## Other numbers of recurrences

Loss of the shipped weights in fp32 on the first {rows} held-out rows, state seed 0:

| recurrences | {header} |
|---|{rule}
| nats per token | {row} |
"""


@torch.inference_mode()
def bundle_demo(run: Path, data: Path, spec: TrainSpec, out: Path) -> Path:
    """Write the shipped folder of a run of the demo model.

    Args:
        run: Folder that :func:`tl_looped.training.trainer.train` wrote.
        data: The problems that the model was trained on.
        spec: The hyperparameters of the training.
        out: Where to write.

    Returns:
        ``out``.
    """
    training, held_out = split(read_problems(data), DEMO_HELD_OUT, spec.seed)
    make_folder(out)
    model = LoopedTransformer.from_pretrained(run / "best", device="cpu")
    log = pd.read_csv(run / "log.csv")
    model.to(torch.bfloat16)
    model.save_pretrained(out)
    model = LoopedTransformer.from_pretrained(out, device="cpu", dtype=torch.float32)
    rows = pack(held_out, model.tokenizer, DEMO_CONTEXT)
    losses = []
    for n in _SHOWN:
        with model.with_recurrences(n):
            losses.append(held_out_loss(model, rows[:EVALUATED_ROWS], 4))
    caption = f"seed {spec.seed}; held out: {len(held_out)} problems, {len(rows)} rows"
    tokens, train, curve = (log[n].tolist() for n in ("tokens", "train_loss", "held_out_loss"))
    title = f"{model.cfg.model_name}: loss"
    figure = loss_curve(tokens, train, curve, caption, title)
    write_figure(figure, out / "loss.png", dpi=100)
    write_text((run / "log.csv").read_text(encoding="utf-8"), out / "log.csv")
    best, cfg = log.sort_values("held_out_loss").iloc[0], model.cfg
    card = _CARD.format(
        shape=model.loop,
        d_model=cfg.d_model,
        heads=cfg.n_heads,
        context=cfg.n_ctx,
        parameters=sum(p.numel() for p in model.parameters()),
        vocabulary=len(model.tokenizer),
        n_training=len(training),
        n_held_out=len(held_out),
        tokens=int(log["tokens"].iloc[-1]),
        epochs=log["epoch"].iloc[-1],
        steps=spec.steps,
        batch=spec.batch_size,
        rate=spec.learning_rate,
        warmup=spec.warmup,
        decay=spec.weight_decay,
        seed=spec.seed,
        held_out=best["held_out_loss"],
        evaluations=len(log),
        best_step=int(best["step"]),
        version=__version__,
        rows=len(rows[:EVALUATED_ROWS]),
        header=" | ".join(map(str, _SHOWN)),
        rule="---|" * len(_SHOWN),
        row=" | ".join(f"{loss:.3f}" for loss in losses),
    )
    write_text(card, out / "README.md")
    return out
