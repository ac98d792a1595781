"""The check "reference": what another implementation computes from the same files.

Of a looped checkpoint that is the authors' own code, as far as its adapter declares it
(:class:`~tl_looped.adapters.Reference`): it runs in an environment of its own, in a process of its
own, and only if the user trusts it (``verification.reference_process`` says what it is given and
what not). Of a model that was made of a feedforward one it is transformers' own class
(``verification.native``).

Logits at several numbers of recurrences, every activation that the code exposes and greedy tokens
are compared within the rounding of the run (``verification.parity``). Epsilon of every norm and the
rotary frequencies are compared by themselves: a wrong epsilon moves logits by as little as 6e-5,
and a short text hardly depends on the slow frequencies.

A comparison that was asked for and did not come about (the code fails, hangs, or leaves something
else than it was asked for) is ``WRONG``, not left out: an exit code of 0 says that it was made.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_looped.adapters import Reference, Source
from tl_looped.checkpoints import Checkpoint, HubOptions
from tl_looped.checks import checked, number
from tl_looped.errors import InputError
from tl_looped.files import is_file
from tl_looped.progress import NOTICES, Progress
from tl_looped.transformer.cache_size import free_bytes
from tl_looped.verification.certificate import Finding, Outcome
from tl_looped.verification.native import compare_with_source, refuse_other_models
from tl_looped.verification.parity import (
    CHECK,
    IF_WRONG,
    Ours,
    Runs,
    Theirs,
    norms_of,
    parity,
    plan_runs,
    run_ours,
)
from tl_looped.verification.reference_code import (
    check_versions,
    code_files,
    modules_of,
    named,
    public_version,
    refuse_absent,
    versions_of,
    would_run,
)
from tl_looped.verification.reference_process import Answer, NotCompared, ask
from tl_looped.verification.subject import Subject

_LONGEST = 10**7  # seconds
_WITHOUT_LOSS = {
    torch.float64: {"F64", "F32", "F16", "BF16"},
    torch.float32: {"F32", "F16", "BF16"},
    torch.float16: {"F16"},
    torch.bfloat16: {"BF16"},
}
"""Types of stored tensors that a type of weights holds exactly."""


@checked
@dataclass(frozen=True)
class ReferenceOptions:
    """What the checkpoint is compared with.

    Args:
        python: Interpreter of another environment that runs the authors' own code; kept as an
            absolute path, since it is started in another folder.
        trust_remote_code: Run the Python files that lie beside the checkpoint.
        timeout: Seconds after which the authors' code is given up.
        source: Feedforward model, hub id or folder, that the looped one was made of.
        hub: How the hub is asked for the authors' files, of a checkpoint from there.
    """

    python: Path | None = None
    trust_remote_code: bool = False
    timeout: float = 3600.0
    source: str | None = None
    hub: HubOptions | None = None

    def __post_init__(self) -> None:
        number(self.timeout, "reference_timeout", most=_LONGEST, above=0)
        if self.python is not None:
            object.__setattr__(self, "python", _absolute(self.python))
        if self.trust_remote_code and self.python is None:
            raise InputError(
                "--trust-remote-code runs nothing by itself: name an environment that runs the "
                "authors' code, --reference-python PATH, or leave it out"
            )
        if self.python is not None and self.source is not None:
            raise InputError(
                "--reference-python and --source exclude each other: the authors' own code, or the "
                "feedforward model that this one was made of"
            )


def _absolute(python: Path) -> Path:
    """The same file from any folder. Links are kept: that of a venv says which venv it is."""
    try:
        return python.expanduser().absolute()
    except (OSError, RuntimeError) as error:  # no such user, or no current folder
        raise InputError(f"--reference-python {python}: {error}; give the whole path") from error


@checked
def check_reference(checkpoint: Checkpoint, options: ReferenceOptions) -> None:
    """Refuse what cannot be compared, before anything else takes its time.

    Args:
        checkpoint: Of a looped model.
        options: Those of :func:`compare_with_reference`.

    Raises:
        InputError: code that is not trusted, an interpreter that does not run or lacks a package,
            or has another major version of it; a source of a model that was not made of one, or was
            trained since.
        CheckpointError: the files of the code are not there.
    """
    if options.source is not None:
        refuse_other_models(checkpoint.config(), options.source, checkpoint.name)
    if options.python is None:
        return
    reference = checkpoint.adapter.reference
    if reference is None:
        raise InputError(
            f"--reference-python: no other code runs a {checkpoint.adapter.name} checkpoint; leave "
            "it out"
        )
    if not is_file(options.python):
        raise InputError(
            f"--reference-python {options.python} is not a file; it must be the interpreter of "
            "an environment, such as reference/bin/python"
        )
    modules = modules_of(checkpoint, reference)
    if not options.trust_remote_code:
        raise InputError(
            f"--reference-python would run {would_run(checkpoint, modules)}, as you and with your "
            "files. Read them; --trust-remote-code runs them"
        )
    code_files(checkpoint, reference, options.hub)
    check_versions(reference, versions_of(options.python, reference), options.python)


@checked
def compare_with_reference(
    subject: Subject, options: ReferenceOptions, progress: Progress = NOTICES
) -> Finding:
    """Compare a checkpoint as it is loaded here with another implementation.

    Args:
        subject: The checkpoint and its model, which is left as it was.
        options: What it is compared with.
        progress: What is told on the way: one step per run.

    Returns:
        Finding of the check ``"reference"``.

    Raises:
        InputError, CheckpointError: as :func:`check_reference`.
    """
    check_reference(subject.checkpoint, options)
    source = options.source
    if source is None and subject.checkpoint.adapter.name == "virtual-loop":
        source = str(subject.checkpoint.folder)
    if options.python is None and source is None:
        return _not_asked(subject)
    about: dict[str, Any] = {"compared": False}
    try:
        _refuse_lossy(subject)
        if source is not None:
            return compare_with_source(subject.model, source, subject.tokens, options.hub, progress)
        return _compare(subject, options, progress, about)
    except NotCompared as error:
        return Finding(CHECK, Outcome.WRONG, f"not compared: {error}", IF_WRONG, about)


def _not_asked(subject: Subject) -> Finding:
    """How it would be, where it can be."""
    adapter, source = subject.checkpoint.adapter, subject.model.cfg.source_layers
    if source:
        how = f"made of the feedforward model {source.get('model')}: --source MODEL compares them"
    elif adapter.reference is None:
        how = f"no other code runs a {adapter.name} checkpoint"
    else:
        how = (
            "not compared with the authors' own code: --reference-python PATH --trust-remote-code "
            f"does, with an environment made by: {adapter.reference.environment}"
        )
    return Finding(CHECK, Outcome.NOT_APPLICABLE, how, IF_WRONG)


def _refuse_lossy(subject: Subject) -> None:
    """Refuse a model whose weights were rounded when it was loaded, or whose fp64 does not fit.

    Raises:
        NotCompared: it is one.
    """
    model, dtype = subject.model, subject.model.cfg.dtype
    headers = subject.checkpoint.headers
    read = {name for source in _sources(subject).values() for name in source.names}
    stored = {headers[name].dtype for name in read & set(headers)}
    lost = sorted(stored - _WITHOUT_LOSS.get(dtype, set()))
    if lost:
        raise NotCompared(
            f"the model was loaded in {dtype}, and its files hold {', '.join(lost)}: what was "
            "rounded on loading is not what the other side reads. Verify with --dtype float32"
        )
    if model.W_E.device.type == "mps":
        raise NotCompared("the bound is made of a run in fp64, which Apple's GPUs do not have")
    free = free_bytes(model.W_E.device)
    n = sum(parameter.numel() for parameter in model.parameters())
    more = n * (torch.float64.itemsize - dtype.itemsize)
    if free is not None and more > free:
        raise NotCompared(
            f"the bound is made of a run in fp64, which needs {more / 2**30:.1f} GiB more, and "
            f"{free / 2**30:.1f} GiB are free"
        )


def _compare(
    subject: Subject, options: ReferenceOptions, progress: Progress, about: dict[str, Any]
) -> Finding:
    """Run the authors' code, then ours; ``about`` gets what is known of the former on the way."""
    reference, python, model = subject.checkpoint.adapter.reference, options.python, subject.model
    assert reference is not None  # otherwise refused
    assert python is not None
    versions = versions_of(python, reference)
    about |= {"versions": versions, "code": code_files(subject.checkpoint, reference, options.hub)}
    others = [p.pin for p in reference.packages if public_version(versions.get(p.name)) != p.tested]
    tested = f"; the declaration was tested with {', '.join(others)}" if others else ""
    how = f"the authors' code under {named(versions)}{tested}"
    runs = plan_runs(model, subject.tokens)
    if reference.state_argument is None:
        runs = replace(runs, state=None)
    places = list(reference.places(model.cfg, runs.n_recurrences[0]))
    progress.start(2 * len(runs.n_recurrences) + 1, 0)
    try:
        request = _request(subject, reference, runs, places)
        answer = ask(python, request, _inputs(runs), options.timeout)
        progress.advance(1)
        refuse_absent(reference, request, answer.results.get("absent"))
        ours = run_ours(model, runs, [name for name, _, _ in places], progress.advance)
        theirs = _theirs(answer, reference, runs, ours, places)
    except NotCompared as error:
        raise NotCompared(f"{how}: {error}") from error
    about |= {"class": answer.results.get("class"), "loading": answer.results.get("loading")}
    if about["loading"]:  # what is missing in the files, it has drawn at random
        how += f"; on loading it reports {about['loading']}"
    return parity(model, norms_of(model, _sources(subject)), runs, ours, theirs, how, about)


