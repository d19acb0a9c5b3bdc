"""From a question and its images to a model's inputs: the choices that affect a benchmark number most.

Prompt style:
    chat        the checkpoint's own chat template
    vicuna_v1   the template of published LLaVA-1.5 and LLaVA-NeXT numbers, with its system message (the templates that
                ship with converted checkpoints leave it out)
    qwen_1_5    ChatML with a system message, as for published LLaVA-OneVision numbers

Image mode:
    crop        the checkpoint's own processing (CLIP's crops the middle of a picture that is not square)
    pad         pad to a square with the processor's mean colour first, as the published LLaVA-1.5 numbers did
                (arXiv 2310.03744, image_aspect_ratio=pad)

Image placing:
    marked      where the question marks its pictures (`<image>`, `<image 1>`); before the question if it marks none
    front       all before the question, whose marks `<image>` are removed

Image backend:
    pil, torchvision    the backend of the checkpoint's image processor
    qwen_vl_utils       Pillow resizes to whole tokens first, 4 to 16384 of them, as that package does before a
                        processor sees a picture; then torchvision

In addition: a system message, and the most and fewest pixels or tiles of a picture. All are recorded with every
run; a protocol chooses them together (pdrop/evaluation/protocols.py). Nothing here knows of tasks or of dropping.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

from PIL import Image

from pdrop.evaluation.frames import Video
from pdrop.evaluation.videos import VideoInputs, shrunk
from pdrop.models.checkpoint import IMAGE_BACKEND, image_processor
from pdrop.models.processor import limited
from pdrop.pictures import as_shown
from pdrop.record import ImageMode, ImagePlacing, PromptStyle, RunSpec

if TYPE_CHECKING:
    import torch

    from pdrop.evaluation.picture_cache import PictureCache
    from pdrop.evaluation.rows import PromptPictures
    from pdrop.models.checkpoint import Checkpoint

VICUNA_V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
QWEN_1_5_SYSTEM = "You are a helpful assistant."
PLACEHOLDER = "<image>"  # marks an image inside a question of lmms-eval's tasks
STANDING_IN = Image.new("RGB", (1, 1))  # for a picture that is processed with its row elsewhere
NUMBERED = re.compile(r"<image (\d+)>")  # marks of MMMU's questions; a mark may be repeated


class PromptBuilder:
    """Renders and encodes the prompts of one checkpoint in one style.

    Args:
        processor: The checkpoint's transformers processor.
        style: Prompt style.
        image_mode: Image mode.
        max_tokens: Positions that the language model has; a longer prompt is an error, never cut.
        system: A system message; None: the style's own, or the template's.
        image_placing: Image placing.
        resized: Whether Pillow resizes pictures to whole tokens first (image backend qwen_vl_utils).
        videos: How videos are shown; None: as 8 frames.

    Raises:
        ValueError: If the checkpoint lacks what the style or the mode needs.
    """

    def __init__(
        self,
        processor: Any,
        style: PromptStyle = "chat",
        image_mode: ImageMode = "crop",
        max_tokens: int | None = None,
        system: str | None = None,
        image_placing: ImagePlacing = "marked",
        resized: bool = False,
        videos: VideoInputs | None = None,
    ) -> None:
        if style not in get_args(PromptStyle):
            raise ValueError(f"unknown prompt style {style!r}: choose {', '.join(get_args(PromptStyle))}")
        if image_mode not in get_args(ImageMode):
            raise ValueError(f"unknown image mode {image_mode!r}: choose crop or pad")
        if style == "chat" and not (processor.chat_template or processor.tokenizer.chat_template):
            raise ValueError("this checkpoint has no chat template: use prompt=vicuna_v1")
        if style != "chat" and not isinstance(getattr(processor, "image_token", None), str):
            raise ValueError("this checkpoint's processor has no image token of its own: use prompt=chat")
        mean = getattr(processor.image_processor, "image_mean", None)
        if image_mode == "pad" and mean is None:
            raise ValueError("this checkpoint's image processor has no mean colour to pad with: use image_mode=crop")
        self.processor, self.style, self.image_mode, self.max_tokens = processor, style, image_mode, max_tokens
        self.system, self.image_placing, self.resized = system, image_placing, resized
        self.videos = VideoInputs(processor) if videos is None else videos
        self._tokenizing = threading.Lock()
        self._background = tuple(int(255 * channel) for channel in mean) if mean is not None else (0, 0, 0)
        own = processor.image_processor
        settings = {"kind": type(own).__name__, "own": own.to_dict(), "mode": image_mode, "resized": resized}
        settings["background"] = self._background
        self._image_settings = json.dumps(settings, sort_keys=True, default=str)  # what a picture's result depends on

    @classmethod
    def of(cls, checkpoint: Checkpoint, spec: RunSpec, max_tokens: int | None = None) -> PromptBuilder:
        """The builder for a run's spec.

        Raises:
            ValueError: If the checkpoint's processor lacks what it asks for.
        """
        processor, resized = checkpoint.processor, spec.image_backend == "qwen_vl_utils"
        own = str(processor.chat_template or processor.tokenizer.chat_template or "USER")
        if spec.protocol == "official" and spec.prompt == "vicuna_v1" and "USER" not in own:
            raise ValueError(
                f"{checkpoint.path}: protocol=official asks this family by vicuna_v1, but the checkpoint's own "
                "template is another: its text model is no Vicuna. Use protocol=checkpoint, or model.prompt=chat"
            )
        limits = {name: getattr(spec, name) for name in ("min_pixels", "max_pixels", "max_tiles")}
        if spec.image_backend != IMAGE_BACKEND or any(value is not None for value in limits.values()):
            processor = copy.copy(processor)  # the checkpoint is kept for runs with other settings
            backend = "torchvision" if resized else spec.image_backend
            processor.image_processor = limited(image_processor(checkpoint, backend), **limits)
        return cls(
            processor, spec.prompt, spec.image_mode, max_tokens, spec.system, spec.image_placing, resized,
            VideoInputs.of(processor, spec),
        )  # fmt: skip

    @property
    def cropped(self) -> tuple[bool, bool]:
        """Whether the processor cuts a square out of the middle of pictures, and of frames."""
        return bool(getattr(self.processor.image_processor, "do_center_crop", False)), self.videos.cropped

    def render(self, question: str, images: int, videos: Sequence[Video] = ()) -> str:
        """The whole prompt as text, up to where the answer starts.

        A question may mark the places of its images (`<image>`, once for each; `<image 1>`, `<image 2>`, where a
        repeated mark stays as text); otherwise images come before it, and videos before them.

        Raises:
            ValueError: If the question marks another number of images than it has, or the template leaves out videos.
        """
        if self.videos.times:
            question = "\n".join([*map(self.videos.sentence, videos), question])
        prompt = self._rendered(question, images, len(videos))
        shown = 0 if self.videos.token is None else prompt.count(self.videos.token)
        if videos and shown != len(videos):
            raise ValueError(
                f"the prompt has {len(videos)} videos, and {shown} places for them ({self.videos.token}): this "
                "checkpoint's chat template may know none; use another model.prompt"
            )
        return prompt

    def _rendered(self, question: str, images: int, videos: int) -> str:
        question = (
            first_marks(question, images) if self.image_placing == "marked" else question.replace(PLACEHOLDER, "")
        )
        marked = question.count(PLACEHOLDER)
        if marked not in (0, images):
            raise ValueError(f"the question marks {marked} images with {PLACEHOLDER}, but has {images}")
        pieces = question.split(PLACEHOLDER) if marked else [question]
        if self.style == "vicuna_v1":
            token, front = self.processor.image_token, self._front(0 if marked else images, videos)
            return f"{self.system or VICUNA_V1_SYSTEM} USER: {front}{token.join(pieces)} ASSISTANT:"
        if self.style == "qwen_1_5":
            token, front = self.processor.image_token, self._front(0 if marked else images, videos)
            turns = (("system", self.system or QWEN_1_5_SYSTEM), ("user", front + token.join(pieces)))
            return "".join(f"<|im_start|>{who}\n{said}<|im_end|>\n" for who, said in turns) + "<|im_start|>assistant\n"
        content: list[dict[str, str]] = [{"type": "video"}] * videos
        content += [] if marked else [{"type": "image"}] * images
        for number, piece in enumerate(pieces):
            content += [{"type": "image"}] if number else []
            content += [{"type": "text", "text": piece}] if piece or not marked else []
        messages = [{"role": "user", "content": content}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system}]})
        return str(self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    def _front(self, images: int, videos: int) -> str:
        """The marks of pictures and videos before a question, for styles that do not use the checkpoint's template."""
        counts = ((self.videos.token or "", videos), (self.processor.image_token, images))
        return "".join(" ".join([token] * count) + "\n" for token, count in counts if count)

    def encode(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[Image.Image]],
        pixels: float = 1.0,
        videos: Sequence[Video] = (),
    ) -> Any:
        """Left-padded inputs of a batch in which all prompts have images or none has, and likewise for videos.

        Args:
            prompts: Rendered prompts.
            images: The images of each prompt.
            pixels: Share of each image's pixels that the processor is given; its sides shrink by the square root.
            videos: The videos of all prompts, in order.

        Returns:
            BatchFeature with `input_ids`, `attention_mask` [B, L] and, with images, the vision tower's inputs.

        Raises:
            ValueError: If a prompt is longer than the model's positions.
        """
        pictures = [[self.prepare(image, pixels) for image in row] for row in images]
        return self._encoded(self.processor, prompts, pictures, videos)

    def encode_rows(
        self,
        prompts: Sequence[str],
        rows: Sequence[PromptPictures],
        cache: PictureCache,
        pixels: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """As `encode`, with pictures processed per prompt, or taken from the cache.

        Thread-safe.

        Args:
            prompts: Rendered prompts.
            rows: The pictures and videos of each.
            cache: Cache of processed pictures.
            pixels: As of `encode`.
            dtype: The model's, in which pictures are kept.

        Raises:
            ValueError: As `encode` does.
        """
        from pdrop.evaluation.rows import RowProcessor

        processor = copy.copy(self.processor)
        processor.tokenizer = OneByOne(self.processor.tokenizer, self._tokenizing)
        processor.image_processor = RowProcessor(
            self.processor.image_processor,
            [row for row in rows if row.contents],
            functools.partial(self.prepare, pixels=pixels),
            cache,
            f"{self._image_settings} {pixels!r} {dtype}",
            dtype,
        )
        standing_in = [[STANDING_IN] * len(row.contents) for row in rows]
        return self._encoded(processor, prompts, standing_in, [video for row in rows for video in row.videos])

    def _encoded(
        self,
        processor: Any,
        prompts: Sequence[str],
        pictures: Sequence[Sequence[Image.Image]],
        videos: Sequence[Video],
    ) -> Any:
        inputs = processor(
            text=list(prompts),
            images=pictures if any(pictures) else None,
            **self.videos.arguments(videos),
            padding=True,
            padding_side="left",
            truncation=False,
            add_special_tokens=self._adds_start(prompts),
            return_tensors="pt",
        )
        length = inputs["input_ids"].shape[1]
        if self.max_tokens is not None and length > self.max_tokens:
            raise ValueError(
                f"the prompt has {length} tokens, the model takes {self.max_tokens}: cutting it would cut the image"
            )
        return inputs

    def _adds_start(self, prompts: Sequence[str]) -> bool:
        """Whether the tokenizer adds the start token: a template that spells it out must not get a second one."""
        start = self.processor.tokenizer.bos_token
        return not (start and all(prompt.startswith(start) for prompt in prompts))

    def text_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each rendered prompt, counting one for each picture."""
        if not prompts:
            return []
        with self._tokenizing:
            ids = self.processor.tokenizer(list(prompts), add_special_tokens=self._adds_start(prompts))["input_ids"]
        return [len(row) for row in ids]

    def visual_tokens(self, sizes: Sequence[tuple[int, int]], pixels: float = 1.0) -> list[int]:
        """Visual tokens of each picture, by arithmetic: as many as the processor makes of it alone in a prompt.

        Args:
            sizes: (width, height) of each picture.
            pixels: As of `encode`.

        Returns:
            If the processor cannot tell, the number of pixels, which keeps the order of sizes.
        """
        if not sizes:
            return []
        shown = [self._prepared_size(size, pixels) for size in sizes]
        if not hasattr(self.processor, "_get_num_multimodal_tokens"):
            return [width * height for width, height in shown]
        counted = self.processor._get_num_multimodal_tokens(image_sizes=[(height, width) for width, height in shown])
        return [int(number) for number in counted.num_image_tokens]

    def video_tokens(self, videos: Sequence[Video]) -> list[int]:
        """About the number of tokens of each video, by arithmetic; pixels if the processor cannot tell."""
        sizes = [(len(video.places), *video.size[::-1]) for video in videos]
        if not sizes:
            return []
        if hasattr(self.processor, "_get_num_multimodal_tokens"):
            counted = self.processor._get_num_multimodal_tokens(video_sizes=sizes)
            if getattr(counted, "num_video_tokens", None):
                return [int(number) for number in counted.num_video_tokens]
        return [frames * height * width for frames, height, width in sizes]

    def answer_length(self, prompt: str, answer: str) -> int:
        """Tokens that `answer` adds after `prompt` (tokenised together, since words may merge where they meet)."""
        tokenizer = OneByOne(self.processor.tokenizer, self._tokenizing)
        alone, both = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + answer))
        shared = 0
        while shared < min(len(alone), len(both)) and alone[shared] == both[shared]:
            shared += 1
        return len(both) - shared

    def prepare(self, image: Image.Image, pixels: float = 1.0) -> Image.Image:
        """A picture as it is shown, with that share of its pixels, padded to a square in image mode "pad", and resized
        if the image backend does that first."""
        image = as_shown(image)
        if pixels < 1:
            image = image.resize(shrunk(image.size, pixels), Image.Resampling.BICUBIC)
        if self.image_mode == "pad" and image.width != image.height:
            side = max(image.size)
            square = Image.new("RGB", (side, side), self._background)
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        if self.resized:
            from qwen_vl_utils import fetch_image

            image = fetch_image({"image": image}, image_patch_size=self.processor.image_processor.patch_size)
        return image

    def _prepared_size(self, size: tuple[int, int], pixels: float) -> tuple[int, int]:
        """(width, height) of a picture after `prepare`."""
        width, height = shrunk(size, pixels) if pixels < 1 else size
        if self.image_mode == "pad":
            width = height = max(width, height)
        if self.resized:
            from qwen_vl_utils.vision_process import SPATIAL_MERGE_SIZE, smart_resize

            height, width = smart_resize(height, width, self.processor.image_processor.patch_size * SPATIAL_MERGE_SIZE)
        return width, height


class OneByOne:
    """A tokenizer that takes one call at a time: a fast one is configured per call, and fails if calls overlap."""

    def __init__(self, inner: Any, lock: threading.Lock) -> None:
        self._inner, self._lock = inner, lock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, *texts: Any, **options: Any) -> Any:
        with self._lock:
            return self._inner(*texts, **options)


def first_marks(question: str, images: int) -> str:
    """A question that marks its pictures by numbers, with the first mark of each replaced by `<image>`.

    If the numbers are not as many as the pictures, in order, the question is returned unchanged.
    """
    names = NUMBERED.findall(question)
    if len(set(names)) != images or list(dict.fromkeys(names)) != sorted(set(names), key=int):
        return question
    for name in dict.fromkeys(names):
        question = question.replace(f"<image {name}>", PLACEHOLDER, 1)
    return question
