"""A terminal without a screen: a program runs in it, and what a person would see is read off."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time
from collections.abc import Callable, Sequence
from types import TracebackType

import pyte


class Terminal:
    """A program on a pty of so many characters. What scrolled away is kept."""

    def __init__(self, command: Sequence[str], *, columns: int = 120, rows: int = 30, cwd: str = ".") -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=10_000, ratio=0.5)
        self.raw = b""
        self._stream = pyte.ByteStream(self.screen)
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
            os.execvpe(command[0], list(command), {**os.environ, "TERM": "xterm-256color", "COLUMNS": "", "LINES": ""})

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._fd)

    @property
    def text(self) -> str:
        """What is on the screen."""
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def see(self, what: Callable[[str], object] | str, *, timeout_s: float = 30) -> str:
        """Read until the screen shows a text, or something that `what` accepts; the screen then."""
        accepts = (lambda text: what in text) if isinstance(what, str) else what
        until = time.monotonic() + timeout_s
        while not accepts(self.text):
            assert time.monotonic() < until, f"not seen in {timeout_s} s: {what}\n{self.text}"
            assert self._read(), f"the program has ended before {what} was seen\n{self.text}"
        # A frame comes in pieces: what is on the way belongs to it.
        while self._has_more(50) and self._read():
            assert time.monotonic() < until, f"it never stops writing\n{self.text}"
        return self.text

    def end(self, *, timeout_s: float = 30) -> int:
        """Read until the program ends; its exit code."""
        until = time.monotonic() + timeout_s
        while self._read():
            assert time.monotonic() < until, f"no end in {timeout_s} s\n{self.text}"
        status, self.pid = os.waitpid(self.pid, 0)[1], 0
        return os.waitstatus_to_exitcode(status)

    def _read(self) -> bool:
        """Read what comes within a moment; False at the end."""
        if not self._has_more(100):
            return True
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # Linux's way to tell that nobody has the other end any more
            return False
        self.raw += data
        self._stream.feed(data)
        return bool(data)

    def _has_more(self, within_ms: int) -> bool:
        ready = select.poll()
        ready.register(self._fd, select.POLLIN)
        return bool(ready.poll(within_ms))
