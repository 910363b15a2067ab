"""Commands in processes that are forked from one with the libraries imported: a start takes 0.1 s instead of four."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

SECONDS = 240


class CommandServer:
    """A process of some Python environment that forks one of its own for every `specplug` command.

    What it skips is the import of PyTorch and Transformers; plugins are found and imported by the forked process. Tests of
    that import, of the installed script, of terminals and of signals start a process themselves.

    Args:
        python: the environment's interpreter.
        environment: the variables with which the libraries are imported.
    """

    def __init__(self, python: str, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [python, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(environment), text=True
        )

    def run(self, *arguments: str, environment: Mapping[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
        """Runs `specplug` with these arguments and variables in a folder; after `SECONDS` it is ended by a signal."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            files = [os.path.join(folder, name) for name in ("stdout", "stderr")]
            job = {"arguments": arguments, "environment": dict(environment), "cwd": str(cwd), "files": files}
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            status = self._process.stdout.readline()
            assert status, "the process that forks commands has ended"
            out, err = (Path(file).read_text(encoding="utf-8") for file in files)
        return subprocess.CompletedProcess(arguments, int(status), out, err)

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def _serve() -> None:
    from specplug.cli.process import import_libraries

    import_libraries()
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(job)
        status = os.waitpid(child, 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run(job: dict[str, Any]) -> NoReturn:
    import importlib

    signal.alarm(SECONDS)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["cwd"])
    for number, name in enumerate((os.devnull, *job["files"])):
        file = os.open(name, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.path[:0] = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part not in ("", *sys.path)]
    sys.argv = ["specplug", *job["arguments"]]
    importlib.invalidate_caches()
    status = 1
    try:
        from specplug.cli.main import main

        main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
