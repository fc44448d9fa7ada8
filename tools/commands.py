"""The command `moss-vl` of the installed package: moss-vl infer|live|serve|install ARGUMENTS"""

import subprocess
import sys
from importlib import import_module
from pathlib import Path


# name -> (module with a `main`, what the command does)
COMMANDS = {
    "infer": ("infer", "answers questions about images and videos"),
    "live": ("infer", "watches a video, a camera or a stream, and says what it sees: moss-vl live SOURCE ARGUMENTS"),
    "serve": ("tools.serve", "answers requests to an OpenAI-compatible server, with realtime sessions"),
    "install": ("tools.install_into", "writes the code of this package into the folder of a checkpoint"),
}
USAGE = "usage: moss-vl COMMAND ARGUMENTS\n\ncommands, each with its own --help:\n" + "".join(
    f"  {name:10}{what}\n" for name, (_, what) in COMMANDS.items()
)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code; 2 for wrong usage."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE, end="")
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        got = f"unknown command {arguments[0]!r}" if arguments else "no command given"
        print(f"{USAGE}moss-vl: {got}", file=sys.stderr)
        return 2
    name, *rest = arguments
    if name == "install":
        return install(rest)
    if name == "live" and rest[:1] not in (["-h"], ["--help"]):
        rest = ["--live", *rest]
    return import_module(f"moss_vl.{COMMANDS[name][0]}").main(rest)


def install(arguments: list[str]) -> int:
    """Runs tools/install_into.py in a process of its own, where `moss_vl` is not imported: it has to check that the
    folder loads by the code that lies in it."""
    process = subprocess.Popen([sys.executable, str(Path(__file__).with_name("install_into.py")), *arguments])
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the script gets it as well, undoes its changes and ends
            continue


if __name__ == "__main__":
    sys.exit(main())
