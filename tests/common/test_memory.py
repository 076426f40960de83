"""The peak covers children, outlives them, and never counts less than this process holds."""

import subprocess
import sys
import time

import psutil

from common.memory import GIB, PeakMemory, tree_bytes

MIB = 1024**2
HOLD = "import sys; b = bytearray(96 * 1024 * 1024); print('up', flush=True); sys.stdin.read()"


def test_a_child_counts_while_it_lives_and_its_peak_stays() -> None:
    before = tree_bytes(psutil.Process())
    with PeakMemory(interval_s=0.05) as peak:
        child = subprocess.Popen(
            [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert child.stdout is not None and child.stdin is not None
        child.stdout.readline()
        time.sleep(0.3)
        child.stdin.close()
        child.wait(timeout=10)
        child.stdout.close()
        after = peak.sample()
    assert peak.gib * GIB > before + 90 * MIB
    assert after < peak.gib * GIB - 60 * MIB


def test_the_meaning_is_said() -> None:
    assert "PSS" in PeakMemory(0.5).meaning and "0.5 s" in PeakMemory(0.5).meaning
