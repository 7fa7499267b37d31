"""A Python process that runs snippets one after another: it imports the libraries once, under an environment that
they read when they are imported (`HF_ENDPOINT`, `HF_HOME`, ...). Started by `loopback.Python`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback

from sparing import freeze, spare


def main() -> None:
    spare()
    freeze()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print outside a snippet goes to the log
    for line in sys.stdin:
        task = json.loads(line)
        names = {"__name__": "snippet", **task["names"]}
        out, error = io.StringIO(), None
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                exec(compile(task["code"], "<snippet>", "exec"), names)
            except BaseException:  # SystemExit too: the process serves the next snippet
                error = traceback.format_exc()
        answer = {"value": names.get("result"), "out": out.getvalue(), "error": error}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
