"""The simulation agrees with Erlang's formula and with simple expectations."""

import math
from dataclasses import replace

import pytest
from simulate import Load, simulate


def erlang_b(offered, servers):
    """The share of calls that a group of servers refuses."""
    blocked = 1.0
    for number in range(1, servers + 1):
        blocked = offered * blocked / (number + offered * blocked)
    return blocked


def test_one_replica_refuses_what_erlangs_formula_says():
    load = Load(replicas=1, capacity=20, rate=0.1, call_s=180.0, seconds=400_000)
    result = simulate(load)
    expected = erlang_b(18.0, 20)
    # Refusals come in bursts, so the error is larger than that of independent draws.
    assert result.refused / result.calls == pytest.approx(
        expected, abs=6 * math.sqrt(expected / result.calls)
    )


def test_same_seed_gives_the_same_and_another_one_does_not():
    load = Load(replicas=3, capacity=10, rate=0.15)
    assert simulate(load) == simulate(load)
    assert simulate(load) != simulate(replace(load, seed=2))


def test_leastconn_fills_replicas_more_evenly_than_chance():
    load = Load(replicas=4, rate=4.0)
    fullest = {p: simulate(replace(load, policy=p)).fullest for p in ("leastconn", "random")}
    assert fullest["leastconn"] < fullest["random"]


def test_a_replica_that_comes_sooner_saves_calls():
    load = Load(replicas=2, rate=2.0, step=2.0, target=0.8)
    soon, late = (simulate(replace(load, delay_s=delay_s)) for delay_s in (20.0, 300.0))
    assert soon.refused < late.refused
    assert soon.replicas > 2
