"""The room says what it needs."""

from __future__ import annotations

import subprocess
import sys


def test_without_flax_the_room_says_what_to_install():
    code = "import sys; sys.modules['flax'] = None; import deformconv.flax"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "ModuleNotFoundError: deformconv.flax needs Flax, which is not installed: pip install" in done.stderr
