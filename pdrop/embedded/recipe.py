"""The recipe: which images and questions the model sees, in which order, at which rates. All budgets are in images.

What each stage is for:
- tower: the vision tower learns to name what each patch shows. Reading needs its characters right first.
- retrieval: the decoder learns to look a word up in the image. Scenes of distinct things, every thing asked both ways.
  The look-up appears within 150 steps; with other questions mixed in from the start it does not.
- first mix: everything at once. Attributes and charts come, the rest does not.
- places: the tower had forgotten where its patches are (rows could not be read from its features), so that no "where"
  could be learned. It gets the patch's own row and column as two more labels.
- where: a warm-up for positions and existence in the manner of "retrieval".
- second mix: everything that had begun to be learned.
- boards: the tower learns plates of all colours with codes, whose characters each lie on the middle of some patch.
- projector: linear heads behind the projector are taught the patch labels, while its output moves little from what the
  decoder already reads (`keep`). Before, the characters were behind it, but quiet, and the decoder never found them.
- spelling: behind the last layer, the visual tokens' own rows learn to name the character they show (`spell`), so that
  an answer has only to copy it. Questions hardly learn to read meanwhile.
- reading: begins anew with codes of one or two characters, many to an image; reading comes within 25 steps.
- third mix: everything, at falling rates.
- choices: multiple choice, many questions an image, each step foretold (hints.py). Behind the options the right one is
  told from the wrong ones first (65 % after 125 steps, 81 % after 250), and the letter is copied from there after that:
  29 % at step 300, 51 % 50 steps on, 92 % another 225 on. Without hints choices stayed at chance in every stage before.
- counts: after 250 steps of "choices" 155 of 160 counts of one were right, 15 of 51 of none, none of 52 of two: of most
  things in a scene there is one. The drill asks for the others.
- last mix: everything, documents and relations little, at falling rates. Position came with them: .60 to .87.
- fields: existence was right in 116 of 116 questions about things in scenes, and in 45 of 90 about a document's fields,
  which were hardly asked. The drill asks for all labels. Documents came along: 16 to 47 % of the test split.
From "spelling" on answers are foretold inside the questions (hints.py); what that adds but for choices was not told
apart.

What did not work, and why as far as it is known:
- Reading without "projector" and "spelling": three warm-ups left the answers at the frequencies of characters. A sign a
  scene gives 30 characters a step, where even a linear probe on the tower's features needs ten thousand to name 80 %.
- A fresh decoder behind a projector that was taught on patch labels alone. It read from the beginning (spelled .74
  after 30 steps; documents .27, chains of two look-ups .47, positions .56 after 570) and looked up by shape (.97), but
  never by colour: .33 of three things after some twenty thousand questions, whatever was tried for 30 to 100 steps
  (colours alone, six things a scene, colour words that begin as the mean of their patches, the answer foretold at the
  word).

The shipped model came out of this recipe with departures. Up to "second mix", budgets were chosen while the training
ran: the rates of "tower" fell later than written here (until step 1600 as if it had 2500 steps), those of "retrieval"
not at all, "second mix" was lengthened twice (choice and relation had their present weights from step 375 on only), and
the tower's labels for row and column, and the questions on position and existence, came with "places" and "where";
characters were labelled in two halves of a patch, and codes stood closer together. "boards" and "projector" ran on
other images of the train split. "third mix" had hints in drills and boards only; in the first half of "choices" "yes"
was foretold behind the right option, not its letter; and the second word of a place is foretold since "counts". The
rest as it is written, in two processes. A fresh run will be near the shipped model, not equal to it.
"""

from __future__ import annotations

from dataclasses import replace

from .scenes import Level
from .stage import Stage
from .vocabulary import FAMILIES

_EARLY = Level(objects=(2, 3), characters=(1, 2), rows=(2, 3), bars=(2, 3), plates=(2, 4))

# What the stages from "spelling" on share.
_LATE = Stage(
    "late",
    images=0,
    hinted=True,
    blocks=5,
    bridge_weight=0.1,
    spell=0.1,
    learning_rate=0.015,
    adam_rate=1.5e-3,
    warm_up=20,
    decay=0.0,
)

