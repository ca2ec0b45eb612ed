"""Random sums of random einsum terms: structures that nobody chose, for what has to hold for all of them."""

from __future__ import annotations

import math
from itertools import count
from random import Random

import einlinear as el
from einlinear.structures import Structure

FEATURES = (12, 24, 36, 60)


def random_structure(seed: int, terms: int | None = None) -> Structure:
    """A structure of one to three terms of one to three factors, some of it padded; the same for the same seed.

    The README's own kinds of terms are among them: factors that share axes, axes that are read and written, terms
    of a single factor beside longer ones.
    """
    random = Random(seed)
    in_features, out_features = random.choice(FEATURES), random.choice(FEATURES)
    names = (f"a{i}" for i in count())
    sizes: dict[str, int] = {}

    def axes(*lengths: int) -> list[str]:
        new = [next(names) for _ in lengths]
        sizes.update(zip(new, lengths, strict=True))
        return new

    def term() -> str:
        state = read = axes(*_divided(random, in_features, random.randint(1, 3)))
        factors = []
        length = random.randint(1, 3)
        for step in range(length):
            last = step + 1 == length
            # batch axes are in the factor and stay, contracted ones are summed over, free ones pass by
            untouched = [a for a in read if not any(a in factor for factor in factors)]
            roles = {a: random.choice(["batch", "contracted", "free"]) for a in state}
            if last:  # every input axis meets a factor, and what stays has to divide the output
                roles |= {a: "contracted" for a in untouched}
                roles |= {a: "contracted" for a in state if a not in read}
                while out_features % math.prod(sizes[a] for a, role in roles.items() if role != "contracted"):
                    roles[next(a for a, role in roles.items() if role != "contracted")] = "contracted"
            batch, contracted = ([a for a in state if roles[a] == role] for role in ("batch", "contracted"))
            stays = [a for a in state if a not in contracted]
            if last:
                missing = out_features // math.prod(sizes[a] for a in stays)
                new = axes(*_divided(random, missing, random.randint(1, 2)))
            else:
                new = axes(*(random.randint(1, 3) for _ in range(random.randint(1, 2))))
            factor = [*batch, *contracted, *new]
            random.shuffle(factor)
            factors.append(factor)
            state = [*stays, *new]
        random.shuffle(state)
        written = [f"({' '.join(read)})", *(" ".join(factor) for factor in factors)]
        return f"{', '.join(written)} -> ({' '.join(state)})"

    text = " + ".join(term() for _ in range(terms or random.choice((1, 2, 2, 3))))
    text += " where " + ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    # one feature less is padded
    return el.structure(text, in_features - random.choice((0, 0, 1)), out_features - random.choice((0, 0, 1)))


def _divided(random: Random, number: int, parts: int) -> list[int]:
    """Sizes whose product is the number."""
    found = []
    for _ in range(parts - 1):
        divisor = random.choice([d for d in range(1, number + 1) if number % d == 0])
        found.append(divisor)
        number //= divisor
    return [*found, number]
