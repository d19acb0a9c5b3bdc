"""Every method of conf/method/ conforms, also one that was added today; its random twin too.

All checks on LLaVA, the cheap ones elsewhere; `python -m pdrop.conformance METHOD` makes all of them on every family.

pytest tests/conformance
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from pdrop import attach
from pdrop.cli.compose import choices
from pdrop.conformance import behaviour, numbers
from pdrop.conformance.__main__ import main, subject_of
from pdrop.conformance.families import CLIP, CORE
from pdrop.conformance.suite import CHECKS, Check, run

ASKS_FOR_A_FOLDER = "cdpruner"  # see test_cdpruner_conforms
METHODS = [name for name in choices("method") if name not in ("none", ASKS_FOR_A_FOLDER)]
TWINS = [name for name in METHODS if not name.startswith("random") and name != "downsample"]
MORE = [
    ("sparsevlm_v1", ("method.scale=1",)),
    ("pyramiddrop", ("positions=original", "layers=[0,2,4]")),
    ("pyramiddrop", ("method.observe=-1",)),
    ("fastv", ("method.observe=0", "layers=[0]")),
    ("visionzip", ("method.contextual=2", "positions=original")),
    ("holov", ("method.crops=4",)),
    ("feather", ("schedule.adaptive=true",)),
    ("prumerge_plus", ("schedule.adaptive=true",)),
]
SUBJECTS = [*((name, ()) for name in METHODS), *MORE]
# variants of what is tried anyway
RARER = (
    "pyramiddrop_192",
    "pyramiddrop_128",
    "pyramiddrop_64",
    "prumerge_plus",
    "holov_redistributed",
    "cdpruner_embeddings",
    "random_fastv",
    "visionzip_pyramiddrop",
)
# whose way (where they look, what they drop by) another method has that is tried
ALIKE = (
    "fastervlm",
    "holov",
    "vispruner",
    "scope",
    "prumerge",
    "fitprune",
    "vtw",
    "v2drop",
    "uniform",
    "sparsevlm_plus",
    "feather",
    "hired",
    "hiprune",
    "sparsevlm_v1",
)
IN_FRONT = (
    "divprune",
    "fastervlm",
    "vispruner",
    "scope",
    "hired",
    "hiprune",
    "prumerge",
    "fitprune",
    "vtw",
    "v2drop",
    "dart",
)
ELSEWHERE = [check for check in CHECKS if check.families != "one" and check.made is not behaviour.identity]
OF_TWINS = [check for check in CHECKS if check.made in (numbers.counts, numbers.seeds, behaviour.alone)]


def marked(name: str, dials: tuple[str, ...]) -> Any:
    """A subject of a test; variants, and all but one of each way, are for the exhaustive run."""
    rarer = (name, dials) not in MORE[:2] if dials else name in (*RARER, *ALIKE)
    return pytest.param(name, dials, id=" ".join([name, *dials]), marks=pytest.mark.exhaustive if rarer else [])


def complaints(name: str, dials: tuple[str, ...], family: str, backend: str, checks: Sequence[Check]) -> list[str]:
    """What the checks find wrong."""
    found = run(subject_of(name, dials), [family], [backend], checks)
    return [f"{r.check}, {r.family}/{r.backend}: {r.message}" for r in found if r.outcome == "failed"]


@pytest.mark.parametrize(("name", "dials"), [marked(*subject) for subject in SUBJECTS])
def test_a_method_conforms(name: str, dials: tuple[str, ...]) -> None:
    assert complaints(name, dials, "llava", "sdpa", CHECKS) == []
    eager = [check for check in CHECKS if check.made is behaviour.causal]
    assert complaints(name, dials, "llava", "eager", eager) == []
    others = [family for family in CORE if family != "llava"]  # another one for each method
    family = others[zlib.crc32(f"{name} {dials}".encode()) % len(others)]
    assert complaints(name, dials, family, "sdpa", ELSEWHERE) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_conforms_on_every_kind_of_model(name: str, family: str) -> None:
    """As `python -m pdrop.conformance NAME` says: where a method has no rule for a tower nothing fails."""
    assert complaints(name, (), family, "sdpa", ELSEWHERE) == []


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive if name in (*RARER, *IN_FRONT) else []) for name in TWINS]
)
def test_its_random_twin_conforms(name: str) -> None:
    dials = ("twin=true", "method.scale=1") if name == "sparsevlm_v1" else ("twin=true",)
    assert complaints(name, dials, "llava", "sdpa", OF_TWINS) == []


class Words:
    """A tokenizer whose words are "w" and their id."""

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        """Every prompt's own words."""
        return [" ".join(f"w{n % 60}" for n in row) for row in rows]


@pytest.mark.exhaustive
def test_cdpruner_conforms(tmp_path: Path) -> None:
    text = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "eos_token_id": 2}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 40}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=CLIP, projection_dim=8)).save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({f"w{n}": n for n in range(64)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    subject = subject_of("cdpruner", (f"method.clip={tmp_path}",))
    subject = replace(subject, attach=partial(attach, tokenizer=Words()))
    found = [result for family in ("llava", "llava_next") for result in run(subject, [family], ["sdpa"])]
    # its closed form is for a question of one segment, as these are
    assert [(r.check, r.family, r.message) for r in found if r.outcome == "failed"] == []


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fastv", "ratio=0.25", "--family", "llava"]) == 0
    said = capsys.readouterr().out
    assert "2:0.25" in said and said.count("  ok ") == len(CHECKS) - 1 and "conforms" in said
    assert said.count("not applicable") == 1 and "  -       made tokens stand where it says" in said, "it makes none"
    assert main(["pdrop.conformance.broken.Lots", "--family", "llava"]) == 1
    said = capsys.readouterr().out
    assert "FAILED  the same seed, the same tokens" in said and "lost other tokens the second time" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pyramid"], "unknown method 'pyramid': choose cdpruner, "),
        (["none"], "nothing to check"),
        (["fastv", "ratio"], "dial=value"),
        (["fastv", "ratio=2"], "between 0 and 1"),
        (["pdrop.methods.base.View"], "without arguments"),
        (["pathlib.Path"], "is not a pdrop.methods.base.Method"),
    ],
)
def test_refusals(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dial", "told"), [("ratio=[1", "ratio=[1 cannot be read"), ("foo=1", "no dial 'foo'"), ("seed=-1", "seed is")]
)
def test_dials_that_cannot_be_are_one_line(dial, told, capsys):
    assert main(["fastv", dial]) == 1
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1
