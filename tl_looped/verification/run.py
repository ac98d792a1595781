"""``verify``: open a checkpoint, look at its files, load it, run the checks, write it all down."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_looped._version import __version__
from tl_looped.adapters import all_aliases
from tl_looped.checkpoints import BUNDLED, HubOptions
from tl_looped.checks import checked, whole
from tl_looped.errors import CheckpointError, ConfigError, InputError, TLLoopedError
from tl_looped.model.config import parse_dtype
from tl_looped.progress import NOTICES, SILENT, Progress
from tl_looped.retrofitting import retrofit
from tl_looped.transformer import LoopedTransformer
from tl_looped.transformer.cache_size import free_bytes, readable
from tl_looped.transformer.loading import target_device
from tl_looped.verification.certificate import Certificate, Finding, Outcome, plain
from tl_looped.verification.exactness import CHECKS, Runs, run_check
from tl_looped.verification.inventory import (
    dtypes_stored,
    inventory_of_files,
    inventory_of_text,
    tensors_of,
)
from tl_looped.verification.opening import Opened, open_subject
from tl_looped.verification.plausibility import CHECKS as PLAUSIBILITY
from tl_looped.verification.plausibility import plausibility
from tl_looped.verification.plausible_answers import load_problems
from tl_looped.verification.reference import (
    ReferenceOptions,
    check_reference,
    compare_with_reference,
)
from tl_looped.verification.subject import Subject
from tl_looped.verification.texts import bundled_texts
from tl_looped.verification.weights import finite, finite_weights, names

_ROWS, _LONGEST = 3, 24
_LARGEST_SEED = 2**63 - 1
_LOAD = "the model is not one of the family that its config names, or is another version of it"
_LOADED = ("finite", *CHECKS, "reference")
_LIBRARIES = ("torch", "transformers", "transformer-lens", "tokenizers", "safetensors")


@checked
def verify(
    model_name: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "float32",
    seed: int = 0,
    reference: ReferenceOptions | None = None,
    problems: int = 0,
    problem_set: str = "bundled",
    hub: HubOptions | None = None,
    progress: Progress = NOTICES,
) -> Certificate:
    """Prove a checkpoint right, as far as that can be proved, and say what makes it likely.

    A feedforward model of a family that :func:`tl_looped.retrofit` takes is examined as the loop of
    all its layers, run once.

    Args:
        model_name: A bundled name or an alias, a local folder, or a hub id.
        revision: Branch, tag or commit, for the hub only. The certificate holds the commit's hash.
        device: TransformerLens's default device if None.
        dtype: Of the weights while the checks run.
        seed: Seed of the tokens that are drawn for a model without a tokenizer.
        reference: Another implementation that the model is compared with: the authors' own code,
            or the feedforward model that it was made of.
        problems: Number of word problems that are answered at several numbers of recurrences; none
            if 0, since it takes long.
        problem_set: ``"bundled"``, ``"gsm8k"`` (from the hub) or ``"gsm8k:FILE.jsonl"``.
        hub: How the hub is asked.
        progress: What is told on the way: one step per check.

    Returns:
        What was found. Weights that are missing, damaged or not finite are findings of it.

    Raises:
        CheckpointError, UnknownArchitectureError, ConfigError: there is no such checkpoint, nothing
            here can run it, or a file of it is damaged.
        InputError: the model does not fit into the memory; a device that is not there; a reference
            that cannot be run, or is not trusted.
    """
    seed, problems = whole(seed, "seed", 0, _LARGEST_SEED), whole(problems, "problems", 0)
    wanted, since, started = parse_dtype(dtype), datetime.now(timezone.utc), time.perf_counter()
    target_device(device)
    if problems:
        load_problems(problem_set, problems, seed)  # refused before minutes are spent
    progress.start(1 + len(_LOADED) + len(PLAUSIBILITY) + (problems > 0), 0)
    opened = open_subject(model_name, revision, hub)
    compared = replace(reference or ReferenceOptions(), hub=hub)
    check_reference(opened.checkpoint, compared)
    inventory = inventory_of_files(opened)
    findings: list[Finding] = []
    subject: Subject | None = None

    def note(found: Iterable[Finding]) -> None:
        for finding in found:
            findings.append(finding)
            progress.advance(1)

    with torch.no_grad():
        note(_of_weights(opened, wanted))
        if not _failed(findings):
            try:
                subject = load_subject(opened, model_name, hub, device, wanted, seed)
            except (CheckpointError, ConfigError) as error:
                note([Finding("load", Outcome.WRONG, str(error), _LOAD)])
        if subject is not None:
            inventory |= inventory_of_text(subject.model, subject.texts)
            note(_of_model(subject, compared))
            if "finite" not in _failed(findings):
                say_only = Progress(say=progress.say)  # the steps are those of this progress
                note(_of_training(subject, problems, problem_set, say_only))
    note(_not_run(findings))
    known = _paths_of(opened, model_name, compared)
    when = {
        "date": since.strftime("%Y-%m-%d %H:%M UTC"),
        "wall time in seconds": round(time.perf_counter() - started, 1),
    }
    return _certificate(opened, subject, wanted, seed, findings, inventory, known, when)


def _of_weights(opened: Opened, dtype: torch.dtype) -> Iterator[Finding]:
    """Findings on the files: "names", and "finite" if a weight is not."""
    yield names(opened.checkpoint)
    not_finite = finite_weights(opened.checkpoint, dtype)
    if not_finite is not None:
        yield not_finite


def _of_model(subject: Subject, reference: ReferenceOptions) -> Iterator[Finding]:
    """Findings on the loaded model; once a run gave NaN, nothing else can be told."""
    found = finite(subject)
    yield found
    if found.outcome is Outcome.WRONG:
        return
    runs = Runs(subject)
    for check in CHECKS:
        yield run_check(check, runs)
    yield compare_with_reference(subject, reference, SILENT)


def _of_training(
    subject: Subject, problems: int, problem_set: str, progress: Progress
) -> Iterator[Finding]:
    """What trained weights make likely; an error of the package ends this part alone."""
    done: list[str] = []
    try:
        for finding in plausibility(
            subject, problems=problems, problem_set=problem_set, progress=progress
        ):
            done.append(finding.check)
            yield finding
    except TLLoopedError as error:
        why = f"not measured: {type(error).__name__}: {error}"
        for check in PLAUSIBILITY:
            if check not in done:
                yield Finding(check, Outcome.NOT_APPLICABLE, why, "")


def _failed(findings: list[Finding]) -> list[str]:
    return [finding.check for finding in findings if finding.outcome is Outcome.WRONG]


def _not_run(findings: list[Finding]) -> list[Finding]:
    """The checks that there was no model for."""
    done = {finding.check for finding in findings}
    why = f"not run: {', '.join(_failed(findings))} failed"
    missing = [check for check in (*_LOADED, *PLAUSIBILITY) if check not in done]
    return [Finding(check, Outcome.NOT_APPLICABLE, why, "") for check in missing]


# -- loading --------------------------------------------------------------------------------------


def load_subject(
    opened: Opened,
    model_name: str | Path,
    hub: HubOptions | None,
    device: str | torch.device | None,
    dtype: torch.dtype,
    seed: int,
) -> Subject:
    """Load the model and choose what it runs on.

    Args:
        opened: Its checkpoint, whose tensors were found in order.
        model_name, hub, device, dtype, seed: Those of :func:`verify`.

    Raises:
        InputError: the model does not fit into the memory.
    """
    refuse_too_large(opened, target_device(device), dtype)
    model = _load(opened, model_name, hub, device, dtype)
    texts = None if model.tokenizer is None else tuple(one.text for one in bundled_texts())
    tokens = _drawn(model, seed) if texts is None else _read(model, texts)
    return Subject(opened.checkpoint, model, texts, tokens, seed)


def refuse_too_large(opened: Opened, device: torch.device, dtype: torch.dtype) -> None:
    """Raise if the weights alone exceed the free memory."""
    stored = tensors_of(opened.checkpoint, opened.checkpoint.config())
    n = sum(torch.Size(one.shape).numel() for one in stored if one.parameters)
    needed, free = n * dtype.itemsize, free_bytes(device)
    if free is not None and needed > free:
        smaller = "" if dtype.itemsize <= 2 else " --dtype bfloat16 takes half of it"
        raise InputError(
            f"{opened.called}: {n:,} weights take {readable(needed)} in "
            f"{str(dtype).removeprefix('torch.')}, and {device} has {readable(free)} free."
            f"{smaller}{',' if smaller else ' Take'} another --device, or a larger machine"
        )


def _load(
    opened: Opened,
    model_name: str | Path,
    hub: HubOptions | None,
    device: str | torch.device | None,
    dtype: torch.dtype,
) -> LoopedTransformer:
    if opened.is_feedforward:
        here = opened.commit is None or hub is not None
        return retrofit(
            opened.checkpoint.folder if here else str(model_name),
            core=range(opened.checkpoint.config().n_core),
            mode="virtual-loop",
            n_recurrences=1,
            device=device,
            dtype=dtype,
            revision=None if here else opened.commit,
        )
    of_hub = {} if hub is None else asdict(hub)
    given = {name: value for name, value in of_hub.items() if value not in (None, False)}
    return LoopedTransformer.from_pretrained(
        model_name, device=device, dtype=dtype, revision=opened.commit, **given
    )


def _read(model: LoopedTransformer, texts: tuple[str, ...]) -> Tensor:
    """The first texts as tokens, all as long as the shortest."""
    try:
        rows = [model.to_tokens(text)[0] for text in texts[:_ROWS]]
    except TLLoopedError:
        raise
    except Exception as error:  # of the tokenizers library, which raises nothing more specific
        raise CheckpointError(
            f"the tokenizer cannot read English text ({error}); it is damaged, or another model's"
        ) from error
    n = min(_LONGEST, model.cfg.n_ctx, *map(len, rows))
    return torch.stack([row[:n] for row in rows])


def _drawn(model: LoopedTransformer, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (_ROWS, min(_LONGEST, model.cfg.n_ctx))
    drawn = torch.randint(model.cfg.d_vocab, shape, generator=generator)
    return drawn.to(model.W_E.device)


# -- the certificate ------------------------------------------------------------------------------


def _certificate(
    opened: Opened,
    subject: Subject | None,
    dtype: torch.dtype,
    seed: int,
    findings: list[Finding],
    inventory: dict[str, Any],
    known: list[str],
    when: dict[str, Any],
) -> Certificate:
    cfg, stored = opened.checkpoint.config(), dtypes_stored(opened.checkpoint)
    is_bundled = opened.checkpoint.folder in BUNDLED.values()
    about: dict[str, Any] = {
        "family": cfg.architecture,
        "adapter": opened.checkpoint.adapter.name,
        "revision": opened.commit or ("of this version" if is_bundled else "none: a local folder"),
        "shape": f"({cfg.n_prelude}, {cfg.n_core} x {cfg.n_recurrences}, {cfg.n_coda})",
        "stored as": ", ".join(f"{n} {kind}" for kind, n in stored.items()),
        "run in": str(dtype).removeprefix("torch."),
    }
    alias = all_aliases().get(opened.checkpoint.name)
    if alias is not None and opened.commit is not None:
        about["revision"] = f"{alias.hub_id} at {opened.commit}"
    if subject is not None:
        model = subject.model
        about |= {
            "shape": str(model.loop),
            "parameters": sum(p.numel() for p in model.parameters()),
            "device": _device(model.W_E.device),
            "text": model.describe_bos(),
            "tokens": f"{subject.tokens.shape[0]} x {subject.tokens.shape[1]}, "
            + ("of bundled texts" if subject.texts else f"drawn with seed {seed}"),
        }
    if opened.is_feedforward:
        about["examined as"] = "the loop of all layers of a feedforward model, run once"
    about |= when
    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    about["versions"] = {
        "tl-looped": __version__,
        "Python": platform.python_version(),
        **versions,
    }
    clean = partial(plain, known=known)
    cleaned = (
        Finding(f.check, f.outcome, clean(f.found), clean(f.if_wrong), clean(f.numbers))
        for f in findings
    )
    return Certificate(clean(opened.called), clean(about), tuple(cleaned), clean(inventory))


def _paths_of(opened: Opened, model_name: str | Path, compared: ReferenceOptions) -> list[str]:
    """What messages may hold and nobody else is to read: where things lie on this machine."""
    given = (model_name, compared.source or "", compared.python or "")
    local = [Path(one) for one in given if one and Path(one).exists()]
    folders = [*local, opened.checkpoint.folder, Path.home(), Path.cwd()]
    return [str(path) for one in folders for path in (one, one.absolute(), one.resolve())]


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
