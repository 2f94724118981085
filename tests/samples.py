"""How much a test tries: `make test` draws samples by a seed, `make prove` tries everything.

`SEED=N` draws the samples of another run again. Both are read once, from the environment, which the workers of a run
and the programs that tests start inherit.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from typing import Final, TypeVar

T = TypeVar("T")

PROVING: Final = os.environ.get("PROVE", "0") != "0"
SEED: Final = int(os.environ.setdefault("SEED", str(random.SystemRandom().randrange(1 << 30))))


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
