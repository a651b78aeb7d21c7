"""TPC-H's lineitem as CSV, made once per scale in the ignored folder of the clone."""

import subprocess
import sys
from pathlib import Path

from bench.report import say
from sluice.stack import StackError
from sluice.stack.stack import default_home


def lineitem(scale: float) -> Path:
    """The file at that scale factor: 3.0 M rows and 380 MB at 0.5. Raises StackError without `tpchgen-cli`."""
    folder = default_home().resolve() / "bench"
    path = folder / f"lineitem-{scale:g}.csv"
    if not path.exists():
        say(f"making {path.name} ...")
        draft = folder / f"{path.stem}.new"
        generator = Path(sys.executable).with_name("tpchgen-cli")
        words = ["csv", "--scale-factor", f"{scale:g}", "--tables", "lineitem", "--overwrite", "--output-dir"]
        try:
            draft.mkdir(parents=True, exist_ok=True)
            subprocess.run([generator, *words, draft], check=True, stdout=sys.stderr)
        except (OSError, subprocess.CalledProcessError) as error:
            raise StackError(f"the benchmark's data could not be made: {error}; `./dev` installs tpchgen-cli") from None
        (draft / "lineitem.csv").rename(path)
        draft.rmdir()
    return path
