"""Captions: what each figure shows and what its bars mean, for the report and the descriptions inside the files.

An axis label names its axis; everything else that a reader must know is here.
"""

from __future__ import annotations

PAIRED = "bars are 95 % intervals of the paired difference to dropping nothing, drawn around the score"
AMONG = "white is what two random sets share, the darkest cell what the most alike ones do; cells hold % of the union"
CAPTIONS = {  # by the end of a figure's name; the longest that fits
    "tradeoff": f"Average score against prefill FLOPs; {PAIRED}. Scores of rows with several seeds are their means. "
    "A grey front joins the methods that no other one beats at lower cost, where methods are many",
    "tradeoff-tasks": f"Score of each task against prefill FLOPs; {PAIRED}",
    "front": f"Many methods: average score at each budget beside dropping at random, and against cost; {PAIRED}",
    "by-task": "Many methods: score of each task at each budget in %, shaded from the blind guess to dropping nothing; "
    "framed where above all seeds of the random twin, underlined where below all",
    "redundancy": f"One cut at layer k: average score against what is kept there; {PAIRED}. Thin lines lead to the run "
    "that drops nothing",
    "redundancy-tasks": f"One cut at layer k: score of each task against what is kept there; {PAIRED}",
    "redundancy-map": "One cut at layer k: what is lost, and what the ranking is worth, in points; bold where the 95 % "
    "interval of the paired difference leaves out 0. The last panel has a colour scale of its own",
    "redundancy-models": f"One cut at layer k: models side by side; {PAIRED} of the same model. Each panel has a scale "
    "of its own",
    "overlap": f"Do layers keep the same tokens? Tokens kept by both / by either; {AMONG}",
    "attention": "Attention on the image by layer: mean over heads with its 95 % interval over images, each head in "
    "grey, and what attention spread evenly would give. Each panel has a scale of its own",
    "attention-heads": "Attention on the image by layer and head",
    "attention-tasks": "Attention on the image by task and layer",
    "attention-stability": f"Do layers attend to the same tokens? Best attended by both / by either; {AMONG}",
    "break_even": "Speed-up of a whole answer against its length: above 1 dropping pays; bands are 95 % bootstrap "
    "intervals of the paired ratios, dotted curves were measured under conditions that do not count",
    "trainings": "What training with dropping does: left scores, right differences of the same seeds; bars are 95 % "
    "intervals (paired bootstrap over images and seeds)",
}


def caption(stem: str) -> str:
    """The caption of a figure by its file stem; "" if it is not known (an overlay, a user's own figure)."""
    fitting = [ending for ending in CAPTIONS if stem == ending or stem.endswith(f"-{ending}")]
    return f"{CAPTIONS[max(fitting, key=len)]}." if fitting else ""
