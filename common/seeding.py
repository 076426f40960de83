"""Randomness by name: a seed is a hash of what it is for, never of when it was asked.

Not a generator: torch-side code makes one from the number (`diffusion.masking.generator`).
"""

import hashlib

Name = str | int


def derive_seed(run_seed: int, *names: Name) -> int:
    """A 63-bit seed for the thing called `names` in the run `run_seed`.

    The same names give the same seed on every machine and in every process, whatever the number
    of workers or the order of work. Types are part of the name: `1` and `"1"` differ.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name in (run_seed, *names):
        digest.update(f"{type(name).__name__}:{name}\x1f".encode())
    return int.from_bytes(digest.digest(), "big") >> 1
