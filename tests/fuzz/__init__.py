"""What is fuzzed in-process: a module for each target, with `seeds()` and `one_input(data)`.

`one_input` raises for a bug and for nothing else. Inputs that once found one are in found/TARGET; with the
seeds they are tried in each run of the tests (property/test_fuzz_targets.py).
"""

from typing import Final

TARGETS: Final = ("archive", "certificates", "dispatch", "egress", "protocol", "record", "settings")
