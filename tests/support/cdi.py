"""A made-up machine with GPUs: device nodes that everybody may open, and the CDI file that names them."""

import json
import os
import stat
from pathlib import Path
from typing import Any, Final

KIND: Final = "nvidia.com/gpu"
# /dev/zero, /dev/full and /dev/null by other names
CONTROL: Final = (1, 5)
NUMBERS: Final = ((1, 7), (1, 3))


def make_gpus(directory: Path) -> dict[str, Any]:
    """Two GPUs as nvidia-ctk describes them, and what comes with them; the file is in *directory*/cdi."""
    for name, numbers in (("nvidiactl", CONTROL), ("nvidia0", NUMBERS[0]), ("nvidia1", NUMBERS[1])):
        os.mknod(directory / name, stat.S_IFCHR, os.makedev(*numbers))
        # the umask has its part in the mode of a new one
        (directory / name).chmod(0o666)
    (directory / "daemon").write_text("daemon\n")
    (directory / "library").write_text("library\n")
    own = {number: [node(directory, f"nvidia{number}")] for number in range(2)}
    devices = {
        **{str(number): nodes for number, nodes in own.items()},
        **{f"GPU-{number}c": nodes for number, nodes in own.items()},
        "all": [each for nodes in own.values() for each in nodes],
    }
    spec = {
        "cdiVersion": "0.5.0",
        "kind": KIND,
        "devices": [
            {
                "name": name,
                "containerEdits": {"deviceNodes": nodes, "env": [f"FAKE_{nodes[0]['path'][-1]}=1"]},
            }
            for name, nodes in devices.items()
        ],
        "containerEdits": {
            "env": ["NVIDIA_VISIBLE_DEVICES=void", "OF_THE_CLIENT=no"],
            "deviceNodes": [node(directory, "nvidiactl", "nvidia-sub/ctl"), node(directory, "nvidiactl")],
            "hooks": [{"hookName": "createContainer", "path": "/bin/false", "args": ["x"]}],
            "mounts": [
                {"hostPath": str(directory / "daemon"), "containerPath": "/run/daemon/socket"},
                {"hostPath": str(directory / "library"), "containerPath": "/etc/passwd", "options": ["ro"]},
                {"hostPath": "/usr/lib", "containerPath": "/usr/lib", "options": ["ro", "rbind"]},
            ],
        },
    }
    (directory / "cdi").mkdir()
    write(directory, spec)
    return spec


def node(directory: Path, name: str, path: str = "") -> dict[str, Any]:
    """A device of the job's that is another one on the machine."""
    return {"path": f"/dev/{path or name}", "hostPath": str(directory / name), "permissions": "rw"}


def write(directory: Path, spec: object) -> None:
    """Have the file say that from now on."""
    (directory / "cdi/nvidia.json").write_text(json.dumps(spec))
