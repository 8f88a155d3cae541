"""The pinned packages fit together. This asks pip's registry."""

import os
import platform
import subprocess
import sys

import pytest

from configurator import ROOT


@pytest.mark.slow
@pytest.mark.skipif((sys.platform, platform.machine()) != ("linux", "x86_64"), reason="vLLM has no wheel for this machine")
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_packages_for_a_gpu_install_under_each_python(tmp_path, version):
    """From wheels alone. What a requirement says of the Python version is read as of the Python that runs this."""
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "-q", f"--python-version={version}", "--only-binary=:all:",
           f"--target={tmp_path}", "-r", os.path.join(ROOT, "requirements-gpu.txt")]  # fmt: skip
    done = subprocess.run(pip, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
