"""How much a test tries: `make test` draws samples by a seed, `make prove` tries everything.

Without `SEED=N` the seed is the commit: every commit draws other samples, and every machine draws the same ones for it.
Both are read once, from the environment, which the workers of a run and the programs that tests start inherit.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Final, TypeVar

T = TypeVar("T")


def _of_commit() -> int:
    """The seed of the commit; a random one where there is no commit to ask for."""
    asked = ("git", "rev-parse", "HEAD")
    try:
        head = subprocess.run(asked, cwd=Path(__file__).parent, capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return random.SystemRandom().randrange(1 << 30)
    return int(head.stdout[:7], 16)


PROVING: Final = os.environ.get("PROVE", "0") != "0"
if not os.environ.get("SEED"):
    os.environ["SEED"] = str(_of_commit())
SEED: Final = int(os.environ["SEED"])


def size(sampled: int, whole: int) -> int:
    """How many rounds to run."""
    return whole if PROVING else sampled


def dice(name: str) -> random.Random:
    """The chances of what is called `name`; two names draw independently of each other."""
    return random.Random(f"{SEED} {name}")  # noqa: S311  # repeatable, not secret


def sample(whole: Iterable[T], count: int, name: str) -> list[T]:
    """`count` of `whole`, in their order, or all of them."""
    everything = list(whole)
    if PROVING or count >= len(everything):
        return everything
    return [everything[place] for place in sorted(dice(name).sample(range(len(everything)), count))]
