"""Carry out a Dockerfile's steps in order in a clean root folder, where there is no Docker: what they do, and how long.

    debootstrap --variant=minbase --include=python3.11,python3.11-venv,ca-certificates bookworm ROOT
    chroot ROOT python3.11 -m venv --copies /usr/local     (as in the base image, whose Python lies there)
    python tests/image_steps.py docker/cpu.Dockerfile ROOT [--build-arg N=V] [--env N=V] [--bind FOLDER] [--command ...]

FROM is taken as given by ROOT. ENV, ARG, WORKDIR, COPY, RUN and USER do what Docker does, RUN in `/bin/sh -c`
under chroot with none of this machine's environment but `--env`. At the end the entry point is started as the image's
user with its CMD, and then with `--command` where given. `--bind` shows a folder of this machine (wheels, certificates)
inside, for as long as the steps run. Needs root and unshare. Prints one JSON line: each step with its seconds.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

CONTEXT = Path(__file__).resolve().parents[1]
BASE_PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass
class Image:
    """What an image holds so far: its root folder and what its instructions have set."""

    root: Path
    arguments: dict[str, str]  # given by --build-arg
    environment: dict[str, str]
    folder: str = "/"
    user: str = "0:0"
    entry: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    locals: dict[str, str] = field(default_factory=dict)  # ARGs: seen by RUN, not kept in the image


def instructions(text: str) -> list[tuple[str, str]]:
    """Return (INSTRUCTION, rest) in order, comments dropped and continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    pairs = [line.split(None, 1) for line in joined.splitlines() if line.strip()]
    return [(name.upper(), rest.strip()) for name, rest in pairs]


def apply(image: Image, name: str, rest: str) -> None:
    """Carry out one instruction; ValueError for one that is not known here."""
    if name == "ENV":
        image.environment |= dict(word.split("=", 1) for word in shlex.split(rest))
    elif name == "ARG":
        key, _, default = rest.partition("=")
        image.locals[key] = image.arguments.get(key, default)
    elif name == "WORKDIR":
        image.folder = rest
        (image.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
    elif name == "COPY":
        copy(image, *rest.split())
    elif name == "RUN":
        run(image, ["/bin/sh", "-c", rest], image.environment | image.locals)
    elif name == "USER":
        image.user = rest
    elif name in ("ENTRYPOINT", "CMD"):
        setattr(image, "entry" if name == "ENTRYPOINT" else "command", json.loads(rest))
    elif name != "FROM":
        raise ValueError(f"instruction {name} is not carried out here")


def copy(image: Image, *names: str) -> None:
    """Copy files of the context, or the content of folders, as COPY does; .dockerignore lets all of it through."""
    *sources, target = names
    place = image.root / os.path.join(image.folder, target).lstrip("/")
    for source in (CONTEXT / name for name in sources):
        if source.is_dir():
            shutil.copytree(source, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            into = place / source.name if target.endswith("/") or place.is_dir() else place
            into.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, into)


def run(image: Image, command: list[str], environment: dict[str, str]) -> None:
    """Run a command in the root as the image's user; CalledProcessError where it fails."""
    values = [f"{name}={value}" for name, value in environment.items()]
    inside = ["chroot", f"--userspec={image.user}", str(image.root), "/usr/bin/env", "-i", f"--chdir={image.folder}"]
    subprocess.run([*inside, *values, *command], check=True, stdout=sys.stderr)


def inside_namespace(root: Path, binds: list[str]) -> None:
    """Mount what a container has, seen by this process alone: it must run under `unshare --mount`."""
    for source in ("/proc", "/dev", "/etc/resolv.conf", "/etc/hosts", *binds):
        place = root / source.lstrip("/")
        if Path(source).is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
        subprocess.run(["mount", "--bind", source, str(place)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("root", type=Path)
    parser.add_argument("--build-arg", action="append", default=[])
    parser.add_argument("--env", action="append", default=[])
    parser.add_argument("--bind", action="append", default=[])
    parser.add_argument("--command", nargs=argparse.REMAINDER, help="started after CMD; the last option")
    a = parser.parse_args()
    if "IMAGE_STEPS_INSIDE" not in os.environ:
        os.environ["IMAGE_STEPS_INSIDE"] = "1"
        os.execvp("unshare", ["unshare", "--mount", sys.executable, *sys.argv])
    root = a.root.resolve()
    inside_namespace(root, a.bind)
    given, lent = (dict(pair.split("=", 1) for pair in pairs) for pairs in (a.build_arg, a.env))
    image, result = Image(root, given, {"PATH": BASE_PATH, "HOME": "/root", **lent}), []
    for name, rest in instructions(a.file.read_text()):
        began = time.monotonic()
        apply(image, name, rest)
        result.append({"step": f"{name} {rest}", "seconds": round(time.monotonic() - began, 2)})
    for arguments in (image.command, a.command):
        if arguments is None:
            continue
        began = time.monotonic()
        run(image, [*image.entry, *arguments], image.environment)
        result.append({"step": shlex.join([*image.entry, *arguments]), "seconds": round(time.monotonic() - began, 2)})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
