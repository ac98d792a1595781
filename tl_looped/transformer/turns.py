"""One thread at a time: hooks that one thread attaches must not fire in another one's run.

A forward pass writes nothing into its model, whatever its number of recurrences. But a cached run
attaches readers, ``hooks`` attaches hooks, an intervention lends weights. All of that is the
model's own, so whoever uses the model has it alone:

- A *call* (a run, a cached run, a generation) takes the turn and gives it back when it returns.
  Calls of other threads wait. ``with model.turn:`` makes one call of several.
- A *context* that stays open (``model.hooks``, ``model.with_recurrences``, ``model.intervening``)
  holds the turn too, and nobody knows for how long: it may wait for the very thread that would wait
  for it, or stand in a generator that nobody resumes. Other threads get an InputError at once.

Within its turn a thread may nest calls and contexts as it likes. Streamed generation takes a turn a
token, so several streams of one model go on side by side. Runs of separate models never meet; a
copy of a model (``copy.deepcopy``, pickling) has turns of its own. A process that was forked while
another thread had the turn has a model in the middle of that thread's run, and is refused.

Not guarded: changes of weights, devices and modes, calls of single blocks, and the model's
attributes (``model.loop``, ``model.blocks``), which show what is true at that moment.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from tl_looped.errors import InputError

Method = TypeVar("Method", bound=Callable[..., Any])


class Turns:
    """Whose turn it is to use a model: ``with model.turn:`` is a call, ``kept()`` a context."""

    def __init__(self) -> None:
        # Reentrant: the garbage collector may close a forgotten context anywhere, also in here.
        self._changed = threading.Condition()
        # The thread itself, not its number, which the next one may have.
        self._owner: threading.Thread | None = None
        self._calls = self._contexts = 0
        self._is_kept = False  # begun by a context
        self._process = os.getpid()

    def __enter__(self) -> None:
        self._take(calls=1)

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._calls -= 1
            self._pass_on()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """The turn of a context, which other threads do not wait for.

        Whoever leaves the context gives the turn back; what is cleaned up before, behind
        :meth:`take_over`.
        """
        self._take(contexts=1)
        owner = threading.current_thread()
        try:
            yield
        finally:
            with self._changed:
                self._contexts -= 1
                self._owner = owner  # of contexts that are still open
                self._pass_on()

    def take_over(self) -> None:
        """Have the turn, to clean up at the end of a context.

        A generator may be resumed or dropped by another thread than the one that began it. Then
        the owner's calls come to their end first.
        """
        me = threading.current_thread()
        with self._changed:
            while self._calls and self._owner is not me:
                self._changed.wait()
            self._owner = me

    def _take(self, calls: int = 0, contexts: int = 0) -> None:
        me = threading.current_thread()
        if self._process != os.getpid():
            self._after_fork(me)
        with self._changed:
            while self._owner not in (None, me):
                assert self._owner is not None
                if self._is_kept:
                    raise InputError(
                        f"thread {self._owner.name!r} has the model in an open context (model.hooks"
                        ", model.with_recurrences, model.intervening or a training step), and "
                        f"thread {me.name!r} would run with what it set: leave the context first; "
                        "or pass n_recurrences= and fwd_hooks= to each call instead, or open the "
                        "context within 'with model.turn:', which other threads wait for; or give "
                        "each thread a model of its own (copy.deepcopy)"
                    )
                self._changed.wait()
            if self._owner is None:
                self._owner, self._is_kept = me, contexts > 0
            self._calls += calls
            self._contexts += contexts

    def _pass_on(self) -> None:
        if not self._calls and not self._contexts:
            self._owner = None
        self._changed.notify_all()

    def _after_fork(self, me: threading.Thread) -> None:
        if self._owner not in (None, me):
            assert self._owner is not None
            raise InputError(
                f"this process was forked while thread {self._owner.name!r} had the model, which is"
                " in the middle of that run: fork before or after it, or start processes with "
                "'spawn'"
            )
        self._changed = threading.Condition()
        self._process = os.getpid()

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        """Copies and pickles of a model have turns of their own."""
        return Turns, ()


def in_turn(method: Method) -> Method:
    """A method of a model, which has the turn while it runs."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.turn:
            return method(self, *args, **kwargs)

    # torch.compile leaves this frame to Python, which takes the turn, and compiles those within.
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return cast(Method, call)
