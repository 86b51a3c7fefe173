"""The copy check, on made-up scripts and on this repository."""

import pytest
from conftest import ROOT, load_script

NAME = "train_lcm_distill_sd_wds.py"
MARK = f"# Copied from {NAME}\n"
SOURCE = '''import functools


def helper(x):
    """Adds."""
    return x + 1  # one


@functools.cache
@functools.wraps(
    helper,
)
def cached(x):
    return helper(x)


class Thing:
    def method(self):
        return 1


def loss():
    return 0
'''
COPY = SOURCE.replace("def helper", MARK + "def helper").replace("@functools.cache", MARK + "@functools.cache")
COPY = COPY.replace("class", MARK + "class")
COPY = COPY.replace("def loss():\n    return 0", f"# Variant of {NAME}: the method\ndef loss():\n    return 2")


@pytest.fixture(scope="module")
def copies():
    return load_script(ROOT / "tools" / "copies.py")


@pytest.fixture
def check(copies, tmp_path, capsys):
    """Writes the source, its copy and more scripts, runs the tool; gives its exit status and its lines."""

    def run(copy, *flags, **more):
        for name, text in {NAME.removesuffix(".py"): SOURCE, "train_copy": copy, **more}.items():
            (tmp_path / f"{name}.py").write_text(text)
        status = copies.main(["--root", str(tmp_path), *flags])
        return status, capsys.readouterr().out.replace(f"{tmp_path}/", "").splitlines()

    return run


def test_clean(check):
    assert check(COPY) == (0, [])


@pytest.mark.parametrize(
    ("old", "new", "line", "name"),
    [
        ("return x + 1  # one", "return x + 1  # 1", 5, "helper"),
        ("    helper,\n)", "    helper, ()\n)", 11, "cached"),
        ("@functools.cache\n", "", 11, "cached"),
        ("return 1\n", "return 2\n", 20, "Thing"),
    ],
)
def test_drift_is_found_and_fixed(check, tmp_path, old, new, line, name):
    assert check(COPY.replace(old, new, 1)) == (1, [f"train_copy.py:{line}: {name}: differs from {NAME}"])
    status, lines = check(COPY.replace(old, new, 1), "--fix")
    assert (status, len(lines)) == (0, 1)
    assert (tmp_path / "train_copy.py").read_text() == COPY
    assert (tmp_path / NAME).read_text() == SOURCE


def test_fix_follows_chains_and_keeps_the_rest(check, tmp_path):
    chain = "# of its own\nONE = 1\n\n\n# Copied from train_copy.py\ndef helper(x):\n    return 3\n\n\nTWO = 2\n"
    drifted = COPY.replace("x + 1", "x + 2").replace("return 1\n", "return 2\n")
    assert check(drifted, "--fix", train_a=chain)[0] == 0
    assert (tmp_path / "train_copy.py").read_text() == COPY
    fixed = chain.replace("    return 3\n", '    """Adds."""\n    return x + 1  # one\n')
    assert (tmp_path / "train_a.py").read_text() == fixed


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (MARK + "def", "# Copied from train_gone.py\ndef", "5: helper: no original in train_gone.py"),
        (MARK + "def", "# Copied from train_copy.py\ndef", "5: helper: no original in train_copy.py"),
        ("helper(x)", "helped(x)", f"5: helped: no original in {NAME}"),
        (MARK + "class", "class", f"19: Thing: also in {NAME}: mark it as copied or as a variant"),
        (MARK + "class", MARK + "\nclass", "19: -: a mark that is not directly above a function, class or constant"),
        (": the method", ":", f"26: loss: a variant of {NAME} without a reason"),
        (": the method", "", f"26: loss: a variant of {NAME} without a reason"),
        ("return 2", "return 0", f"26: loss: a variant that does not differ from {NAME}"),
    ],
)
def test_problems_that_need_a_person(check, old, new, problem):
    for flags in ([], ["--fix"]):
        status, lines = check(COPY.replace(old, new, 1), *flags)
        assert status == 1 and f"train_copy.py:{problem}" in lines


WHOLE = f"""# Unmarked: copied from {NAME}, where it stands there too
import functools
# ------------------------ a
{SOURCE.removeprefix("import functools").strip().partition("class")[0].strip()}


def new():
    return 3


# ------------------------ b
class Thing:
    def method(self):
        return 1


def loss_here():
    return 2
"""


def test_a_line_at_the_top_is_a_mark_for_all_without_one(check, tmp_path):
    assert check(WHOLE) == (0, [])
    drifted = WHOLE.replace("return helper(x)", "return helper(x + 1)").replace("return x + 1  # one", "return x")
    assert check(drifted)[1] == [f"train_copy.py:4: helper: differs from {NAME}",
                                 f"train_copy.py:9: cached: differs from {NAME}"]  # fmt: skip
    assert check(drifted, "--fix")[0] == 0
    assert (tmp_path / "train_copy.py").read_text() == WHOLE
    variant = drifted.replace("def helper", f"# Variant of {NAME}: adds nothing\ndef helper").replace("x + 1)", "x)")
    assert check(variant) == (0, [])
    own = WHOLE.partition("\n")[2]
    assert check(own)[1][-1] == f"train_copy.py:21: Thing: also in {NAME}: mark it as copied or as a variant"
    gone = WHOLE.replace(f"copied from {NAME},", "copied from train_gone.py,")
    assert "train_copy.py:4: helper: no original in train_gone.py" in check(gone)[1]


def test_constants_are_checked_too(check):
    source = "LIMIT = 3\nA, B = 1, 2\n"
    marked = "".join(f"# Copied from train_a.py\n{line}\n" for line in source.splitlines())
    assert check(COPY, train_a=source, train_b=marked) == (0, [])
    status, lines = check(COPY, train_a=source, train_b=marked.replace("3", "4").replace("1, 2", "1, 3"))
    assert lines == ["train_b.py:2: LIMIT: differs from train_a.py", "train_b.py:4: (A, B): differs from train_a.py"]


def test_unmarked_twice_outside_the_source(check):
    status, lines = check(COPY, train_a="def f():\n    pass\n", train_b="def f():\n    return 1\n")
    assert (status, lines) == (1, ["train_b.py:1: f: also in train_a.py: mark it as copied or as a variant"])


def test_repository_is_clean(copies, capsys):
    assert copies.main([]) == 0, capsys.readouterr().out
