"""What of the host is shown to a job and what is covered, by tables of mounts that are written here."""

from pathlib import Path

import pytest

from pjw.errors import ConfigError
from pjw.launcher.visible import HostMount, check_visible, mounts_of, places_of, template_of

HOMES = ["-/home", "-/srv"]


def table(*points: str, kind: str = "ext4") -> bytes:
    """A table with a file system at / and at each of *points*, as the kernel writes it."""
    lines = [
        f"{number} 1 8:{number} / {point} rw,relatime shared:1 - {kind} /dev/sda{number} rw"
        for number, point in enumerate(("/", *points), start=20)
    ]
    return "\n".join([*lines, ""]).encode()


def places(*points: str, visible: tuple[str, ...] = (), hidden: tuple[str, ...] = ()) -> list[str]:
    """The paths that are shown (+) and covered (-), in their order; the first is the root."""
    root, *others = places_of(visible, hidden, table(*points))
    assert (root.path, root.view) == ("/", "visible")
    return [("-" if place.view == "cover" else "+") + place.path for place in others]


@pytest.mark.parametrize(
    ("points", "visible", "hidden", "expected"),
    [
        ((), (), (), HOMES),
        # one's own, whatever the host has there
        (("/proc", "/proc/sys/fs", "/dev/shm", "/run/lock", "/sys", "/tmp"), (), (), HOMES),
        (("/opt", "/etc/hosts"), (), (), ["+/etc/hosts", "-/home", "+/opt", "-/srv"]),
        (("/media/disk",), (), (), ["-/home", "-/media/disk", "-/srv"]),
        # what lies in what is covered is gone with it
        (("/home", "/home/one"), (), (), HOMES),
        (("/data", "/data/sub"), ("/data",), (), ["+/data", "+/data/sub", "-/home", "-/srv"]),
        (("/data", "/data/sub"), ("/data/sub",), (), ["-/data", "+/data/sub", "-/home", "-/srv"]),
        # nobody needs an overlay of what is hidden
        (("/data", "/data/sub"), ("/data",), ("/data/sub",), ["+/data", "-/home", "-/srv"]),
        (("/data",), ("/data",), ("/data",), HOMES),
        # all of it, and then no home is covered
        (("/data",), ("/",), (), ["+/data"]),
    ],
)
def test_what_is_shown(
    points: tuple[str, ...], visible: tuple[str, ...], hidden: tuple[str, ...], expected: list[str]
) -> None:
    """Each case: mount points, what the operator shows and hides, what init is told."""
    assert places(*points, visible=visible, hidden=hidden) == expected


def test_the_template_has_what_something_for_jobs_lies_in() -> None:
    """The root always; no mount that is covered and holds nothing that is shown."""
    host = table("/boot", "/data", "/data/sub", "/usr", "/var")
    shown = places_of(("/data/sub", "/var/lib"), (), host)
    found = template_of(shown, ("/var/lib/pjw", "/data/none"), host)
    assert [place.path for place in found] == ["/", "/data", "/data/sub", "/usr", "/var"]
    assert {place.view for place in found} == {"mount"}
    assert [place.path for place in template_of(shown[:1], (), host)] == ["/"]


def test_a_part_of_what_is_covered_may_be_shown() -> None:
    """A directory without a mount of its own takes an overlay then; not one that is missing."""
    found = places("/var", visible=("/var/lib/../lib", "/var/pjw-none"))
    assert found == ["-/home", "-/srv", "-/var", "+/var/lib"]


def test_a_part_of_what_asks_others_is_bound_and_not_looked_at(tmp_path: Path) -> None:
    """An overlay would read it as root. It is not there: whoever looks for it leaves it out."""
    (tmp_path / "link").symlink_to("/var/pjw-far/some/../data")
    mounts = table("/var/pjw-far").replace(b"ext4 /dev/sda21", b"nfs4 far:")
    for visible in ("/var/pjw-far/data", f"{tmp_path}/link"):
        found = {place.path: place.view for place in places_of([visible], [], mounts)}
        assert found["/var/pjw-far/data"] == "bound"


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    """It is a path that is not there."""
    (tmp_path / "loop").symlink_to("loop")
    assert [place.path for place in places_of([f"{tmp_path}/loop/x"], [], table())] == ["/", "/home", "/srv"]


def test_who_serves_what_is_mounted_is_not_asked_where_that_is() -> None:
    """He may be gone. /bin is a link on most hosts; were something mounted there it would be none."""
    assert places("/bin", visible=("/bin",)) == ["+/bin", *HOMES]


@pytest.mark.parametrize("kind", ["fuse.sshfs", "fuse", "nfs4", "virtiofs", "9p"])
def test_what_asks_others_who_may_read_it_has_no_overlay(kind: str) -> None:
    """An overlay reads it as root, whoever asks: a job would see more than its user may."""
    found = places_of(["/data"], [], table("/data", "/opt", kind=kind))
    assert [(place.path, place.view) for place in found if place.view != "cover"] == [
        ("/", "bound"),
        ("/data", "bound"),
        ("/opt", "bound"),
    ]


def test_many_that_lie_side_by_side_are_covered_by_their_parents() -> None:
    """Each is a mount for every job."""
    many = [f"/var/lib/containers/overlay/{number}/merged" for number in range(500)]
    assert places(*many) == ["-/home", "-/srv", "-/var/lib/containers/overlay"]
    # a job has a /var/tmp of its own: not all of /var
    wide = [f"/var/{number}" for number in range(50)]
    assert places(*wide) == sorted(["-/home", "-/srv", *(f"-{path}" for path in wide)])


def test_more_than_init_takes_is_refused() -> None:
    """With the numbers, and before a job is made."""
    with pytest.raises(ConfigError, match=r"^200 file systems lie in the visible paths, and 2 are"):
        places(*(f"/usr/{number}" for number in range(200)))


def test_a_table_is_read_as_the_kernel_writes_it() -> None:
    """Escapes, any number of optional fields, and what lies on top where there are two."""
    assert mounts_of(
        b"20 1 8:1 / /a\\040b\\134 rw - ext4 /dev/sda1 rw\n"
        b"21 1 0:5 /x /a\\040b\\134 rw shared:1 master:2 - fuse.sshfs y rw\n"
    ) == {"/a b\\": HostMount(b"21", b"0:5", b"fuse.sshfs", b"rw")}


@pytest.mark.parametrize("name", ["a\rb", "a\x0bb", "a\u2028b", "a#b"])
def test_a_mount_point_with_an_odd_name(name: str) -> None:
    """What ends a line for Python is a name to the kernel, which escapes only some characters."""
    written = name.replace("#", "\\043")
    assert list(mounts_of(table(f"/media/{written}"))) == ["/", f"/media/{name}"]


@pytest.mark.parametrize("path", ["/proc", "/tmp/x", "/run/user", "/dev/.."])
def test_what_may_be_visible(path: str) -> None:
    """Not what a job has of its own; ".." is what it is to the kernel."""
    if path == "/dev/..":
        check_visible([path, "/none/there"])
        return
    with pytest.raises(ConfigError, match=f"^cannot show {path} to jobs: each has its own directory"):
        check_visible([path])


def test_a_file_is_no_place() -> None:
    """It cannot be shown by an overlay."""
    with pytest.raises(ConfigError, match=r"^cannot show /etc/passwd to jobs: it is no directory$"):
        check_visible(["/etc/passwd"])
