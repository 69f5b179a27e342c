"""What not every node offers: mounts and images of its operator's, names on the network.

A node tells it in its Hello, by names alone. The node knows what it offers to which client, and so has the
last word: a job that it refuses ends with `start_failed`.
"""

from collections.abc import Iterable
from typing import Final

from pjw.cluster.v1 import cluster_pb2 as pb
from pjw.errors import GpuError, ImageNotFoundError, InvalidJobError, MountNotFoundError
from pjw.model import JobSpec, split_mount
from pjw.worker.slots import Wanting

_NAMES: Final = "names on the network"


def offers_of(hello: pb.Hello) -> frozenset[str]:
    """What a node offers."""
    names = (_NAMES,) if hello.names else ()
    return frozenset((*map(_mount, hello.mounts), *map(_image, hello.images), *names))


def needs_of(job: Wanting | JobSpec) -> frozenset[str]:
    """What a job needs of that."""
    mounts = (_mount(split_mount(each)[0]) for each in job.mounts)
    return frozenset(
        (*mounts, *((_image(job.image),) if job.image else ()), *((_NAMES,) if job.allow else ()))
    )


def _mount(name: str) -> str:
    return f"the mount {name}"


def _image(name: str) -> str:
    return f"the image {name}"


def require_offered(spec: JobSpec, hellos: Iterable[pb.Hello | None]) -> None:
    """Refuse a job that no node offers what it needs; None is a node that has not said yet what it has.

    Raises MountNotFoundError, ImageNotFoundError, GpuError and InvalidJobError.
    """
    needs = needs_of(spec)
    if not needs and not spec.gpus:
        return
    known: list[pb.Hello] = []
    for hello in hellos:
        if hello is None:
            return
        known.append(hello)
    offers = [(offers_of(hello), int(hello.gpus)) for hello in known]
    if not offers or any(needs <= offered and spec.gpus <= gpus for offered, gpus in offers):
        return
    anywhere = frozenset[str]().union(*(offered for offered, _ in offers))
    for mount in spec.mounts:
        if _mount(split_mount(mount)[0]) not in anywhere:
            raise MountNotFoundError(split_mount(mount)[0])
    if spec.image and _image(spec.image) not in anywhere:
        raise ImageNotFoundError(spec.image)
    if spec.allow and _NAMES not in anywhere:
        raise InvalidJobError(f"cannot allow {spec.allow[0]}: no node offers names on the network")
    if spec.gpus > (most := max(gpus for _, gpus in offers)):
        raise GpuError(
            f"the job asks for {spec.gpus} GPU{'s' * (spec.gpus > 1)}, and no node has more than {most}",
            hint="ask for fewer",
        )
    wanted = [*sorted(needs), *((f"{spec.gpus} GPUs",) if spec.gpus else ())]
    raise InvalidJobError(f"no node has all that the job asks for: {', '.join(wanted)}")
