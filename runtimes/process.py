"""The parent's end of a worker process: start, frames out, replies in, and what its death or its silence means.

    process = WorkerProcess(silence_limit_s=600)         # and more for its environment, if need be
    report = process.call(Load(artifact, settings))      # raises the EdgemedError that the worker replied, or EngineDiedError
    pending = process.begin(Submit(request)); pending.get()

Knows nothing of what the commands mean.
"""

from __future__ import annotations

import itertools
import queue
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Mapping
from contextlib import suppress

from edgemed.core.children import own_command, own_environment
from edgemed.core.errors import EdgemedError, EngineDiedError
from runtimes.messages import Token
from runtimes.wire import Cancel, Command, pack_frame, read_frame, write_frame

CLOSE_S = 5.0
# How often it is looked whether the worker has given a sign of life.
LOOK_S = 1.0
SPIN_COUNT = "30000"
_STDERR_LINES = 50
# By name: Windows has not all of them.
_MEANING = {
    "SIGKILL": "killed by the system or a person, often for lack of memory",
    "SIGABRT": "llama.cpp gave up, on an input or for want of room",
    "SIGSEGV": "llama.cpp touched memory that is not its own",
    "SIGBUS": "a model's file shrank or could not be read while it was in use",
    "SIGILL": "the installed llama-cpp-python was built for another processor",
    "SIGTERM": "ended by the system or a person",
}
_HINT = "Ask again; if it happens again, run: edgemed verify"
_SILENCE_HINT = "Ask again; if it happens again, choose --device cpu or restart the computer, whose GPU's driver may hang."
_HINTS = {
    "SIGKILL": "Ask again; if it happens again, use a smaller context, fewer slots or a 4-bit model.",
    "SIGILL": "Build it for this one, in edgemed's folder: make demo CPU=native (or see runtimes/native.py).",
}


class Pending:
    """Where the replies to one command arrive."""

    def __init__(self, id: int) -> None:
        self.id = id
        self._queue: queue.SimpleQueue[object] = queue.SimpleQueue()

    def put(self, reply: object) -> None:
        """Called by the reader."""
        self._queue.put(reply)

    def get(self) -> object:
        """Wait for the next reply; the last one after a death is an EngineDiedError."""
        return self._queue.get()


