"""The copy check on this repository, and how a script is laid out."""

import ast
import re
import shutil

import pytest
from conftest import ROOT, SCRIPTS, load_script

FIRST, SECOND, TOOL = "train_cd_multiboundary.py", "train_ct.py", "tools/prepare_shards.py"
copies = load_script(ROOT / "tools" / "copies.py")
SHARED = ("imports", "mathematics", "engine")


@pytest.fixture
def folder(tmp_path):
    """A copy of the scripts and of the tool that shares functions with them."""
    for path in (*ROOT.glob("train_*.py"), ROOT / TOOL):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    return tmp_path


@pytest.fixture
def check(folder, capsys):
    """Runs the tool; gives its exit status and its lines."""
    return lambda *flags: (copies.main(["--root", str(folder), *flags]), capsys.readouterr().out.splitlines())


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.py")}


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- the check


def test_the_repository_is_clean(check, folder):
    before = contents(folder)
    assert check() == (0, [])
    for name in SCRIPTS:
        assert check("--fix", f"{name}.py") == (0, [])
    assert contents(folder) == before


CHANGES = [
    ("imports", "import argparse\n", "import argparse \n"),
    ("imports", "logging.disable(logging.NOTSET)\n", "logging.disable(logging.INFO)\n"),
    ("mathematics", "square.mean(dim=1)", "square.mean(dim=0)"),
    ("engine", "# From here to the last line", "# from here to the last line"),
    ("engine", "torch.manual_seed(seed)", "torch.manual_seed(need)"),
    ("engine", "    main()\n", "    main()"),
]


@pytest.mark.parametrize("part, old, new", CHANGES)
@pytest.mark.parametrize("name", [FIRST, "train_tcd_distill_lora_sd_wds.py"])
def test_a_change_of_one_byte_is_found_named_and_mended(check, folder, name, part, old, new):
    before = contents(folder)
    edit(folder / name, old, new)
    status, lines = check()
    assert status == 1
    # the first script is what the others are held against
    blamed = {path.name for path in folder.glob("train_*.py")} - {FIRST} if name == FIRST else {name}
    assert {line.split(":")[0] for line in lines} >= blamed
    assert all(f"the {part} differs" in line for line in lines if line.split(":")[0] != "prepare_shards.py")
    status, lines = check("--fix", "train_lcm_distill_sd_wds.py")
    assert (status, lines) == (0, [f"{name}: {part} as in train_lcm_distill_sd_wds.py"])
    assert contents(folder) == before


def test_the_line_that_differs_is_shown(check, folder):
    edit(folder / SECOND, "square.mean(dim=1)", "square.mean(dim=0)")
    lines = "'return square.mean(dim=0)', not 'return square.mean(dim=1)'"
    assert check() == (1, [f"{SECOND}: the mathematics differs by 2 lines: {lines}"])
    edit(folder / SECOND, "square.mean(dim=0)", "square.mean(dim=1)")
    with open(folder / SECOND, "a", encoding="utf-8") as file:
        file.write("# more\n")
    assert check() == (1, [f"{SECOND}: the engine differs by 1 lines: its length"])


def test_what_is_a_methods_own_may_differ(check, folder):
    edit(folder / SECOND, "METHOD = ", "MORE = 1\nMETHOD = ")
    edit(folder / SECOND, '"""Consistency training', '"""Training for consistency')
    assert check() == (0, [])
    before = contents(folder)
    assert check("--fix", FIRST) == (0, []) and contents(folder) == before


def test_fix_takes_what_the_named_script_has(check, folder):
    """A change of the engine is made in one script, and brought into the others and the tool."""
    edit(folder / SECOND, "def first_line(error):\n", "def first_line(error):  # changed\n")
    edit(folder / FIRST, "def first_line(error):\n", "def first_line(error):  # otherwise\n")
    assert check("--fix", SECOND)[0] == 0
    found = contents(folder)
    assert sum(b"def first_line(error):  # changed\n" in text for text in found.values()) == 7
    assert not [name for name, text in found.items() if b"# otherwise" in text]
    before, after = ((path / "train_ct.py").read_text(encoding="utf-8") for path in (ROOT, folder))
    assert after == before.replace("def first_line(error):\n", "def first_line(error):  # changed\n")


@pytest.mark.parametrize("old, new, message", [
    ("# Copied from the engine\ndef fail(message):\n    ", "# Copied from the engine\ndef fail(message):\n     ",
     "the fail differs by"),
    ("# Copied from the engine\ndef fail(", "def fail(", "fail is the engine's, without the mark"),
    ("# Copied from the engine\ndef fail(", "# Copied from the engine\n\ndef fail(",
     "a mark that is not directly above a definition"),
    ("# Copied from the engine\ndef fail(", "# Copied from the engine\ndef fall(",
     "fall is marked, and does not stand in train_"),
])  # fmt: skip
def test_functions_of_the_tool(check, folder, old, new, message):
    if "     " in new:  # a file that cannot be parsed would tell nothing
        new = old.replace("(message)", "(message )")
    edit(folder / TOOL, old, new)
    status, lines = check()
    assert status == 1 and [line for line in lines if line.startswith("prepare_shards.py: ") and message in line]
    if "differs" in message:
        assert check("--fix", FIRST) == (0, [f"prepare_shards.py: fail as in {FIRST}"])
        assert contents(folder) == contents_of_repository(folder)
    else:  # what needs a person stays
        assert check("--fix", FIRST)[0] == 1


def contents_of_repository(folder):
    return {name: (ROOT / name).read_bytes() for name in contents(folder)}


