"""Result files as markdown and plots, and the documentation's tables from those in results/.

python benchmarks/report.py result.json --out report     # report/report.md, report/*.png
python benchmarks/report.py --docs                       # README.md and docs/, rewritten
python benchmarks/report.py --check                      # exit status 1 where they are stale
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # an inception_ext not installed

import blocks
import markdown
import results


def text_of(result: Mapping[str, Any], plots: list[Path]) -> str:
    """A whole result file as markdown."""
    parts = ["# Benchmarks", markdown.about(result)]
    parts += [markdown.scenario(found) for found in result["scenarios"]]
    parts += [f"![{path.stem}]({path.name})" for path in plots]
    return "\n\n".join(parts) + "\n"


def write_report(source: Path, out: Path) -> None:
    result = results.load(source)
    try:
        import plots
    except ImportError as error:
        print(f"no plots: {error}", file=sys.stderr)
        drawn = []
    else:
        drawn = plots.draw(result, out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(text_of(result, drawn), encoding="utf-8")
    print(f"wrote {out / 'report.md'} and {len(drawn)} plots")


def write_docs(root: Path = blocks.ROOT) -> None:
    import plots

    for page in blocks.pages(root):
        page.write_text(blocks.filled(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"wrote {page.relative_to(root)}")
    for source in sorted(results.FOLDER.glob("growth-*.json")):
        for path in plots.draw(results.load(source), root / "docs" / "plots"):
            print(f"wrote {path.relative_to(root)}")


def stale(root: Path = blocks.ROOT) -> list[Path]:
    """Pages that are not what the results and the programs make of them."""
    found = []
    for page in blocks.pages(root):
        text = page.read_text(encoding="utf-8")
        if blocks.filled(text) != text:
            found.append(page.relative_to(root))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", nargs="?", type=Path, help="a result file")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder of its report")
    parser.add_argument("--docs", action="store_true", help="rewrite the documentation's tables")
    parser.add_argument("--check", action="store_true", help="exit 1 where these are stale")
    args = parser.parse_args(argv)
    if not (args.result or args.docs or args.check):
        parser.error("nothing to do: a result file, --docs or --check")
    if args.result:
        try:
            write_report(args.result, args.out)
        except (OSError, ValueError) as error:
            parser.error(str(error))
    if args.docs:
        write_docs()
    if args.check and (pages := stale()):
        print(f"stale: {', '.join(map(str, pages))}; python benchmarks/report.py --docs")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
