"""python -m pdrop.conformance.walk [KIND ...]: a LLaVA around every text model of transformers, dropped in or refused.

`attach` promises to rank tokens by the layers' own attention, or to say why not. Here every text model that
transformers can put into a LLaVA is built small. If `attach` accepts it, three things are checked: with nothing dropped
it is the unattached model to the bit; the scores follow from the model's own attention weights, layer by layer; and
with tokens dropped it computes what the unattached model computes with these tokens hidden by masks, in the prompt and
in cached decoding. Exit code 1 if any of this fails.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from pdrop.conformance.batches import GREEDY, RAGGED, batch_of, prolong
from pdrop.conformance.families import LAYERS, llava_of, ready
from pdrop.conformance.subject import equal, must
from pdrop.engine import attach
from pdrop.methods.pyramiddrop import PyramidDrop
from pdrop.schedule import Schedule, Stage

LARGEST = 30_000_000  # parameters: a model that the usual names do not make small is not a plain text model
EXPERTS: dict[str, Any] = dict(
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
)
LOGITS, WEIGHTS = 2e-3, 1e-4  # bounds of differences, for float32 models with logits of standard deviation 1 to 5
DROPPING = Schedule((Stage(2, 0.5), Stage(4, 0.25)))


FULL: dict[str, Any] = {"sliding_window": 64, "layer_types": ["full_attention"] * LAYERS}


def built(kind: str, **options: Any) -> Any:
    """The model, small and with random weights.

    Args:
        kind: Its language model's model_type.
        options: Further options of its language model's config.

    Raises:
        ValueError: If it cannot be built, or not small.
    """
    options = EXPERTS | {"head_dim": 8, "sliding_window": None} | options
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in llava_of(kind, **options).parameters())
        if size > LARGEST:
            raise ValueError(f"{size:,} parameters")
        torch.manual_seed(0)
        return ready(llava_of(kind, **options), "eager", torch.float32)
    except Exception as error:  # a config or a model may raise anything at settings that are not its own
        words = str(error).strip().splitlines() or [""]
        raise ValueError(f"cannot be built into a small LLaVA ({type(error).__name__}: {words[0][:80]})") from error


def examine(model: Any) -> str:
    """Why `attach` refuses the model; "" if it accepts it and all checks hold.

    Raises:
        Unmet: If a check fails.
    """
    try:
        attach(model, PyramidDrop(positions="original"), DROPPING)
    except ValueError as refusal:
        return str(refusal)
    with torch.no_grad():
        nothing_dropped(model)
        rows_are_the_layers_own(model)
        dropping_hides(model)
    return ""


def nothing_dropped(model: Any) -> None:
    """A schedule that keeps everything changes no bit."""
    batch = batch_of("llava", model, RAGGED)
    want = model(**batch).logits
    with attach(model, PyramidDrop(positions="original"), Schedule((Stage(2, 1.0), Stage(4, 1.0)))):
        must(torch.equal(model(**batch).logits, want), "logits differ where nothing is dropped")


def rows_are_the_layers_own(model: Any) -> None:
    """The scores of every layer are its own query token's attention."""
    batch, weights = batch_of("llava", model, RAGGED), []
    handles = [
        layer.self_attn.register_forward_hook(lambda module, args, output: weights.append(output[1]))
        for layer in model.get_decoder().layers
    ]
    with attach(
        model, PyramidDrop(positions="original"), Schedule(tuple(Stage(n, 1.0) for n in range(LAYERS)))
    ) as trace:
        model(**batch)
    for handle in handles:
        handle.remove()
    for number, (own, scores) in enumerate(zip(weights, trace.scores, strict=True)):
        for row, got in enumerate(scores):
            visual = batch["input_ids"][row] == model.config.image_token_id
            want = own[row, :, -1].float().mean(0)[visual]
            equal(got, want, WEIGHTS, f"layer {number} is not ranked by its own attention")


def dropping_hides(model: Any) -> None:
    """A prompt and its decoded answer agree with the unattached model with the dropped tokens masked."""
    batch = batch_of("llava", model, RAGGED[:1])
    length = batch["input_ids"].shape[1]
    with attach(model, PyramidDrop(positions="original"), DROPPING) as trace:
        out = model.generate(**batch, **GREEDY)
    whole = prolong(batch, out.sequences[:, :-1])
    visual = (batch["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    handles, hidden = [], {}
    for stage, kept in zip(DROPPING, trace.kept):
        hidden[stage.layer] = visual[~torch.isin(torch.arange(len(visual)), kept[0])]
    for number, layer in enumerate(model.get_decoder().layers):
        gone = [places for start, places in hidden.items() if start <= number]
        if gone:
            handles.append(layer.register_forward_pre_hook(hiding(gone[-1]), with_kwargs=True))
    want = model(**whole, use_cache=False).logits[:, length - 1 :]
    for handle in handles:
        handle.remove()
    for step, logits in enumerate(out.logits):
        equal(logits, want[:, step], LOGITS, f"token {step} of the answer is not what masks make it")


def hiding(gone: Tensor) -> Any:
    """A hook before a layer that hides these places from its attention."""

    def enter(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        size = args[0].shape[1]
        mask = kwargs["attention_mask"]
        if mask is None:
            mask = torch.full((size, size), torch.finfo(args[0].dtype).min).triu(1)[None, None]
        mask = mask.clone()
        mask[..., gone] = torch.finfo(mask.dtype).min
        return args, kwargs | {"attention_mask": mask}

    return enter


def outcome(kind: str, **options: Any) -> tuple[str, str]:
    """The result for one kind of text model: ok, refused, not built or FAILED, and why."""
    try:
        model = built(kind, **options)
    except ValueError as error:
        return "not built", str(error)
    try:
        refusal = examine(model)
    except Exception as error:  # any exception is a finding
        return "FAILED", f"{type(error).__name__}: {error}"
    return ("refused", refusal) if refusal else ("ok", "")


def main(kinds: Sequence[str]) -> int:
    """Examine all kinds, one line per kind; returns the exit code."""
    torch.set_num_threads(1)
    say, counts = sys.stdout.write, Counter[str]()
    for kind in kinds or sorted(MODEL_MAPPING_NAMES):
        name, (result, words) = kind, outcome(kind)
        if result == "refused" and "full_attention" in words:  # and the same with full attention only
            counts[result] += 1
            say(f"  {result:9} {name}: {words}\n")
            name, (result, words) = f"{kind}, full attention alone", outcome(kind, **FULL)
        counts[result] += 1
        say(f"  {result:9} {name}{words and ': '}{words}\n")
        sys.stdout.flush()
    say(", ".join(f"{number} {result}" for result, number in counts.items()) + "\n")
    return int(counts["FAILED"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