def _request(
    subject: Subject, reference: Reference, runs: Runs, places: list[tuple[str, str, int]]
) -> dict[str, Any]:
    norms = norms_of(subject.model, _sources(subject))
    entries = []
    for i, n in enumerate(runs.n_recurrences):
        argument = reference.recurrences_argument
        entries.append(
            {
                "name": f"logits.{n}",
                "config": {name: n + plus for name, plus in reference.recurrences_config.items()},
                "arguments": {} if argument is None else {argument: n},
                "activations": i == 0,
                "n_greedy": runs.n_greedy if i == 0 else 0,
            }
        )
    return {
        "folder": str(subject.checkpoint.folder.resolve()),
        "auto_class": reference.auto_class,
        "trust_remote_code": True,
        "packages": [package.name for package in reference.packages],
        "arguments": dict(reference.arguments),
        "state_argument": reference.state_argument,
        "runs": entries,
        "modules": sorted({module for _, module, _ in places}),
        "eps": {ours: [theirs, reference.norm_eps] for ours, theirs in norms.items()},
        "rotary": reference.rotary,
    }


def _sources(subject: Subject) -> dict[str, Source]:
    return subject.checkpoint.adapter.sources(subject.model.cfg)


def _inputs(runs: Runs) -> dict[str, Tensor]:
    inputs = {"tokens": runs.tokens, "prompt": runs.prompt}
    if runs.state is not None:
        inputs |= {"state": runs.state, "greedy_state": runs.state[:1]}
    return inputs


