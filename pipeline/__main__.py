"""python -m pipeline, see pipeline/cli/command.py."""

from pipeline.cli.command import main

if __name__ == "__main__":
    main()