@pytest.mark.parametrize("flags", [["--fix", "train_gone.py"], ["--fix", "prepare_shards.py"], ["--fix"]])
def test_a_script_that_is_none(check, capsys, flags):
    with pytest.raises(SystemExit) as end:
        check(*flags)
    assert end.value.code == 2 and "--fix" in capsys.readouterr().err


def test_a_banner_that_is_gone(check, folder):
    edit(folder / SECOND, "mathematics that all six share", "mathematics that all Six share")
    with pytest.raises(SystemExit, match=f"{SECOND}: no banner for: mathematics"):
        check()


def test_banners_in_another_order(check, folder):
    text = (folder / SECOND).read_text(encoding="utf-8")
    parts, names = copies.read_parts(folder / SECOND), ["docstring", "imports", "mathematics", "method", "engine"]
    assert "".join(parts.values()) == text and list(parts) == names
    swapped = [parts[name] for name in ("docstring", "imports", "method", "mathematics", "engine")]
    (folder / SECOND).write_text("".join(swapped), encoding="utf-8")
    with pytest.raises(SystemExit, match=f"{SECOND}: its parts are not in the order imports, mathematics, method"):
        check()


# ------------------------------------------------------------------------------------------------- a script's layout

PARTS = {name: copies.read_parts(ROOT / f"{name}.py") for name in SCRIPTS}
# the imports begin with the end of the docstring
TREES = {name: {part: ast.parse('"""' * (part == "imports") + text) for part, text in parts.items()
                if part != "docstring"} for name, parts in PARTS.items()}  # fmt: skip
ENGINE = PARTS["train_ct"]["engine"]
BANNER = ENGINE.partition("\nlogger = ")[0]


def defined(tree):
    """The names that a part defines at the top level."""
    names = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    return names | {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def used(*trees):
    return {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)}


def hooks():
    """The names in the first column of the banner's table."""
    table = re.search(r"^#   METHOD .*?\n#\n", BANNER, re.MULTILINE | re.DOTALL)[0]
    return re.findall(r"^#   (\w+)  ", table, re.MULTILINE)


@pytest.mark.parametrize("name", SCRIPTS)
def test_docstring_says_where_the_method_ends(name):
    docstring = ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")))
    last = 'The method ends at the banner "the engine"; below it all six scripts are the same.'
    assert docstring.rstrip().endswith(last)
    assert f"accelerate launch {name}.py" in docstring and re.search(r"\b\d{4}\.\d{5}\b", docstring)  # a paper


def test_banner_of_the_engine():
    first, *rest = BANNER.splitlines()
    assert first.startswith("# ====") and first.endswith(" the engine") and len(first) <= 120
    assert all(line.startswith("#") for line in rest) and "tools/copies.py" in BANNER
    names = re.findall(r"^# -+ (.+)\n", ENGINE, re.MULTILINE)
    listed = re.search(r"Its sections: (.*)\.", BANNER.replace("\n# ", " "))[1]
    assert re.sub(r" \([^)]*\)", "", listed).split(" · ") == names


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_the_hooks_and_the_engine_uses_them(name):
    method, engine = (TREES[name][part] for part in ("method", "engine"))
    assert {"METHOD", "DEFAULTS", "draw", "consistency_loss", "usage"} <= {*hooks()}
    assert {*hooks()} <= defined(method)
    assert {*hooks()} <= used(engine)
    assert not used(engine) & (defined(method) - {*hooks()})  # and nothing else of the method


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_name_is_defined_twice(name):
    method, engine, mathematics = (defined(TREES[name][part]) for part in ("method", "engine", "mathematics"))
    assert not method & engine and not method & mathematics and not engine & mathematics
    for part, tree in TREES[name].items():
        names = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        assert len(names) == len({*names}), part


def test_every_script_defines_the_same_fields_of_its_method():
    fields = {name: next({keyword.arg for keyword in node.value.keywords} for node in trees["method"].body
                         if isinstance(node, ast.Assign) and node.targets[0].id == "METHOD")
              for name, trees in TREES.items()}  # fmt: skip
    asked = {*re.findall(r"METHOD\.(\w+)", ENGINE)}
    assert {frozenset(names) for names in fields.values()} == {frozenset(asked)}
    assert asked == {*re.findall(r"\b(?:name|papers|tag|scheduler|has_teacher|target_drops)\b", BANNER)}


def test_imports_are_used():
    imported = [alias.asname or alias.name for node in ast.walk(TREES["train_ct"]["imports"])
                if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names]  # fmt: skip
    everywhere = used(*(tree for trees in TREES.values() for tree in trees.values()))
    assert [name for name in imported if name.partition(".")[0] not in everywhere] == []
    assert len(imported) == len({*imported}) > 50


def test_every_function_of_the_engine_and_of_the_mathematics_is_used():
    for name, trees in TREES.items():
        functions = {node.name for part in ("mathematics", "engine", "method") for node in trees[part].body
                     if isinstance(node, ast.FunctionDef)}  # fmt: skip
        assert functions - used(*trees.values()) == set(), name


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_function_is_longer_than_sixty_lines(name):
    nodes = [node for tree in TREES[name].values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert {node.name: length for node in nodes if (length := node.end_lineno - node.lineno + 1) > 60} == {}


def test_the_two_lora_scripts_differ_from_the_whole_ones_in_words_and_defaults():
    """So that what tests say of one method holds for both of its scripts."""
    for one, other in (("train_lcm_distill_sd_wds", "train_lcm_distill_lora_sdxl_wds"),
                       ("train_tcd_distill_sd_wds", "train_tcd_distill_lora_sd_wds")):  # fmt: skip
        bodies = [[ast.dump(node) for node in TREES[name]["method"].body if not isinstance(node, ast.Assign)]
                  for name in (one, other)]  # fmt: skip
        assert bodies[0] == bodies[1] and len(bodies[0]) > 8