def _theirs(
    answer: Answer,
    reference: Reference,
    runs: Runs,
    ours: Ours,
    places: list[tuple[str, str, int]],
) -> Theirs:
    """What came back: all that was asked for, of our shapes, and finite.

    Raises:
        NotCompared: otherwise.
    """
    _check_calls(answer.results.get("calls"), places)

    def taken(key: str, like: Tensor) -> Tensor:
        tensor = answer.tensors.get(key)
        if tensor is None:
            raise NotCompared(f"its answer lacks {key}")
        kinds = (tensor.is_floating_point(), like.is_floating_point())
        if tensor.shape != like.shape or kinds[0] != kinds[1]:
            raise NotCompared(
                f"its {key} is {tensor.dtype} {list(tensor.shape)}, expected {list(like.shape)}"
            )
        if not tensor.isfinite().all():
            raise NotCompared(f"its {key} is not finite")
        return tensor

    eps = answer.results.get("eps")
    return Theirs(
        {n: taken(f"logits.{n}", ours.logits[n][0]) for n in runs.n_recurrences},
        {name: taken(f"{path}#{n}", ours.activations[name][0]) for name, path, n in places},
        taken("greedy", ours.greedy),
        eps if isinstance(eps, dict) else {},
        _frequencies(answer, reference),
    )


def _check_calls(calls: Any, places: list[tuple[str, str, int]]) -> None:
    """Every module ran as often as its activations have names here."""
    expected: dict[str, int] = {}
    for _, module, call in places:
        expected[module] = max(expected.get(module, 0), call + 1)
    seen = calls if isinstance(calls, dict) else {}
    for module, n in expected.items():
        if seen.get(module) != n:
            raise NotCompared(f"its {module} ran {seen.get(module)} times, expected {n}")


def _frequencies(answer: Answer, reference: Reference) -> Tensor:
    """Of the rotary embeddings; a table holds them as the angles of position 1."""
    found = answer.tensors.get("rotary")
    if found is not None and reference.rotary_is == "table":
        is_table = found.ndim == 5 and found.shape[1] > 1 and found.shape[-1] == 2
        found = torch.atan2(found[0, 1, 0, :, 1], found[0, 1, 0, :, 0]) if is_table else None
    if found is None or found.ndim != 1 or not found.isfinite().all():
        raise NotCompared(f"its {reference.rotary} holds no rotary {reference.rotary_is}")
    return found
