#!/usr/bin/env python
"""Checks that what the training scripts share is the same in all of them.

A training script stands alone, so helpers stand in several. Directly above a function, class or constant, the line

    # Copied from train_x.py             says that it is byte for byte that of train_x.py
    # Variant of train_x.py: reason      says that it is not, and why

and the line

    # Unmarked: copied from train_x.py, where it stands there too

says the former of everything in the script that has no mark of its own and stands in train_x.py. What stands in several
scripts has a mark in all but one of them.

    python tools/copies.py          checks: a line for each problem, and exit status 1 if there is any
    python tools/copies.py --fix    brings the originals' text into the copies, then checks
"""

import argparse
import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

SOURCE = "train_lcm_distill_sd_wds.py"  # of two unmarked definitions of a name, this script's is the original
MARK = re.compile(r"# (Copied from|Variant of)\s+([^\s:]+?)(?::\s*(.*))?$")
UNMARKED = re.compile(r"# Unmarked: copied from (\S+), where it stands there too$", re.MULTILINE)


@dataclass
class Definition:
    first: int  # line numbers from 1; decorators included
    last: int
    text: str
    kind: str | None = None  # "Copied from", "Variant of" or None
    origin: str | None = None
    reason: str | None = None
    script: str | None = None  # the script that this one is copied from


def read_definitions(path):
    """Returns {name: Definition} of what stands at a script's top level, and the lines of marks above nothing."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    definitions, marks = {}, {index for index, line in enumerate(lines, 1) if MARK.match(line)}
    unmarked = UNMARKED.search("".join(lines))
    for node in ast.parse("".join(lines)).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name, decorators = node.name, node.decorator_list
        elif isinstance(node, ast.Assign):
            name, decorators = ", ".join(map(ast.unparse, node.targets)), []
        else:
            continue
        first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
        mark = MARK.match(lines[first - 2]) if first > 1 else None
        found = Definition(first, node.end_lineno, "".join(lines[first - 1 : node.end_lineno]))
        found.kind, found.origin, found.reason = mark.groups() if mark else (None, None, None)
        found.script = unmarked[1] if unmarked else None
        definitions[name] = found
        marks.discard(first - 1)
    return definitions, sorted(marks)


def find_problems(scripts):
    """Yields (path, line, name, problem, the original or None) for marks that are not true or missing."""
    known = {path.name: (path, *read_definitions(path)) for path in scripts}
    owners = {}
    for file in sorted(known, key=lambda file: (file != SOURCE, file)):
        path, definitions, marks = known[file]
        for line in marks:
            yield path, line, "-", "a mark that is not directly above a function, class or constant", None
        for name, found in definitions.items():
            if found.kind is None and found.script and (found.script not in known or name in known[found.script][1]):
                found.kind, found.origin = "Copied from", found.script
            original = known[found.origin][1].get(name) if found.origin in known else None
            problem = None
            if found.kind is None:
                owner = owners.setdefault(name, file)
                problem = f"also in {owner}: mark it as copied or as a variant" if owner != file else None
            elif original is None or found.origin == file:
                problem = f"no original in {found.origin}"
            elif found.kind == "Variant of" and not found.reason:
                problem = f"a variant of {found.origin} without a reason"
            elif found.kind == "Variant of" and found.text == original.text:
                problem = f"a variant that does not differ from {found.origin}"
            elif found.kind == "Copied from" and found.text != original.text:
                problem = f"differs from {found.origin}"
            if problem:
                yield path, found.first, name, problem, original if problem.startswith("differs") else None


def fix(scripts):
    """Replaces drifted copies by their originals' text; again, as long as a copy of a copy is left."""
    while drifted := [found for found in find_problems(scripts) if found[-1]]:
        path, _, name, _, original = drifted[0]
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        copy = read_definitions(path)[0][name]
        lines[copy.first - 1 : copy.last] = [original.text]
        path.write_text("".join(lines), encoding="utf-8")
        print(f"{path}:{copy.first}: {name}: now as in the original")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fix", action="store_true", help="bring the originals' text into the copies")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="folder of the scripts")
    args = parser.parse_args(argv)
    scripts = sorted([*args.root.glob("train_*.py"), *args.root.glob("tools/prepare_shards.py")])
    if args.fix:
        fix(scripts)
    problems = list(find_problems(scripts))
    for path, line, name, problem, _ in problems:
        print(f"{path}:{line}: {name}: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
