"""Write RESULTS.md beside this file from what the operators' benchmarks measured.

python benchmarks/render.py FILE...      each FILE from: python -m pytest benchmarks/test_ops.py --json FILE
"""

import argparse
from pathlib import Path

from pgolf.testing.timings import Run, markdown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("RESULTS.md"))
    options = parser.parse_args()
    options.out.write_text(markdown([Run.load(path) for path in options.files]), encoding="utf-8")
    print(options.out)


if __name__ == "__main__":
    main()
