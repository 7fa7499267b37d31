"""Upload in the background: in order, with retries, and without ever keeping the program from ending."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial

from huggingface_hub import get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

LONGEST_PAUSE = 60.0
"""Longest pause between two attempts, in seconds; the first takes about one, and each up to twice the one before."""
ATTEMPT = 900.0
"""Seconds after which an attempt counts as failed; otherwise a dead connection would block the queue for ever."""


class Refused(ValueError):
    """An error that no retry can change; the message has the fix."""


class Uploads:
    """Upload finished tasks on a separate thread, task k + 1 never before task k.

    Connection errors, time-outs, rate limits and 5xx answers are retried with exponential backoff and jitter until
    `close`. Any other error is reported through `notify` right away, and the upload is tried again when another task is
    finished. The threads are daemons: they never keep the program from ending.

    Args:
        prepare: called once, before the first task.
        put: uploads the task with the given 0-based index; may be called again for the same task.
        notify: receives a message as soon as something goes wrong that a retry cannot mend.
        token: masked in all messages; the stored one by default.
        first: 0-based index of the first task to upload.

    Attributes:
        wanted: number of tasks that are finished.
        done: number of tasks that are uploaded, or come before `first`.
        error: the error of the last attempt, None after a success.
        closed: whether no further attempt is started.
    """

    def __init__(
        self,
        prepare: Callable[[], object],
        put: Callable[[int], object],
        notify: Callable[[str], None] | None = None,
        token: str | None = None,
        first: int = 0,
    ) -> None:
        self._prepare, self._put, self._notify = prepare, put, notify or warnings.warn
        self.token = token or get_token()
        self._changed = threading.Condition()
        self._started = self._prepared = self._blocked = self.closed = False
        self.wanted = self.done = first
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="pgp_hf uploads", daemon=True)

    def add(self, tasks: int) -> None:
        """Note that the first `tasks` tasks are finished; 0 prepares without uploading."""
        with self._changed:
            self.wanted, self._blocked = max(self.wanted, tasks), False
            self._changed.notify_all()
            if not self._started:
                self._started = True
                self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait until all is uploaded, an error blocks the queue, or `seconds` have passed; return True in the first case."""
        with self._changed:
            self._changed.wait_for(lambda: self._blocked or self._idle(), min(seconds, threading.TIMEOUT_MAX))
            return self._idle()

    def close(self) -> None:
        """Start no further attempt."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def _idle(self) -> bool:
        return self._prepared and self.done >= self.wanted

    def _run(self) -> None:
        chance, failures = random.Random(), 0  # its own generator, so that the training's random numbers do not change
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.closed or not (self._blocked or self._idle()))
                if self.closed:
                    return
                prepared = self._prepared
                attempt = partial(self._put, self.done) if prepared else self._prepare
            try:
                within(ATTEMPT, attempt)
            except Exception as error:  # no failed upload may stop the training
                lasting = not is_transient(error)
                with self._changed:
                    self.error, self._blocked = error, lasting
                    self._changed.notify_all()
                    if not lasting:
                        pause = min(LONGEST_PAUSE, 2.0**failures) * chance.uniform(0.5, 1)
                        failures += 1
                        self._changed.wait_for(lambda: self.closed, pause)
                if lasting:
                    with contextlib.suppress(Warning):  # raised under -W error, where it would end the thread
                        self._notify(f"Uploading to the Hub failed. {explain(error, self.token)}")
            else:
                failures = 0
                with self._changed:
                    self.error, self._prepared = None, True
                    self.done += prepared
                    self._changed.notify_all()


def within(seconds: float, attempt: Callable[[], object]) -> None:
    """Call `attempt` on a new daemon thread; raise TimeoutError if it takes longer, and leave it running."""
    errors: list[Exception] = []

    def run() -> None:
        try:
            attempt()
        except Exception as error:  # raised below, in the thread that asked
            errors.append(error)

    thread = threading.Thread(target=run, name="pgp_hf upload", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"an upload did not finish within {seconds:g} s")
    if errors:
        raise errors[0]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    return next((one.response.status_code for one in _chain(error) if isinstance(one, HfHubHTTPError)), None)


def is_transient(error: BaseException) -> bool:
    """Return whether the same upload may succeed later."""
    status = _status(error)
    if status is not None:
        # 409 and 412: somebody else has written in the meantime; the next attempt starts from the new state
        return status in (408, 409, 412, 425, 429) or status >= 500
    if any(isinstance(one, OfflineModeIsEnabled) for one in _chain(error)):
        return False
    if isinstance(error, json.JSONDecodeError):  # some gateway's page instead of the Hub's answer
        return True
    return any(isinstance(one, (HTTPError, ConnectionError, TimeoutError)) for one in _chain(error))


def explain(error: BaseException, token: str | None = None) -> str:
    """Explain in one paragraph what went wrong and, where possible, how to fix it; the token is never shown."""
    status = _status(error)
    if any(isinstance(one, OfflineModeIsEnabled) for one in _chain(error)):
        text = "HF_HUB_OFFLINE=1 forbids every upload: unset it."
    elif status == 401:
        text = "The Hub does not recognise the token, or none was given (401): run `hf auth login`, or set HF_TOKEN."
    elif status == 403:
        text = "The token has no write access there (403): use one that has, or a repository of your own."
    elif status == 404:
        text = "The Hub has no such repository, or the token cannot see it (404): check its name and the token."
    elif isinstance(error, Refused):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text.replace(token, "***") if token else text
