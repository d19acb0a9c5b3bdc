"""What papers call FLOPs, each under its own name, so that a printed figure can be found again and none be mixed up.

All of them are multiply-adds of decoder layers, attention as full squares: no tower, no lm_head, no ranking. They
differ in which tokens count and in the MLP's matrices; d = hidden size, m = the MLP's, n = tokens entering a layer:

    paper_macs_visual       PyramidDrop (arXiv 2410.17247, Eq. 5)     visual tokens   4nd² + 2n²d + 3ndm
    fastv_macs_visual       FastV (arXiv 2403.06764), DivPrune         visual tokens   4nd² + 2n²d + 2ndm
    sparsevlm_macs          SparseVLM's code (arXiv 2410.04417)        all tokens      4nd² + 2n²d + 3ndm

Llama's MLP has three matrices: FastV's formula leaves one out. What a forward really computes is `prefill_flops` in
pdrop/flops.py, which is no convention.
"""

from __future__ import annotations

from collections.abc import Sequence

from pdrop.flops import paper_macs_visual


def fastv_macs_visual(hidden: int, intermediate: int, visual_per_layer: Sequence[float]) -> float:
    """FastV's "FLOPs": multiply-adds of the visual tokens with an MLP of two matrices (section 4 of its paper).

    Args:
        hidden: d.
        intermediate: m.
        visual_per_layer: n of each layer.
    """
    return paper_macs_visual(hidden, intermediate, visual_per_layer, mlp_matrices=2)


def fastv_reduction(
    hidden: int, intermediate: int, visual: float, layer: int, dropped: float, num_layers: int
) -> float:
    """The share that FastV's paper says is saved: 1 - (K f(n) + (T - K) f((1 - R) n)) / (T f(n)).

    Args:
        hidden: d.
        intermediate: m.
        visual: n.
        layer: K.
        dropped: R, the share that goes.
        num_layers: T.
    """
    left = [visual] * layer + [(1 - dropped) * visual] * (num_layers - layer)
    whole = fastv_macs_visual(hidden, intermediate, [visual] * num_layers)
    return 1 - fastv_macs_visual(hidden, intermediate, left) / whole


def sparsevlm_macs(hidden: int, intermediate: int, tokens_per_layer: Sequence[float]) -> float:
    """SparseVLM's "FLOPs": multiply-adds of all tokens, text and merged ones too, with an MLP of three matrices.

    Its paper's 4.62 T for LLaVA-1.5-7B is this for 576 visual and 118 other tokens (fitted: theirs is not printed).

    Args:
        hidden: d.
        intermediate: m.
        tokens_per_layer: n of each layer.
    """
    return paper_macs_visual(hidden, intermediate, tokens_per_layer)
