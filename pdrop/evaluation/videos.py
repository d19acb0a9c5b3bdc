"""How one checkpoint is shown videos: as videos where its processor takes them, else as so many pictures.

Qwen's processors take frames by twos, with the times they stand for; LLaVA-OneVision's, Video-LLaVA's and InternVL's as
many of one size. What a frame may have of pixels is Qwen's own rule (qwen-vl-utils' `fetch_video`): between two limits,
and all frames of a video together below a third, so that those of a long one are smaller. Without limits the processor
sizes frames as it was saved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from pdrop.evaluation.frames import Film, Sampling, Video
from pdrop.pictures import as_shown
from pdrop.record import RunSpec

if TYPE_CHECKING:
    Visual = Image.Image | Video

LEAST_TOKENS, MOST_TOKENS = 128, 768  # of a frame, where only another limit is given (qwen-vl-utils)
SLACK = 1.05  # the least is never above the most by more than this


class VideoInputs:
    """What a processor makes of videos.

    Args:
        processor: The checkpoint's.
        spec: The run's: which frames, and of how many pixels.
    """

    def __init__(self, processor: Any, spec: RunSpec) -> None:
        kind: Any = getattr(processor, "video_processor", None)
        token = getattr(processor, "video_token", None)
        self.token: str | None = token if kind is not None and isinstance(token, str) else None
        # processors that stack videos take those of a batch that have as many frames; Qwen's lay patches in a row
        self.stacks = self.token is not None and not hasattr(kind, "merge_size")
        self.cropped = bool(getattr(kind, "do_center_crop", False))
        self.group = int(getattr(kind, "temporal_patch_size", 1))
        self.sampling = Sampling(spec.frames, spec.frame_sampling, spec.fps, self.group)
        self.times = spec.frame_times
        self.limits = spec.min_frame_pixels, spec.max_frame_pixels, spec.max_video_pixels
        self.limited = self.limits != (None, None, None)
        if self.limited and self.token is not None and self.stacks:
            raise ValueError(
                f"{type(kind).__name__} scales every frame to the same size: leave out min_frame_pixels, "
                "max_frame_pixels and max_video_pixels"
            )
        self.capped = hasattr(kind, "cap_pixels_per_frame")
        self.side = 1 if self.token is None or self.stacks else kind.patch_size * kind.merge_size

    def show(self, visuals: Sequence[Any], pixels: float = 1.0) -> list[Visual]:
        """A question's pictures and films as the model is shown them.

        Args:
            visuals: Pictures and `Film`s, in order.
            pixels: Share of each frame's pixels that the processor is shown.
        """
        shown: list[Visual] = []
        for visual in visuals:
            if not isinstance(visual, Film):
                shown.append(as_shown(visual))
            elif self.token is None:
                shown += visual.show(self.sampling).frames
            else:
                shown.append(visual.show(self.sampling, lambda frame, count: self._sized(frame, count, pixels)))
        return shown

    def _sized(self, frame: Image.Image, count: int, pixels: float) -> Image.Image:
        """A frame of so many, with that share of its pixels, within the limits."""
        if pixels < 1:
            frame = shrunk(frame, pixels)
        if not self.limited or self.stacks:
            return frame
        from qwen_vl_utils import smart_resize
        from torchvision.transforms.v2 import functional

        least, most, together = self.limits
        unit = self.side**2
        most = max(MOST_TOKENS * unit, least or 0) if most is None else most
        least = min(LEAST_TOKENS * unit, most) if least is None else least
        if together is not None:
            most = max(min(most, int(together / count * self.group)), int(least * SLACK))
        size = smart_resize(frame.height, frame.width, self.side, least, most)
        if size == (frame.height, frame.width):
            return frame
        tensor = functional.pil_to_tensor(frame)
        resized = functional.resize(
            tensor, list(size), interpolation=functional.InterpolationMode.BICUBIC, antialias=True
        )
        made: Image.Image = functional.to_pil_image(resized)
        return made

    def arguments(self, videos: Sequence[Video]) -> dict[str, Any]:
        """What a processor's call takes besides text and pictures; {} without videos."""
        if not videos:
            return {}
        from transformers.video_utils import VideoMetadata

        about = [
            VideoMetadata(
                total_num_frames=video.total,
                fps=video.rate,
                width=video.size[0],
                height=video.size[1],
                duration=video.seconds,
                frames_indices=list(video.places),
            )
            for video in videos
        ]
        options: dict[str, Any] = {"do_sample_frames": False, "video_metadata": about}
        if self.capped:  # transformers' own, beside what the processor was saved with; ours is in `_sized`
            options["cap_pixels_per_frame"] = False
        if self.limited:
            options["do_resize"] = False
        return {"videos": [list(video.frames) for video in videos], "videos_kwargs": options}

    def sentence(self, video: Video) -> str:
        """How long a video is, and when its frames are shown, in LLaVA-Video's words (docs/LLaVA_Video_1003.md)."""
        times = ",".join(f"{time:.2f}s" for time in video.times)
        return (
            f"The video lasts for {video.seconds:.2f} seconds, and {len(video.frames)} frames are uniformly sampled "
            f"from it. These frames are located at {times}.Please answer the following questions related to this video."
        )


def shrunk(image: Image.Image, pixels: float) -> Image.Image:
    """The picture with that share of its pixels: its sides shrink by the square root."""
    width, height = (max(1, round(side * math.sqrt(pixels))) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)
