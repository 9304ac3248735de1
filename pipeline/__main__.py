"""python -m pipeline, see pipeline/cli/command.py."""

import locale
import os
import sys


def main() -> None:
    """Run the command line. Where the locale is not UTF-8, start it again in Python's UTF-8 mode.

    Libraries read their own files in the encoding of the locale; the console keeps its encoding.
    """
    if locale.getencoding().lower().replace("-", "") != "utf8" and not sys.flags.utf8_mode:
        os.environ["PYTHONUTF8"] = "1"  # of the processes that this one starts
        os.environ.setdefault("PYTHONIOENCODING", f"{sys.stdout.encoding}:backslashreplace")
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    from pipeline.cli.command import main as command

    command()


if __name__ == "__main__":
    main()
