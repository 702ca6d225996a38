"""A worker as seen from outside: a process that may die, hang, or answer nonsense."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker") / "__main__.py"


class WorkerError(Exception):
    """Why a worker gave no answer. Its process has ended."""


class Process:
    """One worker, which serves methods or engines, and the log of what it prints.

    It reports the versions of ``packages``. Outside the same environment this package is not there:
    a peer is not shown this environment's paths.
    """

    def __init__(
        self,
        python: Path,
        log: Path,
        same_environment: bool,
        threads: int,
        packages: str,
        engines: bool = False,
    ) -> None:
        self.log = log
        environment = {
            **os.environ,
            "PYTHONSAFEPATH": "1",  # the worker's folder has common names
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": str(threads),
            "REFUSAL_KERNELS_BENCH_NAMES": packages,
        }
        if not same_environment:
            environment.pop("PYTHONPATH", None)
        try:
            with log.open("ab") as errors:
                self.process = subprocess.Popen(
                    [python, str(WORKER), *["engines"] * engines],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=environment,
                    cwd=log.parent,
                    start_new_session=True,  # Ctrl-C is for the one who started this alone
                )
        except OSError as error:
            raise WorkerError(f"failed: {python} does not start: {error.strerror}") from None
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        os.set_blocking(self.stdout.fileno(), False)
        self._rest = b""

    def ask(self, order: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """Send an order and return the answer; without one in time the process is killed."""
        try:
            self.stdin.write(json.dumps(order).encode() + b"\n")
            self.stdin.flush()
            line = self._line(limit_s)
            try:
                answer = json.loads(line)
            except ValueError:
                answer = None
            if not isinstance(answer, dict):
                raise WorkerError(f"failed: it answered {line[:60]!r}, which is no answer")
            if "error" in answer:
                raise WorkerError(answer["error"])
            return answer
        except OSError:
            reason = self._last_words()
            self.kill()
            raise WorkerError(reason) from None
        except BaseException:
            self.kill()
            raise

    def _line(self, limit_s: float) -> bytes:
        """Read up to the end of a line."""
        end = time.monotonic() + limit_s
        with selectors.DefaultSelector() as ready:
            ready.register(self.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                left = end - time.monotonic()
                if left <= 0 or not ready.select(left):
                    raise WorkerError(f"failed: no answer in {limit_s:.0f} s")
                part = os.read(self.stdout.fileno(), 1 << 16)
                if not part:
                    raise WorkerError(self._last_words())
                self._rest += part
                if len(self._rest) > 1 << 24:
                    raise WorkerError("failed: it answered without an end")
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _last_words(self) -> str:
        """Say how it ended, with the last line of its log."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        lines = [x for x in self.log.read_text(errors="replace").splitlines() if x.strip()]
        code = self.process.returncode
        how = f"with signal {-code}" if code is not None and code < 0 else f"with code {code}"
        return f"failed: the process ended {how}" + (f": {lines[-1][:200]}" if lines else "")

    def kill(self) -> None:
        """End the process and what it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.stdin, self.stdout):
            with contextlib.suppress(OSError):
                stream.close()
