"""How many workers answer a run, and what each takes: the dials `workers=`, without Ray."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workers:
    """How many processes answer, and the resources of each.

    Attributes:
        count: Number of workers; 0: this process answers itself.
        address: Address of a Ray cluster; "auto" finds the one of this machine. None: this machine alone.
        gpus: Share of a GPU that each takes; None: one on cuda, else none.
        threads: CPU threads of each.
    """

    count: int = 0
    address: str | None = None
    gpus: float | None = None
    threads: int = 1

    def check(self) -> None:
        """Refuse invalid values.

        Raises:
            ValueError: Naming the dial and what it takes.
        """
        if self.count < 0:
            raise ValueError(f"workers is a whole number from 0 on, not {self.count}")
        if self.threads < 1:
            raise ValueError(f"workers.threads is a whole number from 1 on, not {self.threads}")
        if self.gpus is not None and self.gpus < 0:
            raise ValueError(f"workers.gpus is a share of a GPU for each worker, such as 1 or 0.5, not {self.gpus}")
        if self.address is not None and not self.count:
            raise ValueError(f"workers.address={self.address} without workers: say how many, workers=8")
        if self.gpus is not None and self.gpus > 1 and not float(self.gpus).is_integer():
            raise ValueError(f"workers.gpus is a whole number or a share below 1, not {self.gpus}")
        if self.count and not ray_is_here():
            raise ValueError("workers need Ray, which is not installed: pip install 'pdrop[workers]'; or workers=0")

    def check_device(self, device: str, timed: bool) -> None:
        """Refuse more cards than there are, and shares that leave a worker without a card, or without a whole one for
        timing.

        Args:
            device: The run's device.
            timed: Whether something is timed.

        Raises:
            ValueError: Naming the dial and what it takes.
        """
        share = self.share(device)
        if device.startswith("cuda") and share == 0:
            raise ValueError("workers.gpus=0 hides every card from the workers: workers.gpus=1, or device=cpu")
        if timed and 0 < share < 1:
            raise ValueError("what is timed needs a card of its own: workers.gpus=1, or latency=off")
        if share and self.address is None:  # a cluster may have cards that this machine lacks
            import torch

            if self.count * share > (there := torch.cuda.device_count()):
                raise ValueError(
                    f"workers={self.count} take {self.count * share:g} GPUs, and this machine has {there}: fewer "
                    "workers, workers.gpus=0.5 for two on a card, or device=cpu"
                )

    def share(self, device: str) -> float:
        """The share of a GPU that a worker takes."""
        return (1.0 if device.startswith("cuda") else 0.0) if self.gpus is None else self.gpus


def ray_is_here() -> bool:
    """Whether Ray is installed."""
    from importlib.util import find_spec

    return find_spec("ray") is not None
