"""CDPruner: tokens unlike each other and relevant to the question (arXiv 2506.10967, "Beyond Attention or Similarity:
Maximizing Conditional Diversity for Token Pruning in MLLMs"; its code, Theia-4869/CDPruner at 9541616).

A determinantal point process over the tokens of each picture, with kernel r_i S_ij r_j: S the cosines of the language
model's input, r each token's relevance to the question. Tokens are chosen greedily, always the one with the largest
conditional variance. Relevance is CLIP's: MINUS the cosine between the tower's patches (after CLIP's own last norm and
projection, which are made for its class token) and CLIP's text embedding of the question; the published code takes
patches to matter where they are least like the text. It is scaled to 0..1 over all pictures and tiles of the prompt.

That needs weights that no LLaVA checkpoint has, CLIP's text tower and projections: `clip` is a folder with the whole
CLIP that the model's tower was made from. The question is the prompt's text after its last picture, without what
`leave_out` names; attach(..., tokenizer=) decodes it. pdrop.methods.cdpruner_embeddings is a substitute that needs
neither.

As in the published code, a question longer than CLIP's 77 tokens is cut into segments whose embeddings' relevances are
averaged, and each segment's embedding is taken at its largest id: in the first of several that is the start token,
which has seen nothing of the question.

Where this differs from the published code:
- relevance is scaled within each prompt; that code scales over the whole batch, so that prompts change each other's
  tokens;
- a relevance that is the same everywhere is 1; that code divides by zero;
- no token is chosen twice, also when the kernel's rank is exhausted; several pictures work, where that code raises;
- a number at or above the number of tokens keeps everything; newlines go.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pdrop.methods.base import View
from pdrop.methods.in_front import InFront
from pdrop.methods.transfer import on_device
from pdrop.schedule import Schedule
from pdrop.shapes import ModelSizes, PromptSize, SelectionCost

if TYPE_CHECKING:
    from torch import Tensor

LEAVE_OUT = ("Answer the question using a single word or phrase.", "ASSISTANT:", "USER:")


@dataclass(frozen=True)
class Diverse(InFront):
    """Conditional diversity; subclasses define the relevance."""

    def score(self, view: View) -> Tensor:
        """For chosen tokens, how many of their tile's were still to choose at their turn; 0 for others. [B, T]."""
        import torch

        scores = torch.zeros(view.index.shape, device=view.index.device)
        tiles: dict[int, list[tuple[Tensor, int]]] = {}
        for row, _, places, each in self.chosen(view, least=1):
            tiles.setdefault(row, []).append((places, min(each, len(places))))
        for row, parts in tiles.items():
            relevance = scaled(self.relevance(view, row, torch.cat([places for places, _ in parts])))
            for (places, count), own in zip(parts, relevance.split([len(places) for places, _ in parts])):
                states = torch.nn.functional.normalize(view.hidden[row, places].detach().float(), dim=-1)
                turns = likeliest(own[:, None] * (states @ states.T) * own, count)
                scores[row, places[turns]] = torch.arange(len(turns), 0, -1, device=scores.device, dtype=scores.dtype)
        return scores

    def relevance(self, view: View, row: int, places: Tensor) -> Tensor:
        """How relevant a prompt's tokens are, [N] float32: larger is more, in any scale."""
        raise NotImplementedError

    def kernel_macs(self, schedule: Schedule, prompt: PromptSize, sizes: ModelSizes) -> float:
        """Multiply-adds of the kernel and of choosing."""
        frames = [h * w / sizes.tower.merge**2 for h, w in sizes.tower.frames(prompt.visual, prompt.images)]
        macs = 0.0
        for tokens, count in zip(frames, self.counts_of(schedule, prompt, frames)):
            macs += tokens**2 * sizes.hidden + tokens * max(0, count - 1) * (count - 2) / 2
        return macs


