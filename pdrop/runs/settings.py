"""A run's resolved settings: its identity (RunSpec), the objects that it names, and settings that do not identify it.

Dials come in as plain values, as in conf/run.yaml. A dial that is a field of RunSpec reaches it under its own
name: a new one needs a field there, a value in conf/, and its use. No torch.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pdrop import leases, names
from pdrop.environment import versions
from pdrop.evaluation import generation_arguments, protocols, task_checks, task_index
from pdrop.evaluation.prefetch import Preparation
from pdrop.identity import code_digest
from pdrop.models import attention, checkpoint
from pdrop.models.source import ModelSource
from pdrop.record import RunSpec, canonical_json
from pdrop.runs.device import of_the_device
from pdrop.runs.timed_prompt import timed_batch
from pdrop.runs.worker_dials import Workers
from pdrop.schedule import Schedule
from pdrop.shapes import PromptSize

if TYPE_CHECKING:
    from pdrop.methods.base import Method
    from pdrop.models.checkpoint import Checkpoint
    from pdrop.timing.protocol import TimingProtocol

log = logging.getLogger("pdrop")

# families whose pictures (or their tiles) all have one size, and those whose tiles cannot be limited
OF_ONE_SIZE = {"llava", "llava_next", "llava_next_video", "llava_onevision", "internvl", "video_llava"}
OF_FIXED_TILES = OF_ONE_SIZE - {"internvl"} | {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"}
PLAIN = protocols.FamilySettings("chat", "crop", 16)  # for a spec whose model is not known yet

MakeSchedule = Callable[..., Schedule]  # (layers of the decoder), and with `ratio` and `layers` turned, for budgets


@dataclass(frozen=True)
class Settings:
    """What to run. Everything that can change a number is in `spec`; the rest says how and where it is run.

    Attributes:
        spec: The run's identity.
        source: The model that it names.
        method: The method that it names; None drops nothing.
        schedule: The schedule that it spells.
        protocol: The timing protocol that it spells; without a schedule nothing is timed.
        device: Which of several equal devices: "cuda:1".
        results: Folder of the store.
        task_folders: Folders with the user's own tasks.
        experiment: The experiment that asks for the run.
        force: Redo a finished run.
        workers: How many processes answer; not part of the identity, since it changes no number.
        locks: How a run's folder is held, one of pdrop.leases.KINDS.
        preparation: How inputs are prepared ahead and cached; not part of the identity either.
        published_sampling: How the answers of published numbers were sampled, if they were; ours are not.
        turned: Settings of the protocol that a dial overrides, for the record.
    """

    spec: RunSpec
    source: ModelSource
    method: Method | None
    schedule: Schedule
    protocol: TimingProtocol
    device: str = "cpu"
    results: Path = Path("results")
    task_folders: tuple[str, ...] = ()
    experiment: str | None = None
    force: bool = False
    workers: Workers = field(default_factory=Workers)
    locks: str = "auto"
    preparation: Preparation = field(default_factory=Preparation)
    published_sampling: str | None = None
    turned: tuple[str, ...] = ()

    @property
    def elsewhere(self) -> bool:
        """Whether workers answer; if nothing is asked, this process does the measuring."""
        return self.workers.count > 0 and bool(self.spec.tasks)

    @property
    def folder(self) -> Path:
        return self.results / "runs" / self.spec.folder

    @property
    def known_prompt(self) -> PromptSize | None:
        """`prompt`; None if its size is not known."""
        one = self.source.one_image
        return one if one is None or self.spec.tasks else one.times(self.protocol.images)

    @property
    def prompt(self) -> PromptSize:
        """The model's prompt, for which budgets and costs are computed; if nothing is scored, with the protocol's
        images.

        Raises:
            ValueError: If its size depends on the image and is not given.
        """
        if (known := self.known_prompt) is None:
            raise ValueError(f"how many visual tokens a prompt of {self.source.name} has depends on its image: give "
                             "model.visual_tokens=1296")  # fmt: skip
        return known

    @property
    def timed(self) -> bool:
        """Whether there is something to time, and its protocol does."""
        drops = bool(self.schedule) and self.method is not None and self.method.pixels == 1
        return self.protocol.measures and drops and self.source.loadable

    @property
    def timed_alone(self) -> bool:
        """Whether it is timed in fresh processes, which must have the device to themselves."""
        return self.timed and self.protocol.fresh

    def load(self) -> Checkpoint:
        """Load the model as the spec says.

        Raises:
            ValueError: As `ModelSource.load`, and if the device refuses: it has no room, or other processes use it.
        """
        try:
            return self.source.load(self.spec.dtype, self.spec.attn_implementation, self.device)
        except RuntimeError as error:
            if not of_the_device(error):
                raise
            raise ValueError(
                f"{self.spec.model} in {self.spec.dtype} cannot be loaded on device={self.device}: "
                f"{str(error).splitlines()[0]}; nvidia-smi shows who uses the card"
            ) from error


def resolve(
    dials: Mapping[str, Any],
    name: str,
    method: Method | None,
    make_schedule: MakeSchedule,
    protocol: TimingProtocol,
    asked: bool | None = None,
) -> Settings:
    """Settings from dials, which must all be set.

    Args:
        dials: conf/run.yaml's, composed; `tasks` lists lmms-eval's names, `device` is one.
        name: The method's name in tables.
        method: Ranks the visual tokens; None drops nothing.
        make_schedule: Makes the dials' schedule for a number of layers.
        protocol: The timing protocol.
        asked: Whether the model will answer questions; None: if there are tasks.

    Raises:
        ValueError: If something asked for is not available; nothing has been written or loaded then.
    """
    spec = read_dials(dials)
    names.check("method", name)
    folders = tuple(dials["task_folders"])
    task_files = task_index.digest(spec.tasks, folders)
    generation_arguments.check(spec.tasks, folders)
    task_checks.check_aggregations(spec.tasks, folders)
    model = dials["model"]
    source = ModelSource.of(
        **{key: model[key] for key in ("name", "path", "revision", "weights", "visual_tokens", "text_tokens")},
        seed=spec.seed,
        asked=bool(spec.tasks) if asked is None else asked,
    )
    spec, published_sampling, turned = asked_with(spec, dials, source)
    sampled = generation_arguments.check(spec.tasks, folders, spec.answer_tokens)
    check_boxes(spec.tasks, source)
    if not source.loadable:
        protocol = replace(protocol, name="off", pairs=0)
    # with only one kernel, or with the run's own choice of kernel, there is no other to time
    others = [name for name in protocol.kernels if name != spec.sdpa_kernel] if spec.sdpa_kernel else []
    protocol = replace(protocol, kernels=others)
    drawn = sampled or source.weights == "random"  # answers, weights
    spec = replace(spec, task_files=task_files, **_of_model(source), **_of_method(name, method, spec.seed, drawn))
    settings = Settings(
        spec=spec,
        source=source,
        method=method,
        schedule=Schedule(),
        protocol=protocol,
        device=dials["device"],
        results=Path(dials["results"]),
        task_folders=folders,
        experiment=dials["experiment"],
        force=dials["force"],
        workers=Workers(**dials["workers"]),
        locks=dials["locks"],
        preparation=Preparation(dials["prefetch"], dials["picture_cache"]),
        published_sampling=published_sampling,
        turned=turned,
    )
    settings.workers.check()
    settings.preparation.check()
    if settings.elsewhere:
        settings.workers.check_device(settings.device, settings.protocol.measures)
    if method is None or dials["budget"] is None:
        schedule = make_schedule(source.layers)
    else:
        schedule = budgeted(settings, method, dials, make_schedule)
    if method is not None:
        method.check(schedule)
        check_positions(method, schedule, source)
    return scheduled(settings, schedule)


def scheduled(settings: Settings, schedule: Schedule) -> Settings:
    """The same settings with a schedule. Settings without effect under it (positions, timing) leave the identity."""
    method, protocol = settings.method, settings.protocol
    spec = replace(
        settings.spec,
        schedule=str(schedule),
        positions=method.positions if method is not None and schedule else "original",
        latency=spelled(settings, timed=bool(schedule) and protocol.measures),
    )
    return replace(settings, spec=spec, schedule=schedule)


def spelled(settings: Settings, timed: bool) -> str:
    """The protocol as part of a run's identity: with the prompt given for the model, if that is counted or timed, and
    with the number of timed prompts if it is not the batch size."""
    protocol, spec, source = settings.protocol, settings.spec, settings.source
    words = [protocol.spelled if timed else "off"]
    if timed and (batch := timed_batch(spec.batch_size)) < spec.batch_size:
        words.append(f"batch {batch}")
    if timed or not spec.tasks:
        sizes = {"images": 0 if timed or protocol.images == 1 else protocol.images}  # a timed protocol has its own
        sizes |= {"visual": source.visual_tokens or 0, "text": source.text_tokens or 0}
        words += [f"{name} {size}" for name, size in sizes.items() if size]
    return " ".join(words)


def read_dials(dials: Mapping[str, Any]) -> RunSpec:
    """A spec from the dials alone; the fields of model, method and schedule are still empty.

    A dial that is not set takes the model's value: its file in conf/model/ sets dtype, batch_size and protocol. The
    protocol's settings depend on the model's family (`asked_with`); until then a plain protocol is used.

    Raises:
        ValueError: For a value that a dial cannot have.
    """
    model = dials["model"]
    given: dict[str, Any] = dict.fromkeys((field.name for field in fields(RunSpec)), "")
    for name in set(given) & {*dials, *model}:
        given[name] = model.get(name) if dials.get(name) is None else dials[name]
    kind = str(dials["device"]).partition(":")[0]  # which of several equal devices does not matter
    given |= protocols.settle(PLAIN, given)
    given |= {"model": model["name"], "tasks": tuple(dials["tasks"]), "device": kind, "format": RunSpec.format}
    spec = RunSpec(**given)
    kernel = attention.resolved(dials["sdpa_kernel"], spec.attn_implementation, kind)
    spec = replace(spec, sdpa_kernel=kernel)
    names.check("model.name", spec.model)
    if dials["experiment"] is not None:
        names.check("experiment", dials["experiment"])
    if not str(dials["results"]).strip():
        raise ValueError("results is the folder of the store; it is empty here")
    if dials["locks"] not in leases.KINDS:
        raise ValueError(f"locks is {' | '.join(leases.KINDS)}, not {dials['locks']!r}")
    checkpoint.check_weights(spec.weights)
    check_words(dials)
    spec.check({name: f"model.{name}" for name in model if dials.get(name) is None})
    return spec


def check_boxes(tasks: Sequence[str], source: ModelSource) -> None:
    """Refuse tasks that ask for boxes if the model's family is not known to give any.

    Raises:
        ValueError: Naming the family.
    """
    from pdrop.evaluation import grounding  # it imports numpy, which a finished run does not need

    if tasks and source.loadable:
        grounding.family_of(tasks, source.family[0])


def check_positions(method: Method, schedule: Schedule, source: ModelSource) -> None:
    """Refuse to renumber positions that are no single numbers.

    Raises:
        ValueError: Naming the dial.
    """
    if schedule and method.positions == "compact" and source.loadable and source.multimodal_rope:
        raise ValueError(
            f"positions=compact, the default of {type(method).__name__}: {source.name} has positions of time, height "
            "and width, which cannot be renumbered; set positions=original"
        )


def asked_with(
    spec: RunSpec, dials: Mapping[str, Any], source: ModelSource
) -> tuple[RunSpec, str | None, tuple[str, ...]]:
    """The spec with its protocol's settings for the model's family, except those that a dial sets; how published
    answers were sampled; and which settings a dial overrides.

    Raises:
        ValueError: If the protocol has no settings for the family.
    """
    families, model = dials["families"], dials["model"]
    check_limits(dials, source)
    family = ("", "") if protocols.ANY in families else source.family
    found = protocols.of_family(spec.protocol, families, *family)
    given = {name: model.get(name) if dials.get(name) is None else dials[name] for name in protocols.SETTINGS}
    settled, plain = protocols.settle(found, given), protocols.settle(found, {})
    return replace(spec, **settled), found.sampled, tuple(name for name in settled if settled[name] != plain[name])


def check_limits(dials: Mapping[str, Any], source: ModelSource) -> None:
    """Refuse picture limits that a family's processor does not have, and a `wrapper` that lmms-eval does not have.

    Raises:
        ValueError: Naming the dial.
    """
    wrapper = dials["wrapper"]
    for limits in (("min_pixels", "max_pixels"), ("min_frame_pixels", "max_frame_pixels")):
        least, most = (dials[name] for name in limits)
        if least is not None and most is not None and least > most:
            raise ValueError(f"{limits[0]}={least} is more than {limits[1]}={most}")
    of_frames = ("min_frame_pixels", "max_frame_pixels", "max_video_pixels")
    for names_of, families, why in (
        (("min_pixels", "max_pixels", *of_frames), OF_ONE_SIZE, "whose pictures, or tiles of them, all have one size"),
        (("max_tiles",), OF_FIXED_TILES, "whose processor has no limit of tiles to set"),
    ):
        for name in names_of:
            if dials[name] is not None and (family := source.family[0]) in families:
                raise ValueError(f"{name}={dials[name]}: leave it out for models of {family}, {why}")
    if dials["image_backend"] == "qwen_vl_utils" and (family := source.family[0]) in OF_ONE_SIZE:
        raise ValueError(
            f"image_backend=qwen_vl_utils: models of {family} take pictures, or tiles of them, of one size"
        )
    if wrapper not in (None, protocols.NOTHING) and wrapper not in (known := lmms_models()):
        near = difflib.get_close_matches(wrapper, known, 1)
        raise ValueError(f"wrapper={wrapper} is no model of lmms-eval" + (f", did you mean {near[0]}?" if near else ""))


@functools.cache
def lmms_models() -> list[str]:
    """The names of lmms-eval's own models, from their files: importing them needs packages that are not installed."""
    folder = task_index.installed_folder().parent / "models"
    return sorted({path.stem for kind in ("simple", "chat") for path in (folder / kind).glob("[a-z]*.py")})


