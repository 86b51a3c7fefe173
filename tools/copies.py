#!/usr/bin/env python
"""Checks that what the six training scripts share is the same to the byte in all of them.

Of a script that is the import block (from the docstring to the line "# --- mathematics that all six share"), that
mathematics (to "# --- the method"), and the engine (from the line "# ==== the engine" to the end).
tools/prepare_shards.py shares functions and constants with the engine: those below a line "# Copied from the engine".

    python tools/copies.py                         checks: a line for each part that differs, and exit status 1
    python tools/copies.py --fix train_lcm_….py    brings what that script has into the others, then checks
"""

import argparse
import ast
import difflib
import re
import sys
from pathlib import Path

BANNERS = {"imports": r'^"""\n(?=\nimport )', "mathematics": r"^# -+ mathematics that all six share\n",
           "method": r"^# -+ the method\n", "engine": r"^# =+ the engine\n"}  # fmt: skip
SHARED = ("imports", "mathematics", "engine")
MARK = "# Copied from the engine\n"


def read_parts(path):
    """Returns {name: text} of a script, in its order, which joined are the file; each begins with its banner."""
    text = path.read_text(encoding="utf-8")
    found = {name: re.search(pattern, text, re.MULTILINE) for name, pattern in BANNERS.items()}
    if missing := [name for name, match in found.items() if not match]:
        raise SystemExit(f"{path}: no banner for: {', '.join(missing)}")
    starts = [0, *(match.start() for match in found.values()), len(text)]
    if starts != sorted(starts):
        raise SystemExit(f"{path}: its parts are not in the order {', '.join(BANNERS)}")
    names = ("docstring", *BANNERS)
    return {name: text[a:b] for name, a, b in zip(names, starts, starts[1:], strict=False)}


def read_definitions(text):
    """Returns {name: (first line, last line, text)} of a file's functions, classes and constants; decorators count."""
    lines, found = text.splitlines(keepends=True), {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            name, first = node.name, min([node.lineno, *(each.lineno for each in node.decorator_list)])
        elif isinstance(node, ast.Assign):
            name, first = ", ".join(map(ast.unparse, node.targets)), node.lineno
        else:
            continue
        found[name] = first, node.end_lineno, "".join(lines[first - 1 : node.end_lineno])
    return found


def describe(name, theirs, ours):
    """A line that says where a part differs first."""
    pairs = enumerate(zip(theirs.splitlines(), ours.splitlines(), strict=False))
    line = next((f": {b.strip()[:60]!r}, not {a.strip()[:60]!r}" for _, (a, b) in pairs if a != b), ": its length")
    count = sum(text[:1] in "+-" for text in difflib.ndiff(theirs.splitlines(), ours.splitlines()))
    return f"the {name} differs by {count} lines{line}"


def check_scripts(scripts, source, fix):
    """Yields (path, problem) for every script whose shared parts are not those of `source`."""
    wanted = read_parts(source)
    for path in scripts:
        parts = read_parts(path)
        different = [name for name in SHARED if parts[name] != wanted[name]]
        if fix and different:
            path.write_text("".join({**parts, **{name: wanted[name] for name in SHARED}}.values()), encoding="utf-8")
            print(f"{path.name}: {', '.join(different)} as in {source.name}")
        else:
            yield from ((path, describe(name, wanted[name], parts[name])) for name in different)


def check_tool(path, source, fix):
    """Yields (path, problem) for the marked definitions of a tool that are not those of the script `source`."""
    originals, text = read_definitions(source.read_text(encoding="utf-8")), path.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    marks = {index for index, line in enumerate(lines, 1) if line == MARK}
    for name, (first, last, ours) in reversed(read_definitions(text).items()):  # from below: line numbers stay true
        if first - 1 not in marks:
            if originals.get(name, (0, 0, ""))[2] == ours:
                yield path, f"{name} is the engine's, without the mark {MARK.strip()!r}"
            continue
        marks.discard(first - 1)
        original = originals.get(name, (0, 0, ""))[2]
        if not original:
            yield path, f"{name} is marked, and does not stand in {source.name}"
        elif original != ours and fix:
            lines[first - 1 : last] = [original]
            print(f"{path.name}: {name} as in {source.name}")
        elif original != ours:
            yield path, describe(name, original, ours)
    yield from ((path, f"line {mark}: a mark that is not directly above a definition") for mark in sorted(marks))
    if fix:
        path.write_text("".join(lines), encoding="utf-8")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fix", metavar="FROM_SCRIPT", help="bring what this script has into the others")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="folder of the scripts")
    args = parser.parse_args(argv)
    scripts = sorted(args.root.glob("train_*.py"))
    source = args.root / Path(args.fix).name if args.fix else scripts[0]
    if source not in scripts:
        parser.error(f"--fix {args.fix} is none of {', '.join(path.name for path in scripts)}")
    problems = list(check_scripts(scripts, source, bool(args.fix)))
    for tool in args.root.glob("tools/prepare_shards.py"):
        problems += check_tool(tool, source, bool(args.fix))
    for path, problem in problems:
        print(f"{path.name}: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