class WorkerProcess:
    """One process that runs `runtimes.worker.main`; ended where replies are awaited and no sign of life comes for `silence_limit_s`."""

    def __init__(self, silence_limit_s: float, environment: Mapping[str, str] | None = None) -> None:
        self.silence_limit_s = silence_limit_s
        # No debugger on an abort, no thread pool of numpy's beside llama.cpp's.
        env = {**own_environment(), "GGML_NO_BACKTRACE": "1", "OPENBLAS_NUM_THREADS": "1"}
        # How long llama.cpp's threads spin before they sleep at their some hundred meetings a token: enough for an idle machine's full
        # speed, fewer than libgomp's own 300,000, which waste a core that another program wants (docs/LOG.md, 2026-11-22).
        env.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
        env.update(environment or {})
        self._process = subprocess.Popen(
            own_command("runtimes.worker"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
        )
        self.pid = self._process.pid
        self._ids = itertools.count(1)
        self._pending: dict[int, Pending] = {}
        self._lock = threading.Lock()
        self._write_lock = threading.Lock()
        self._abandoned: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._death: EngineDiedError | None = None
        self._ended = threading.Event()
        self._heard = False
        self._closing = False
        self._stderr: deque[str] = deque(maxlen=_STDERR_LINES)
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._read_replies, self._read_stderr, self._watch)]
        for thread in reversed(self._threads):  # the reader of replies joins that of stderr
            thread.start()

    @property
    def alive(self) -> bool:
        """Whether it still runs, as far as is known."""
        return self._death is None and self._process.poll() is None

    def begin(self, command: Command) -> Pending:
        """Send a command. Raises EngineDiedError where the worker has ended."""
        self._cancel_abandoned()
        pending = Pending(next(self._ids))
        with self._lock:
            if self._death is not None:
                raise self._death
            self._pending[pending.id] = pending
        if not self.try_send(pending.id, command):
            self.forget(pending.id)
            self._threads[0].join(CLOSE_S)
            raise self._death or EngineDiedError("The engine's process has ended.", "Ask again.")
        return pending

    def try_send(self, id: int, command: Command) -> bool:
        """Write a frame; False where the worker is gone."""
        if self._process.stdin is None:
            return False
        frame = pack_frame((id, command))
        try:
            with self._write_lock:
                write_frame(self._process.stdin, frame)  # type: ignore[arg-type]
        except (OSError, ValueError):  # ValueError: closed by us
            return False
        return True

    def call(self, command: Command) -> object:
        """Send a command and wait for its one reply, raising it if it is an error."""
        pending = self.begin(command)
        try:
            reply = pending.get()
        except BaseException:  # Ctrl-C
            self.abandon(pending.id)
            raise
        if isinstance(reply, EdgemedError):
            raise reply
        return reply

    def forget(self, id: int) -> None:
        """Later replies to this command are dropped."""
        with self._lock:
            self._pending.pop(id, None)

    def abandon(self, id: int) -> None:
        """Nobody waits for this request's events any more: it is cancelled soon. Takes no lock, so that a finaliser may call it."""
        self._abandoned.put(id)

    def _cancel_abandoned(self) -> None:
        while not self._abandoned.empty():
            with suppress(queue.Empty):
                id = self._abandoned.get_nowait()
                self.forget(id)
                self.try_send(id, Cancel())

    def close(self) -> None:
        """Close its stdin, which ends it; kill it if that does not."""
        self._closing = True
        if not self._close_stdin():
            self._process.kill()  # which frees the writer
        try:
            self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):  # one that a driver holds ends when that lets go
                self._process.wait(CLOSE_S)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(CLOSE_S)
        self._close_stdin()
        self._end(self._describe_death())

    def _close_stdin(self) -> bool:
        """False where a writer hangs on a full pipe."""
        if not self._write_lock.acquire(timeout=CLOSE_S):
            return False
        try:
            if self._process.stdin is not None:
                self._process.stdin.close()
        except OSError:
            self._process.kill()  # bytes were left in the buffer of a pipe that is gone
        finally:
            self._write_lock.release()
        return True

    # -- threads ------------------------------------------------------------------------------------------------------

    def _read_replies(self) -> None:
        try:
            self._hand_out_replies()
        except Exception as error:  # whatever unpickling raises; without this thread nobody would ever learn of a death
            found = f"{type(error).__name__}: {error}"
            self._end(EngineDiedError(f"The engine's process sent a reply that cannot be read ({found}) and was ended.", _HINT))
            self._process.kill()
        self._process.wait()
        self._threads[1].join(CLOSE_S)
        self._end(self._describe_death())

    def _end(self, death: EngineDiedError) -> None:
        """No more replies: tell all who wait. The first reason counts."""
        with self._lock:
            self._death = self._death or death
            waiting, self._pending = list(self._pending.values()), {}
        self._ended.set()
        for pending in waiting:
            pending.put(self._death)

    def _hand_out_replies(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            while isinstance(frame := read_frame(stream), list):  # type: ignore[arg-type]
                for id, reply in frame:
                    with self._lock:
                        self._heard = self._heard or id == 0
                        # All but a token is a command's last reply, after which nothing is awaited, however late that is read.
                        pending = self._pending.get(id) if isinstance(reply, Token) else self._pending.pop(id, None)
                    if pending is not None:
                        pending.put(reply)
                self._cancel_abandoned()

    def _watch(self) -> None:
        # In looks, not by the clock: that goes on while both of us are stopped, by a lid that is closed or by Ctrl-Z.
        # Of what has been waited for longest: of many short commands there is always one, and of none is there a sign of life.
        silent_s, longest = 0.0, None
        while not self._ended.wait(LOOK_S):
            with self._lock:
                before, longest = longest, next(iter(self._pending), None)
                silent_s = silent_s + LOOK_S if longest is not None and longest == before and not self._heard else 0.0
                self._heard = False
            if silent_s > self.silence_limit_s:
                # Told first, as a process that a driver holds does not end when it is killed.
                said = f"The engine's process gave no sign of life for {self.silence_limit_s:g} seconds and was ended."
                self._end(EngineDiedError(said, _SILENCE_HINT))
                self._process.kill()

    def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            for line in stream:
                text = line.decode(errors="replace").strip()
                if text:
                    self._stderr.append(text)

    def _describe_death(self) -> EngineDiedError:
        if self._closing:
            return EngineDiedError("The engine was closed during an answer.", "Open it again.")
        code = self._process.returncode
        last = next((line for line in reversed(self._stderr) if not line.startswith(("frame", "#"))), "")
        if any(line.startswith("Traceback") for line in self._stderr):
            last = last.partition(":")[0]  # a Python exception's kind: what it says may be about a patient
        words = f" Its last words: {last[:300]}" if last else ""
        if code >= 0:
            return EngineDiedError(f"The engine's process ended with code {code}.{words}", _HINT)
        name = signal.Signals(-code).name
        meaning = _MEANING.get(name, "stopped by a signal")
        return EngineDiedError(f"The engine's process ended with {name}: {meaning}.{words}", _HINTS.get(name, _HINT))
