"""Simulates calls over replicas: what balancing, headroom and the delay of a new GPU cost.

    python deploy/simulate.py --replicas 4 --rate 6

Calls begin as a Poisson process and have exponential lengths. Each holds one connection of a replica. A
call that a full replica refuses goes to another one, as in deploy/haproxy.cfg. The rate may step up
once. Replicas are then added, and each takes clients `--delay-s` later. The same seed gives the same
figures.
"""

from __future__ import annotations

import argparse
import heapq
import random
from dataclasses import dataclass

RETRIES = 2
"""As in deploy/haproxy.cfg."""
POLICIES = ("leastconn", "roundrobin", "random")


@dataclass(frozen=True)
class Load:
    """What is simulated. Times are in seconds, rates in calls a second."""

    replicas: int = 4
    capacity: int = 256
    """Connections of a replica."""
    rate: float = 4.0
    step: float = 1.0
    """The factor by which the rate rises at half time."""
    call_s: float = 180.0
    seconds: float = 7200.0
    policy: str = "leastconn"
    target: float = 1.0
    """Share of all connections above which a replica is added. 1 adds none."""
    delay_s: float = 60.0
    """Seconds from the decision to the first client."""
    seed: int = 1


@dataclass
class Result:
    """What the simulation found."""

    calls: int = 0
    refused: int = 0
    replicas: int = 0
    fullest: float = 0.0
    """The largest share of its connections that a replica used, after three mean lengths of a call."""


def choose(load: Load, open_calls: list[int], tried: set[int], number: int, rng: random.Random) -> int:
    """The replica to which the balancer sends a call. Those in `tried` have refused it."""
    left = [replica for replica in range(len(open_calls)) if replica not in tried]
    if load.policy == "leastconn":
        return min(left, key=lambda replica: (open_calls[replica], (replica - number) % len(open_calls)))
    return left[number % len(left)] if load.policy == "roundrobin" else rng.choice(left)


def simulate(load: Load) -> Result:
    """Run the simulation to its end."""
    rng, result = random.Random(load.seed), Result()
    open_calls, ends, now, ready_at = [0] * load.replicas, [], 0.0, None
    while True:
        rate = load.rate * (load.step if now > load.seconds / 2 else 1.0)
        now += rng.expovariate(rate)
        if now > load.seconds:
            result.replicas = len(open_calls)
            return result
        while ends and ends[0][0] <= now:
            open_calls[heapq.heappop(ends)[1]] -= 1
        if ready_at is not None and ready_at <= now:
            open_calls.append(0)
            ready_at = None
        if ready_at is None and sum(open_calls) > load.target * load.capacity * len(open_calls):
            ready_at = now + load.delay_s
        result.calls += 1
        replica = place(load, open_calls, result.calls, rng)
        if replica is None:
            result.refused += 1
            continue
        open_calls[replica] += 1
        heapq.heappush(ends, (now + rng.expovariate(1 / load.call_s), replica))
        if now > 3 * load.call_s:
            result.fullest = max(result.fullest, open_calls[replica] / load.capacity)


def place(load: Load, open_calls: list[int], number: int, rng: random.Random) -> int | None:
    """The replica that takes a call, or None if all that were asked are full."""
    tried: set[int] = set()
    for _ in range(min(1 + RETRIES, len(open_calls))):
        replica = choose(load, open_calls, tried, number, rng)
        if open_calls[replica] < load.capacity:
            return replica
        tried.add(replica)
    return None


def main() -> None:
    """Print a line for each policy."""
    parser = argparse.ArgumentParser(description="Simulate calls over replicas.")
    parser.add_argument("--replicas", type=int, default=Load.replicas)
    parser.add_argument("--capacity", type=int, default=Load.capacity, help="connections of a replica")
    parser.add_argument("--rate", type=float, default=Load.rate, help="calls a second")
    parser.add_argument("--step", type=float, default=Load.step, help="factor of the rate at half time")
    parser.add_argument("--call-s", type=float, default=Load.call_s, help="mean length of a call")
    parser.add_argument("--target", type=float, default=Load.target, help="load that adds a replica")
    parser.add_argument("--delay-s", type=float, default=Load.delay_s, help="until it takes clients")
    parser.add_argument("--seed", type=int, default=Load.seed)
    options = vars(parser.parse_args())
    if min(options["replicas"], options["capacity"], options["rate"], options["call_s"]) <= 0:
        parser.error("--replicas, --capacity, --rate and --call-s are larger than 0")
    for policy in POLICIES:
        result = simulate(Load(**options, policy=policy))
        print(
            f"{policy}: {result.refused} of {result.calls} calls refused, fullest replica "
            f"{result.fullest:.0%}, {result.replicas} replicas at the end"
        )


if __name__ == "__main__":
    main()
