"""Where bits and ranks pay most: two budgets, each spread over the layers of a model.

Both take what every layer would lose or gain as plain numbers and know nothing of weights.
"""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

# Steps that a budget of bits is counted in at most: more of them only cost time and memory.
_MOST_STEPS = 1 << 14
# Sums of the same errors in another order differ by so much.
_ROUNDING = 1e-12


def spread_bits(
    errors: Sequence[Sequence[float]], sizes: Sequence[int], bits: Sequence[int], average: float
) -> list[int]:
    """The bits of each layer that lose least together, with ``average`` bits a weight or fewer.

    ``errors`` of each layer are in the order of ``bits``, which ascend; ``sizes`` count weights.
    The least bits are taken for granted and the others bought, one choice a layer, by
    dynamic programming: exact as long as the sizes share a divisor that is not too small, and else
    to one part in 16384 of all weights, which what is left then buys one by one. Of equals, the
    earlier layer gets more.
    """
    more = [each - bits[0] for each in bits]
    wanted = Fraction(average).limit_denominator(10**6) - bits[0]
    spare = math.floor(wanted * sum(sizes))  # bits beyond the least, of all weights together
    unit = max(math.gcd(*sizes), -(-sum(sizes) // _MOST_STEPS))
    prices = [-(-size // unit) for size in sizes]
    choices = _cheapest(errors, prices, more, min(spare // unit, more[-1] * sum(prices)))
    spare -= sum(size * more[choice] for size, choice in zip(sizes, choices, strict=True))
    while True:
        better = [
            (errors[i][choice] - errors[i][choice + 1], -i)
            for i, choice in enumerate(choices)
            if choice + 1 < len(bits) and sizes[i] * (more[choice + 1] - more[choice]) <= spare
        ]
        gain, place = max(better, default=(-1.0, 0))
        if gain < 0:
            return [bits[choice] for choice in choices]
        choices[-place] += 1
        spare -= sizes[-place] * (more[choices[-place]] - more[choices[-place] - 1])


def _cheapest(
    errors: Sequence[Sequence[float]], prices: Sequence[int], more: Sequence[int], budget: int
) -> list[int]:
    """Which of so many ``more`` bits each layer buys, at its price a bit.

    From the last layer to the first: least[c] is what the layers seen so far lose with c to spend.
    """
    least = np.zeros(budget + 1)
    bought = np.zeros((len(prices), budget + 1), np.int8)
    for place in reversed(range(len(prices))):
        options = np.full((len(errors[place]), budget + 1), np.inf)
        for choice, error in enumerate(errors[place]):
            cost = more[choice] * prices[place]
            if cost <= budget:
                options[choice, cost:] = least[: budget + 1 - cost] + error
        least = options.min(axis=0)
        for choice, option in enumerate(options):  # the last that is as good, so the most bits
            bought[place, option <= least * (1 + _ROUNDING)] = choice
    found = []
    for price, best in zip(prices, bought, strict=True):
        found.append(int(best[budget]))
        budget -= more[found[-1]] * price
    return found


def spread_ranks(gains: Sequence[Sequence[float]], prices: Sequence[int], budget: int) -> list[int]:
    """The rank of each layer, at least 1, that gains most together for ``budget`` parameters.

    ``gains`` of each layer are those of its components, descending; every component costs the
    layer's price, and as many as are given are the most that it can get. Taken is whatever gains
    most for its price, and what no longer fits makes room for what does. Where all prices are the
    same no other choice gains more; elsewhere one may, by less than the gain of one component. Of
    equals, the earlier layer gets more.
    """
    ranks = [1] * len(gains)
    left = budget - sum(prices)
    offers = [
        (-gain[1] / price, place)
        for place, (gain, price) in enumerate(zip(gains, prices, strict=True))
        if len(gain) > 1
    ]
    heapq.heapify(offers)
    while offers:
        worth, place = heapq.heappop(offers)
        if prices[place] > left or worth == 0:
            continue
        left -= prices[place]
        ranks[place] += 1
        if ranks[place] < len(gains[place]):
            heapq.heappush(offers, (-gains[place][ranks[place]] / prices[place], place))
    return ranks
