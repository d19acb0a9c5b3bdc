"""Ray, in which workers run: started on this machine, or a cluster that is joined, by name or as it is found.

`workers.address=auto` joins whatever cluster Ray finds: the one that RAY_ADDRESS names, else the one that was last
started on this machine, whoever started it. So the log names what was joined, and a worker there must have what makes
numbers as this process has it, or the run is refused: one run is not answered by two versions of the code.
"""

from __future__ import annotations

import logging
import platform
import socket
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pdrop.runs.worker_dials import Workers

log = logging.getLogger("pdrop")

TRIES = 3  # attempts to start Ray, which gives up after half a minute on a busy machine
SOURCES = "pdrop's sources"


def started_ray(workers: Workers) -> Any:
    """The result of `ray.init`: for the named cluster, or for Ray on this machine, which is tried three times.

    Raises:
        RuntimeError: If Ray does not start here.
        ConnectionError: If there is no such cluster, or it has another Python or Ray.
    """
    import ray

    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if workers.address is not None:
        refuse_unreachable(workers.address)
        try:
            found = ray.init(address=workers.address, **quiet)
        except RuntimeError as error:  # Ray's own comparison of versions
            told = " ".join(str(error).split()).rstrip(".")
            raise ConnectionError(f"workers.address={workers.address}: {told}") from error
        except ConnectionError as error:
            raise ConnectionError(
                f"workers.address={workers.address}: {line_of(error)}; if the cluster was started with a token "
                "(~/.ray/auth_token), set RAY_AUTH_MODE=token"
            ) from error
        log.info("workers       %s", joined(found, workers.address))
        return found
    for attempt in range(1, TRIES + 1):
        try:
            # "local": not the cluster that RAY_ADDRESS names, or that somebody else has started on this machine
            return ray.init(address="local", num_cpus=workers.count * workers.threads, **quiet)
        except Exception as error:  # Ray raises a plain Exception if its processes start too slowly
            ray.shutdown()
            if attempt == TRIES:
                raise RuntimeError(f"Ray did not start on this machine: {line_of(error)}") from error
            log.warning("Ray did not start (%s); once more", line_of(error))
    raise AssertionError("unreachable")


def refuse_unreachable(address: str) -> None:
    """Refuse a cluster's address where nobody listens: Ray was seen to wait for more than eleven minutes.

    Raises:
        ConnectionError: Naming it. `auto`, which has no port, is left to Ray.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise ConnectionError(
            f"workers.address={address}: nobody answers there ({error.strerror or error}); `ray start --head` starts a "
            "cluster and says its address"
        ) from error


def joined(context: Any, asked: str) -> str:
    """What was joined, in a line: the cluster's address, its nodes, CPUs and cards.

    Args:
        context: What `ray.init` returned.
        asked: The address that it was given.
    """
    import ray

    address = dict(getattr(context, "address_info", None) or {}).get("gcs_address") or asked
    return cluster_line(str(address), ray.nodes())


def cluster_line(address: str, nodes: Sequence[Mapping[str, Any]]) -> str:
    """A cluster's address and its living nodes, as `ray.nodes` lists them."""
    there = [node for node in nodes if node["Alive"]]
    cpus, cards = (sum(node["Resources"].get(kind, 0) for node in there) for kind in ("CPU", "GPU"))
    hosts = sorted({node["NodeManagerHostname"] for node in there})
    models = {
        key.partition(":")[2] for node in there for key in node["Resources"] if key.startswith("accelerator_type:")
    }
    kinds = f" ({', '.join(sorted(models))})" if models else ""
    names = ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")
    return (
        f"joined the Ray cluster at {address}: {len(there)} node{'s' * (len(there) != 1)} ({names}), {cpus:g} CPUs, "
        f"{cards:g} GPUs{kinds}"
    )


def arrival(worker: Any, device: str, address: str | None) -> tuple[dict[str, Any], dict[str, str] | None]:
    """In a worker: what it says about itself, and on a cluster what makes its numbers."""
    return presence(worker, device), None if address is None else made_of()


def presence(worker: Any, device: str) -> dict[str, Any]:
    """In a worker: what it says about itself. On the CPU its device is the processor: a node may have cards, too."""
    from pdrop.environment import accelerator

    about: dict[str, Any] = worker.about()
    return about if device.startswith("cuda") else about | {"device": accelerator(device)["device_name"]}


def made_of() -> dict[str, str]:
    """What makes numbers in this process: versions of Python and of packages, and a digest of pdrop's sources."""
    from pdrop.environment import versions
    from pdrop.identity import PACKAGE, code_digest

    methods = sorted((PACKAGE / "methods").glob("*.py"))  # every one: a worker does all runs of a sweep
    return {"Python": platform.python_version(), **versions(), SOURCES: code_digest(methods)}


def refuse_other_code(host: str, theirs: Mapping[str, str]) -> None:
    """Refuse a worker whose numbers may be others.

    Args:
        host: The worker's.
        theirs: Its `made_of`.

    Raises:
        RuntimeError: Naming the host and what differs.
    """
    ours = made_of()
    differing = [
        f"{name} {theirs.get(name, 'not there')} (here: {ours.get(name, 'not there')})"
        for name in dict.fromkeys([*ours, *theirs])
        if theirs.get(name) != ours.get(name)
    ]
    if differing:
        raise RuntimeError(
            f"the worker on {host} has {', '.join(differing)}: answers of one run must be made by the same code; "
            "install the same there, or name another cluster with workers.address"
        )


def line_of(error: BaseException) -> str:
    """Ray's message about a death, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__
