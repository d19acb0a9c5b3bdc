"""pdrop: dropping visual tokens in large vision-language models, measured so that every number can be believed.

    from pdrop import attach, pyramid, single, solve, PyramidDrop, FastV, SparseVLM, RandomDrop

    with attach(model, PyramidDrop(positions="compact"), pyramid(num_layers=32)) as trace:
        model.generate(**inputs)

Names are imported on first use, so that `import pdrop` costs nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

_HOMES = {
    "Schedule": "pdrop.schedule",
    "Stage": "pdrop.schedule",
    "pyramid": "pdrop.schedule",
    "single": "pdrop.schedule",
    "sparsevlm": "pdrop.methods.sparsevlm_schedules",
    "sparsevlm_v1": "pdrop.methods.sparsevlm_schedules",
    "solve": "pdrop.cost.budget",
    "attach": "pdrop.engine",
    "Trace": "pdrop.engine",
    "Method": "pdrop.methods.base",
    "DivPrune": "pdrop.methods.divprune",
    "DART": "pdrop.methods.dart",
    "V2Drop": "pdrop.methods.v2drop",
    "VTW": "pdrop.methods.vtw",
    "FEATHER": "pdrop.methods.feather",
    "FitPrune": "pdrop.methods.fitprune",
    "VisionZip": "pdrop.methods.visionzip",
    "FasterVLM": "pdrop.methods.fastervlm",
    "VisPruner": "pdrop.methods.vispruner",
    "HiPrune": "pdrop.methods.hiprune",
    "HoloV": "pdrop.methods.holov",
    "SCOPE": "pdrop.methods.scope",
    "HiRED": "pdrop.methods.hired",
    "PruMerge": "pdrop.methods.prumerge",
    "Composed": "pdrop.methods.composed",
    "CDPruner": "pdrop.methods.cdpruner",
    "CDPrunerEmbeddings": "pdrop.methods.cdpruner_embeddings",
    "PyramidDrop": "pdrop.methods.pyramiddrop",
    "FastV": "pdrop.methods.fastv",
    "SparseVLM": "pdrop.methods.sparsevlm",
    "SparseVLMPlus": "pdrop.methods.sparsevlm_plus",
    "SparseVLMV1": "pdrop.methods.sparsevlm_v1",
    "RandomDrop": "pdrop.methods.random_drop",
    "NoImage": "pdrop.methods.no_image",
    "Downsample": "pdrop.methods.downsample",
    "Uniform": "pdrop.methods.grid",
    "Pool": "pdrop.methods.grid",
    "RunSpec": "pdrop.record",
    "RunRecord": "pdrop.record",
}

__version__ = "0.1.0"  # the one place: pyproject.toml reads it, CITATION.cff repeats it
__all__ = list(_HOMES)

if sys.argv[:1] == ["-m"]:  # Python looks for the module that it is to run
    import_module("pdrop.command_help").refuse_no_command(sys.orig_argv, __path__[0])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pdrop' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