@dataclass(frozen=True)
class CDPruner(Diverse):
    """Conditional diversity by CLIP's relevance.

    Attributes:
        clip: A folder with a CLIP checkpoint and its tokenizer, the one that the model's vision tower was made from.
        leave_out: Text that is not part of the question.
    """

    clip: str | None = None
    leave_out: tuple[str, ...] = LEAVE_OUT
    tower_layers: ClassVar[tuple[int, ...] | None] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "leave_out", tuple(self.leave_out))
        if self.clip is None:
            raise ValueError(
                "CDPruner reads the question with CLIP's text tower: CDPruner(clip=FOLDER), on the command line "
                "method.clip=FOLDER, with a CLIP checkpoint in it; CDPrunerEmbeddings (cdpruner_embeddings) needs none"
            )
        if not (Path(self.clip) / "config.json").is_file():
            raise ValueError(f"clip is a folder with a CLIP checkpoint, and {self.clip!r} has no config.json")

    def arguments(self) -> dict[str, Any]:
        """The fingerprint of the folder's content in place of its path, which does not identify it."""
        assert self.clip is not None
        return super().arguments() | {"clip": fingerprint(self.clip)}

    def relevance(self, view: View, row: int, places: Tensor) -> Tensor:
        """Minus the mean cosine of the patches to the question's segments, in CLIP's shared space."""
        import torch

        assert self.clip is not None
        clip = Clip.load(self.clip, str(view.hidden.device))
        tower = view.tower
        if tower.states.shape[-1] != clip.width:
            raise ValueError(
                f"{self.clip} is another CLIP than the vision tower: {clip.width} wide, not {tower.states.shape[-1]}"
            )
        patches = tower.states.detach().flatten(0, 1)[tower.at(view.index)[row, places]]
        image = torch.nn.functional.normalize(clip.image(patches), dim=-1)
        text = torch.nn.functional.normalize(clip.text(self.question(view.texts()[row])), dim=-1)
        return -(image @ text.T).mean(1)

    def question(self, text: str) -> str:
        for words in self.leave_out:
            text = text.replace(words, "")
        return text.strip().removesuffix("assistant").strip()

    def selection(self, schedule: Schedule, prompt: PromptSize, sizes: ModelSizes) -> SelectionCost:
        """Kernel and choosing; CLIP's projection of every patch, and its text tower for a question of one segment."""
        if not schedule or not prompt.visual or min(prompt.visual_per_layer) >= prompt.visual:
            return SelectionCost()
        from transformers import CLIPConfig

        assert self.clip is not None
        config: Any = CLIPConfig.from_pretrained(self.clip, trust_remote_code=False)
        text, shared = config.text_config, config.projection_dim
        d, m, layers, tokens = (
            getattr(text, name)
            for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
        )
        patches = sum(h * w for h, w in sizes.tower.frames(prompt.visual, prompt.images))
        macs = self.kernel_macs(schedule, prompt, sizes) + patches * shared * (sizes.tower.hidden + 1)
        macs += layers * (tokens * (4 * d * d + 2 * d * m) + 2 * tokens**2 * d) + d * shared
        return SelectionCost(macs=macs)


@dataclass(frozen=True)
class Clip:
    """The parts of a CLIP checkpoint that relevance is made with, in float32."""

    model: Any
    tokenizer: Any

    @classmethod
    @functools.cache
    def load(cls, folder: str, device: str) -> Clip:
        """Load from a folder; cached for the process.

        Raises:
            OSError: If the folder holds no such checkpoint.
        """
        import torch
        from transformers import AutoTokenizer, CLIPModel

        model = (
            CLIPModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval().requires_grad_(False)
        )
        return cls(model.to(device), AutoTokenizer.from_pretrained(folder, trust_remote_code=False))

    @property
    def width(self) -> int:
        """The width of its vision tower."""
        return int(self.model.config.vision_config.hidden_size)

    def image(self, states: Tensor) -> Tensor:
        """[N, d] -> [N, shared width]."""
        projected: Tensor = self.model.visual_projection(self.model.vision_model.post_layernorm(states.float()))
        return projected

    def text(self, question: str) -> Tensor:
        """[segments, shared width]: of each segment of CLIP's length, the embedding at its largest id."""
        import torch

        longest = self.model.config.text_config.max_position_embeddings
        ids = self.tokenizer(question, verbose=False).input_ids
        count = -(-len(ids) // longest)
        device = self.model.visual_projection.weight.device
        segments = on_device(ids + [0] * (count * longest - len(ids)), device).view(count, -1)
        with torch.no_grad():  # without a mask: no token of this causal model sees the padding after the last one
            seen = self.model.text_model(segments).last_hidden_state
            embedded: Tensor = self.model.text_projection(seen[torch.arange(count, device=device), segments.argmax(1)])
        return embedded


@functools.cache
def fingerprint(folder: str) -> str:
    """The content of a checkpoint's weights and configuration, 16 hexadecimal digits."""
    found = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin", ".txt", ".model"):
            found.update(path.name.encode())
            with path.open("rb") as file:
                for block in iter(lambda: file.read(1 << 24), b""):
                    found.update(block)
    return found.hexdigest()[:16]


def scaled(relevance: Tensor) -> Tensor:
    """Relevance scaled to 0..1 over a prompt: the least relevant token has about 1e-6, and is taken last."""
    low, high = relevance.min(), relevance.max()
    flat = (high - low) <= 0
    return ((relevance - low + 1e-6) / (high - low).masked_fill(flat, 1e-6)).masked_fill(flat, 1.0)


def likeliest(kernel: Tensor, count: int) -> Tensor:
    """Greedy MAP inference of a determinantal point process (Chen et al., arXiv 1709.05135), in the order of choice.

    Args:
        kernel: [N, N] float32.
        count: How many, at most N.
    """
    import torch

    variance = kernel.diagonal().clone()
    factors, least = kernel.new_zeros(count, len(kernel)), variance.max() * torch.finfo(kernel.dtype).eps ** 2
    turns: list[Tensor] = []
    for number in range(count):
        own, best = variance.max(0, keepdim=True)  # [1]: reading a number would wait for the device
        turns.append(best)
        if number + 1 == count:
            break
        variance.index_fill_(0, best, -torch.inf)  # never taken again
        known = factors[:number].T @ factors[:number].index_select(1, best)  # [N, 1]
        # when the kernel's rank is exhausted only rounding is left: such a token must not change the others
        says = own > least
        row = kernel.index_select(0, best)[0]
        factors[number] = (row - known[:, 0]) * says / own.clamp(min=least).sqrt()
        variance = variance - factors[number].square()
    return torch.cat(turns) if turns else torch.zeros(0, dtype=torch.long, device=kernel.device)
