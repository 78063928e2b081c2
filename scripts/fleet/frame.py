"""What the scripts that look for violations have around them: a limit, a directory, a report, an exit code."""

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile


class Broken(Exception):
    """The run itself could not be made."""


def judge(name, run, show, options, limit, heavy=()):
    """Runs `run(options, directory)` and shows its report; ends it after `limit` seconds, wherever it hangs.

    Returns the exit code: 0 if the report has no violations, 1 if it has some, 2 if the run could not be made. The
    directory stays for 1 and 2; in the first case without what `heavy` matches: caches and stores.
    """
    signal.signal(signal.SIGALRM, give_up)
    signal.signal(signal.SIGTERM, give_up)
    signal.alarm(int(limit))
    directory = pathlib.Path(tempfile.mkdtemp(prefix=f"pinrange-{name}-", dir=options.dir))
    try:
        report = run(options, directory)
    except (Broken, OSError, subprocess.SubprocessError) as error:
        print(f"{name}: {error}\n{name}: logs are kept in {directory}", file=sys.stderr)
        return 2
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
    show(report)
    if report["violations"]:
        for junk in (path for pattern in heavy for path in directory.glob(pattern)):
            shutil.rmtree(junk, ignore_errors=True)
        print(f"logs are kept in {directory}")
        return 1
    shutil.rmtree(directory)
    return 0


def give_up(signum, _frame):
    raise Broken(f"ended by {signal.Signals(signum).name}")