def check_words(dials: Mapping[str, Any]) -> None:
    """Refuse empty words, and numbers that no prompt can have.

    Raises:
        ValueError: Naming the dial and what it takes.
    """
    model = dials["model"]
    for name, value, takes in (
        ("results", dials["results"], "the store's folder"),
        ("device", dials["device"], "cpu, cuda or mps, or null"),
        ("model.path", model["path"], "a folder, a repository on the Hub, or package://module/folder"),
        ("model.revision", model["revision"], "a branch, a tag or a commit, or null"),
    ):
        if value is not None and not str(value).strip():
            raise ValueError(f"{name} is {takes}, not {value!r}")
    for name, least in (("visual_tokens", 1), ("text_tokens", 0)):
        if model[name] is not None and model[name] < least:
            raise ValueError(f"model.{name} is a whole number from {least} on, or null, not {model[name]}")


def _of_model(source: ModelSource) -> dict[str, Any]:
    return {
        "model_path": source.path,
        "revision": source.revision,
        "weights": source.weights,
        "model_fingerprint": source.fingerprint,
    }


def _of_method(name: str, method: Method | None, seed: int, drawn: bool) -> dict[str, Any]:
    parts = [] if method is None else method.parts
    files = [Path(file) for part in parts if (file := inspect.getsourcefile(type(part))) is not None]
    arguments = {} if method is None else method.arguments()
    return {
        "method": name,
        "method_args": canonical_json(arguments),
        "seed": seed if drawn or "seed" in arguments else 0,  # only if anything is random
        "versions": canonical_json(versions()),
        "code": code_digest(files),
    }


def budgeted(settings: Settings, method: Method, dials: Mapping[str, Any], make_schedule: MakeSchedule) -> Schedule:
    """The method's schedule that meets the budget for the model's reference prompt.

    Args:
        settings: Settings of the unpruned model.

    Raises:
        ValueError: If the budget cannot be met.
    """
    from pdrop.cost.budget import solve

    source, budget, measured = settings.source, str(dials["budget"]), None
    prompt = settings.prompt
    if budget.startswith("prefill_ms"):
        from pdrop.runs.timed import prefill_ms

        measured = prefill_ms(settings, method)
    layers = None if dials["layers"] is None else tuple(dials["layers"])
    schedule = solve(
        method, budget, source.layers, round(prompt.visual), text_tokens=prompt.text, arch=source.sizes,
        images=prompt.images, layers=layers,
        dial=lambda ratio, at: make_schedule(source.layers, ratio=ratio, layers=at), measure=measured,
    )  # fmt: skip
    visual = round(prompt.visual)
    average = fmean(prompt.under(method, schedule, source.layers).visual_per_layer)
    log.info(
        "budget %s of %d + %d tokens: %s; %.1f enter a layer on average", budget, visual, prompt.text, schedule, average
    )
    return schedule