RECIPE = (
    Stage(
        "tower",
        images=64_000,
        mix={"page": 0.4, "scene": 0.3, "document": 0.22, "chart": 0.08},
        asks=False,
        tower_rate=1.0,
        patch_weight=1.0,
        decay=0.4,
        floor=0.02,
    ),
    Stage(
        "retrieval",
        images=8_000,
        mix={"scene": 1.0},
        drills={"retrieval": 1.0},
        families={"attribute": 1.0},
        blocks=4,
        start=Level(objects=(2, 3), distinct=True),
        growth=0.8,
        decay=0.1,
        floor=0.5,
    ),
    Stage(
        "first mix",
        images=9_600,
        batch=24,
        families=dict.fromkeys(FAMILIES, 1.0) | {"existence": 0.7, "attribute": 0.6, "choice": 0.6},
        start=Level(objects=(2, 4), characters=(1, 2), rows=(1, 3), bars=(2, 4)),
        growth=0.78,
        learning_rate=0.015,
        decay=0.0,
    ),
    Stage(
        "places",
        images=4_800,
        mix={"page": 0.25, "scene": 0.45, "document": 0.2, "chart": 0.1},
        asks=False,
        tower_rate=0.3,
        patch_weight=1.0,
        warm_up=20,
        decay=0.5,
    ),
    Stage(
        "places, settled",
        images=4_800,
        mix={"page": 0.25, "scene": 0.45, "document": 0.2, "chart": 0.1},
        asks=False,
        tower_rate=0.12,
        patch_weight=1.0,
        warm_up=10,
        decay=0.8,
    ),
    Stage(
        "where",
        images=4_800,
        mix={"scene": 1.0},
        drills={"retrieval": 1.0},
        families={"attribute": 0.5, "position": 1.0, "existence": 0.5},
        blocks=5,
        start=Level(objects=(2, 3), distinct=True),
        growth=0.8,
        warm_up=20,
        decay=0.0,
    ),
    Stage(
        "second mix",
        images=15_600,
        batch=24,
        mix={"scene": 0.62, "document": 0.1, "chart": 0.28},
        # Reading and documents are left out: not learned in this budget, their loss only adds noise to the others.
        families=dict.fromkeys(FAMILIES, 1.0)
        | {"attribute": 0.6, "choice": 0.2, "relation": 0.5, "reading": 0.0, "document": 0.0},
        start=Level(objects=(2, 4)),
        growth=0.3,
        warm_up=20,
        decay=0.5,
    ),
    Stage(
        "boards",
        images=8_000,
        mix={"board": 0.3, "page": 0.15, "scene": 0.3, "document": 0.15, "chart": 0.1},
        asks=False,
        tower_rate=0.25,
        patch_weight=1.0,
        warm_up=10,
        decay=0.7,
    ),
    Stage(
        "projector",
        images=4_480,
        mix={"board": 0.3, "page": 0.15, "scene": 0.3, "document": 0.15, "chart": 0.1},
        asks=False,
        bridge_weight=1.0,
        keep=3.0,
        loudness=4.0,
        adam_rate=1e-2,
        warm_up=5,
        decay=0.5,
    ),
    replace(
        _LATE,
        name="spelling",
        images=6_400,
        mix={"scene": 0.45, "document": 0.25, "chart": 0.1, "board": 0.2},
        drills={"retrieval": 0.15, "sides": 0.25, "letters": 0.25},
        start=_EARLY,
        growth=1.6,
        spell=0.3,
    ),
    replace(
        _LATE,
        name="reading",
        images=9_600,
        mix={"board": 0.35, "document": 0.3, "scene": 0.25, "chart": 0.1},
        drills={"retrieval": 0.15, "sides": 0.25, "letters": 0.25},
        start=_EARLY,
        growth=0.9,
        spell=0.2,
        learning_rate=0.02,
        adam_rate=2e-3,
        warm_up=10,
    ),
    replace(
        _LATE,
        name="third mix",
        images=12_800,
        mix={"scene": 0.5, "document": 0.25, "chart": 0.12, "board": 0.13},
        drills={"retrieval": 0.25},
        # Not learned so far, their loss only adds noise to the others: relations and choices are asked less.
        families=dict.fromkeys(FAMILIES, 1.0) | {"attribute": 0.6, "choice": 0.2, "relation": 0.4},
        decay=0.75,
    ),
    replace(
        _LATE,
        name="choices",
        images=9_600,
        mix={"scene": 0.8, "document": 0.06, "chart": 0.08, "board": 0.06},
        families=dict.fromkeys(FAMILIES, 1.0) | {"attribute": 0.3, "relation": 0.3},
        drills={"letters": 0.45, "retrieval": 0.2},
    ),
    replace(
        _LATE,
        name="counts",
        images=9_600,
        mix={"scene": 0.8, "document": 0.06, "chart": 0.07, "board": 0.07},
        families=dict.fromkeys(FAMILIES, 1.0) | {"attribute": 0.3, "relation": 0.3},
        drills={"letters": 0.3, "counts": 0.2, "retrieval": 0.25},
    ),
    replace(
        _LATE,
        name="last mix",
        images=22_400,
        mix={"scene": 0.75, "document": 0.06, "chart": 0.08, "board": 0.11},
        families=dict.fromkeys(FAMILIES, 1.0) | {"attribute": 0.25, "existence": 0.6, "relation": 0.3, "choice": 0.7},
        drills={"letters": 0.1, "counts": 0.2, "retrieval": 0.3},
        warm_up=10,
        decay=0.9,
        floor=0.04,
    ),
    replace(
        _LATE,
        name="fields",
        images=11_200,
        mix={"scene": 0.42, "document": 0.42, "chart": 0.09, "board": 0.07},
        families=dict.fromkeys(FAMILIES, 1.0) | {"attribute": 0.2, "relation": 0.2, "choice": 0.7},
        drills={"retrieval": 0.3, "counts": 0.15, "fields": 0.7},
        learning_rate=0.008,
        adam_rate=8e-4,
        warm_up=10,
        decay=0.85,
        floor=0.03,
    ),
)
