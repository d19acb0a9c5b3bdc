"""CDPruner without CLIP: relevance by the language model's own embeddings of the question.

No code of CDPruner's authors does that. OpenVINO GenAI's port does (openvino.genai,
src/cpp/src/visual_language/cdpruner at 335d37e), for models whose tower is no CLIP: the mean over the question's tokens
of the cosine between visual and text tokens at the language model's input; for LLaVA it takes minus the mean.
Everything else is CDPruner (pdrop/methods/cdpruner.py). It has a name of its own because its numbers are not
CDPruner's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pdrop.methods.base import View
from pdrop.methods.cdpruner import Diverse
from pdrop.schedule import Schedule
from pdrop.shapes import ModelSizes, PromptSize, SelectionCost

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CDPrunerEmbeddings(Diverse):
    """Conditional diversity by the embeddings of the question; without a question, diversity alone.

    Attributes:
        negative: Whether to take minus the cosine, as that port does for models with CLIP's tower.
    """

    negative: bool = False
    tower_layers: ClassVar[tuple[int, ...] | None] = ()
    merged_tower_layers: ClassVar[tuple[int, ...] | None] = ()

    def relevance(self, view: View, row: int, places: Tensor) -> Tensor:
        """Mean over the question's tokens of the cosine to each visual token."""
        import torch

        hidden = torch.nn.functional.normalize(view.hidden[row].detach().float(), dim=-1)
        words = hidden * view.question()[row, :, None]
        like = (hidden[places] * words.sum(0)).sum(1)  # the sum over the words of the cosines
        return -like if self.negative else like

    def selection(self, schedule: Schedule, prompt: PromptSize, sizes: ModelSizes) -> SelectionCost:
        if not schedule or not prompt.visual or min(prompt.visual_per_layer) >= prompt.visual:
            return SelectionCost()
        return SelectionCost(macs=self.kernel_macs(schedule, prompt, sizes))
