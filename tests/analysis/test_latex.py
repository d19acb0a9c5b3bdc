r"""LaTeX for papers: captions and budgets in words, few columns, numbers as commands; braces and columns are balanced.

python -m pytest tests/analysis/test_latex.py
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from analysis.__main__ import main
from tests.support.records import make_record, put


@pytest.fixture
def store(tmp_path: Path) -> Path:
    put(tmp_path, make_record("none", 1.0))
    for ratio, budget in ((0.5, "avg_tokens:29"), (0.3, "flops:0.4")):
        put(tmp_path, make_record("pyramiddrop", ratio), budget=budget)
        put(tmp_path, make_record("fastv", ratio), budget=budget)
    return tmp_path


def sound(text: str) -> None:
    """What TeX would stumble over: braces, environments, cells per row."""
    plain = re.sub(r"\\[{}%&]", "", re.sub(r"(?<!\\)%.*", "", text))
    depth = 0
    for character in plain:
        depth += (character == "{") - (character == "}")
        assert depth >= 0
    assert depth == 0
    opened: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\{([a-z*]+)\}", plain):
        if kind == "begin":
            opened.append(name)
        else:
            assert opened.pop() == name
    assert not opened and plain.count("$") % 2 == 0
    for columns, body in re.findall(r"\\begin\{tabular\}\{([lr]+)\}(.*?)\\end\{tabular\}", plain, flags=re.S):
        for line in body.split(r"\\"):
            cells = re.sub(r"\\(toprule|midrule|bottomrule)", "", line).strip()
            assert not cells or "multicolumn" in cells or cells.count("&") == len(columns) - 1, cells


def test_budgets_and_captions_are_in_words(store: Path) -> None:
    assert main(["tables", "demo", "--results", str(store)]) == 0
    text = (store / "tables/demo.tex").read_text()
    sound(text)
    assert "29 tokens on average" in text and r"40 \% of the FLOPs" in text
    assert "avg\\_tokens" not in text and "samples of 3 tasks" in text


def test_few_columns_and_a_caption_of_ones_own(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tables", "demo", "--results", str(store), "--compact"]) == 0
    text = (store / "tables/demo.tex").read_text()
    sound(text)
    assert text.count(r"\begin{tabular}") == 1 and r"{llrrr}" in text
    wish = ["--columns", "method, tokens, count, average", "--caption", "50 % of_all {x}"]
    assert main(["tables", "demo", "--results", str(store), *wish]) == 0
    text = (store / "tables/demo.tex").read_text()
    sound(text)
    assert r"\caption{50 \% of\_all \{x\}}" in text and "method & tokens & count & average" in text
    capsys.readouterr()
    assert main(["tables", "demo", "--results", str(store), "--columns", "methud"]) == 1
    told = capsys.readouterr().err
    assert "no column 'methud'; there are: budget, method" in told and len(told.splitlines()) == 1


def test_numbers_are_commands(store: Path) -> None:
    assert main(["tables", "demo", "--results", str(store), "--macros"]) == 0
    text = (store / "tables/demo-macros.tex").read_text()
    sound(text)
    names = re.findall(r"\\newcommand\{\\([A-Za-z]+)\}\{", text)
    assert len(names) == len(set(names)) == text.count("newcommand") > 20, "letters alone, each once"
    (value,) = re.findall(r"\\DemoFastVFlopsZeroPointFourAverage\}\{([\d.]+)\}", text)
    csv = (store / "tables/demo.md").read_text()
    assert value in csv
