"""Write requirements/lock.txt: the versions that the tests run with, taken from the environment of this Python.

    .venv/bin/python requirements/lock.py > requirements/lock.txt

The packages are those that pyproject.toml names, with the extra `dev`, and all that these require. `pip install -c
requirements/lock.txt` installs the same versions; `pip-audit -r requirements/lock.txt` looks them up.
"""

import platform
import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def closure(names: list[str]) -> dict[str, str]:
    """Return the installed version of every package that requirements name, and of those that they require."""
    versions: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    left = [(Requirement(name), "") for name in names]
    while left:
        requirement, extra = left.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        package = metadata.distribution(name)
        versions[name] = package.version.partition("+")[0]
        for each in {"", *requirement.extras}:
            if (name, each) not in seen:
                seen.add((name, each))
                left += [(Requirement(line), each) for line in package.requires or ()]
    return versions


def main() -> None:
    versions = closure([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]])
    python, machine = platform.python_version(), f"{platform.system()} {platform.machine()}"
    print(f"# Made by requirements/lock.py with Python {python} on {machine}. torch: any build of this version.")
    print("\n".join(f"{name}=={version}" for name, version in sorted(versions.items())))


if __name__ == "__main__":
    main()
