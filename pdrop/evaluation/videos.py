"""How videos are given to a checkpoint: as videos if its processor takes them, else as pictures.

Qwen's processors take frames in pairs, with their times; LLaVA-OneVision's, Video-LLaVA's and InternVL's take frames of
one size. The pixels of a frame follow Qwen's own rule (qwen-vl-utils' `fetch_video`): between two limits, and all
frames of a video together below a third limit, so that frames of a long video are smaller. Without limits the
processor's saved settings apply.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from pdrop.evaluation.frames import Film, Sampling, Video
from pdrop.pictures import as_shown
from pdrop.record import RunSpec

NO_LIMITS = (None, None, None)
LEAST_TOKENS, MOST_TOKENS = 128, 768  # tokens of a frame, if only another limit is given (qwen-vl-utils)
SLACK = 1.05  # the lower limit exceeds the upper one by at most this factor


class VideoInputs:
    """A processor's inputs for videos.

    Args:
        processor: The checkpoint's.
        sampling: Which frames.
        times: Whether a sentence before the question gives their times.
        limits: Fewest and most pixels of a frame, and most of all frames together; None: the processor's own.

    Raises:
        ValueError: If the processor has no such limits.
    """

    def __init__(
        self,
        processor: Any,
        sampling: Sampling | None = None,
        times: bool = False,
        limits: tuple[int | None, int | None, int | None] = NO_LIMITS,
    ) -> None:
        kind: Any = getattr(processor, "video_processor", None)
        token = getattr(processor, "video_token", None)
        self.token: str | None = token if kind is not None and isinstance(token, str) else None
        # processors that stack videos need equally many frames in a batch; Qwen's concatenate patches
        self.stacks = self.token is not None and not hasattr(kind, "merge_size")
        self.cropped = bool(getattr(kind, "do_center_crop", False))
        self.group = int(getattr(kind, "temporal_patch_size", 1))
        self.sampling = replace(sampling or Sampling(), group=self.group)
        self.times, self.limits, self.limited = times, limits, limits != NO_LIMITS
        if self.limited and self.token is not None and self.stacks:
            raise ValueError(
                f"{type(kind).__name__} scales every frame to the same size: leave out min_frame_pixels, "
                "max_frame_pixels and max_video_pixels"
            )
        self.capped = hasattr(kind, "cap_pixels_per_frame")
        self.side = 1 if self.token is None or self.stacks else kind.patch_size * kind.merge_size

    @classmethod
    def of(cls, processor: Any, spec: RunSpec) -> VideoInputs:
        """The video inputs for a run's spec.

        Raises:
            ValueError: If the processor has no such limits.
        """
        limits = spec.min_frame_pixels, spec.max_frame_pixels, spec.max_video_pixels
        return cls(processor, Sampling(spec.frames, spec.frame_sampling, spec.fps), spec.frame_times, limits)

    def kind(self, pictures: int, videos: Sequence[Video]) -> tuple[int, ...]:
        """Sort key: prompts of the same kind may share a batch; with pictures only first, without any last."""
        counts = tuple(len(video.places) for video in videos) if self.stacks else ()
        return int(not pictures and not videos), len(videos) and 1 + (pictures > 0), *counts

    def show(self, visuals: Sequence[Any], pixels: float = 1.0) -> tuple[list[Image.Image], list[Video]]:
        """A question's pictures and films as given to the model.

        Args:
            visuals: Pictures and `Film`s, in order.
            pixels: Share of each frame's pixels that the processor is given.

        Returns:
            The pictures, and the videos.
        """
        pictures: list[Image.Image] = []
        videos: list[Video] = []
        for visual in visuals:
            if not isinstance(visual, Film):
                pictures.append(as_shown(visual))
            elif self.token is None:
                pictures += visual.show(self.sampling).frames
            else:
                videos.append(visual.show(self.sampling, lambda frame, count: self._sized(frame, count, pixels)))
        return pictures, videos

    def outline(self, films: Sequence[Film], pixels: float = 1.0) -> tuple[list[tuple[int, int]], list[Video]]:
        """The result of `show` for films, without decoding: sizes of pictures, and videos without their frames."""
        videos = [film.outline(self.sampling) for film in films]
        if self.token is None:
            return [video.size for video in videos for _ in video.places], []
        return [], [replace(one, size=self._size(one.size, len(one.places), pixels)) for one in videos]

    def _sized(self, frame: Image.Image, count: int, pixels: float) -> Image.Image:
        """A frame of a video of `count`, with that share of its pixels, within the limits."""
        if pixels < 1:
            frame = frame.resize(shrunk(frame.size, pixels), Image.Resampling.BICUBIC)
        width, height = self._size(frame.size, count)
        if (width, height) == frame.size:
            return frame
        from torchvision.transforms import functional  # as fetch_video; its successor (v2) rounds otherwise

        resized = functional.resize(
            functional.pil_to_tensor(frame), [height, width], functional.InterpolationMode.BICUBIC, antialias=True
        )
        made: Image.Image = functional.to_pil_image(resized)
        return made

    def _size(self, size: tuple[int, int], count: int, pixels: float = 1.0) -> tuple[int, int]:
        """(width, height) of a frame of a video of `count`, with that share of its pixels, within the limits."""
        size = shrunk(size, pixels) if pixels < 1 else size
        if not self.limited or self.stacks:
            return size
        from qwen_vl_utils import smart_resize

        least, most, together = self.limits
        unit = self.side**2
        most = max(MOST_TOKENS * unit, least or 0) if most is None else most
        least = min(LEAST_TOKENS * unit, most) if least is None else least
        if together is not None:
            most = max(min(most, int(together / count * self.group)), int(least * SLACK))
        height, width = smart_resize(size[1], size[0], self.side, least, most)
        return width, height

    def arguments(self, videos: Sequence[Video]) -> dict[str, Any]:
        """The video arguments of a processor's call; {} without videos."""
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
        if self.capped:  # transformers' own limit, in addition to the processor's saved ones; ours is in `_sized`
            options["cap_pixels_per_frame"] = False
        if self.limited:
            options["do_resize"] = False
        return {"videos": [list(video.frames) for video in videos], "videos_kwargs": options}

    def sentence(self, video: Video) -> str:
        """A video's length and its frames' times, in LLaVA-Video's words (docs/LLaVA_Video_1003.md)."""
        times = ",".join(f"{time:.2f}s" for time in video.times)
        return (
            f"The video lasts for {video.seconds:.2f} seconds, and {len(video.places)} frames are uniformly sampled "
            f"from it. These frames are located at {times}.Please answer the following questions related to this video."
        )


def shrunk(size: tuple[int, int], pixels: float) -> tuple[int, int]:
    """(width, height) with that share of the pixels left."""
    width, height = (max(1, round(side * math.sqrt(pixels))) for side in size)
    return width, height
