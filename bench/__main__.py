"""`python -m bench NAME [--json] [options]`; `./dev bench` calls this."""

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence

from bench import control, exports, imports
from bench.report import say
from sluice.stack import StackError

BENCHES = {"import": imports, "export": exports, "control": control}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark, or all with their defaults: tables to stderr, with --json one line each to stdout."""
    parser = argparse.ArgumentParser(prog="bench", description=main.__doc__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="one line of JSON to stdout")
    names = parser.add_subparsers(dest="name", metavar="NAME")
    for name, bench in BENCHES.items():
        about = (bench.__doc__ or "").partition("\n")[0]
        bench.add_options(names.add_parser(name, parents=[common], help=about, description=about))
    words = list(sys.argv[1:] if argv is None else argv)
    named = any(word in BENCHES or word in ("-h", "--help") for word in words)
    for run in [words] if named else [[name, *words] for name in BENCHES]:
        options = parser.parse_args(run)
        try:
            result = asyncio.run(BENCHES[options.name].run(options))
        except StackError as error:
            say(f"bench: {error}")
            return 1
        if options.json:
            print(json.dumps({"bench": options.name, **result}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
