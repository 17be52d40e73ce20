"""Laws of mixtures of experts, run over every router in MEMBERS; each is seen to fail on a mutant.

The laws: causality, batch independence, padding, symmetry, conservation, auxiliary losses, one
expert = dense, equality of the forms, gradients.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import effjax.ops.mixture as family
from effjax.ops.feedforward.gelu import gelu_experts, gelu_feedforward
from effjax.ops.mixture import switch
from effjax.ops.mixture.naive import naive_switch

B, T, D, F, E = 3, 7, 5, 6, 4
SLOTS = 2  # a capacity factor of 1: some tokens are dropped, some slots stay empty


@dataclass(frozen=True)
class Member:
    """A router in its forms; `train` returns the output, the routing and the statistics."""

    train: Callable[..., tuple]
    evaluate: Callable[..., jax.Array]
    naive: Callable[..., jax.Array]
    losses: dict[str, Callable[..., jax.Array]]
    numpy_losses: Callable[..., dict[str, float]]
    statistics: Callable[..., Any]
    choices: int = 1


def switch_forms(route=switch.route, combine=switch.combine, dropless=switch.dropless):
    """The two forms of a Switch layer, of which a mutant changes one function."""

    @functools.partial(jax.jit, static_argnames="slots")
    def train(params, x, live, slots=SLOTS):
        experts = params["router"].shape[1]
        logits = switch.router_logits(x, params["router"], live)
        routing = route(logits, live, slots)
        y = gelu_experts(switch.dispatch(x, routing, experts, slots), params["up"], params["down"])
        return combine(y, routing), routing, switch.router_statistics(routing, live)

    @jax.jit
    def evaluate(params, x, live):
        def one(e, rows):
            return gelu_feedforward(rows, params["up"][e], params["down"][e])

        logits = switch.router_logits(x, params["router"], live)
        routing = switch.route(logits, live, x.shape[1])
        experts = params["router"].shape[1]
        return dropless(x, routing.expert, routing.gate, one, experts, 4, live=live)

    return {"train": train, "evaluate": evaluate}


@functools.partial(jax.jit, static_argnames="slots")
def switch_naive(params, x, live, slots=SLOTS):
    def one(e, rows):
        return jax.nn.gelu(rows @ params["up"][e]) @ params["down"][e]

    return naive_switch(x, x @ params["router"], live, one, slots)


def switch_numpy_losses(logits, live):
    """Both losses of one batch in float64, from the definitions."""
    h = np.asarray(logits, np.float64)[np.asarray(live)]
    p = np.exp(h - h.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    f = np.bincount(h.argmax(-1), minlength=h.shape[-1]) / len(h)
    z = np.log(np.exp(h).sum(-1))
    return {"balance": h.shape[-1] * f @ p.mean(0), "z": (z**2).mean()}


@jax.jit
def switch_statistics(logits, live):
    return switch.router_statistics(switch.route(logits, live, SLOTS), live)


MEMBERS = {
    "switch": Member(
        **switch_forms(),
        naive=switch_naive,
        losses={"balance": switch.balance_loss, "z": switch.z_loss},
        numpy_losses=switch_numpy_losses,
        statistics=switch_statistics,
    ),
}


def draw(experts=E, seed=0):
    """Parameters, activations and a mask with padding at both ends and inside."""
    rng = np.random.default_rng(seed)
    shapes = {"router": (D, experts), "up": (experts, D, F), "down": (experts, F, D)}
    params = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
    live = np.ones((B, T), bool)
    live[0, 3], live[1, :2], live[2, -1] = False, False, False
    return params, jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32), jnp.asarray(live)


def close(got, want, rtol=1e-6, message=""):
    """Largest difference as a share of the largest magnitude."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.isfinite(got).all(), message
    scale = max(1e-6, np.abs(want).max())
    assert np.abs(got - want).max() <= rtol * scale, (message, np.abs(got - want).max() / scale)


def causality(member):
    params, x, live = draw()
    y, routing, _ = member.train(params, x, live)
    assert y.std() > 1e-3
    assert (np.asarray(live) > np.asarray(routing.kept)).any(), "nothing dropped: vacuous"
    noise = 10 * np.random.default_rng(1).normal(size=(3, *x.shape))
    free = member.evaluate(params, x, live)
    for t in range(T):
        for other in noise:
            changed = jnp.asarray(np.where((np.arange(T) <= t)[:, None], x, other), jnp.float32)
            now = member.train(params, changed, live)[0]
            assert (now == y)[:, : t + 1].all(), f"position {t} saw what comes later"
            close(member.evaluate(params, changed, live)[:, : t + 1], free[:, : t + 1])


def batch_independence(member):
    params, x, live = draw()
    together = member.train(params, x, live)[0], member.evaluate(params, x, live)
    for row in range(B):
        alone = (
            member.train(params, x[row : row + 1], live[row : row + 1])[0],
            member.evaluate(params, x[row : row + 1], live[row : row + 1]),
        )
        for one, all_ in zip(alone, together, strict=True):
            close(one[0], all_[row], message=f"row {row}")


def padding(member):
    """Five tokens give the same wherever two pads stand, whatever those hold; pads get 0."""
    params, x, _ = draw(seed=1)
    places = np.array([[0, 1, 2, 3, 4], [2, 3, 4, 5, 6], [0, 1, 3, 5, 6]])
    live = np.zeros((B, T), bool)
    np.put_along_axis(live, places, True, axis=1)
    slope = jax.jit(jax.grad(lambda *a: member.train(*a)[0].sum()))
    for fill in (3.0, np.nan):
        rows = np.full((B, T, D), fill, np.float32)
        np.put_along_axis(rows, places[..., None], np.asarray(x[:1, :5]), axis=1)
        arguments = params, jnp.asarray(rows), jnp.asarray(live)
        for y in (member.train(*arguments)[0], member.evaluate(*arguments)):
            seen = np.take_along_axis(np.asarray(y), places[..., None], axis=1)
            assert seen.std() > 1e-3
            close(seen, np.broadcast_to(seen[:1], seen.shape))
            assert (y[~live] == 0).all()
        for name, part in slope(*arguments).items():
            assert jnp.isfinite(part).all(), f"padding reached the gradient of {name}"


def symmetry(member):
    params, x, live = draw()
    order = jnp.array([2, 0, 3, 1])
    renamed = {
        "router": params["router"][:, order],
        "up": params["up"][order],
        "down": params["down"][order],
    }
    close(member.train(renamed, x, live)[0], member.train(params, x, live)[0])
    close(member.evaluate(renamed, x, live), member.evaluate(params, x, live))


def conservation(member):
    """No token is lost, doubled or over capacity; a dropped one gets exactly nothing."""
    params, x, live = draw()
    y, routing, statistics = member.train(params, x, live)
    kept, expert, slot = (np.asarray(a) for a in (routing.kept, routing.expert, routing.slot))
    asked = [np.bincount(expert[b][np.asarray(live)[b]], minlength=E) for b in range(B)]
    for b in range(B):
        taken = list(zip(expert[b][kept[b]], slot[b][kept[b]], strict=True))
        assert len(set(taken)) == len(taken), "two tokens in one slot"
        assert all(0 <= s < SLOTS for _, s in taken)
        served = np.bincount(expert[b][kept[b]], minlength=E)
        assert (served == np.minimum(asked[b], SLOTS)).all()
        assert served.sum() == member.choices * statistics.tokens[b] - statistics.dropped[b]
    assert (np.asarray(statistics.assigned) == asked).all()
    assert (y[~routing.kept] == 0).all()
    gates = np.where(kept, np.asarray(routing.probabilities.max(-1)), 0)
    slots = switch.dispatch(x, routing, E, SLOTS)
    close(switch.combine(slots, routing), gates[..., None] * np.asarray(x))
    assert (np.abs(slots).sum(-1) > 0).sum() == kept.sum(), "an empty slot is not empty"


def auxiliary_closed_forms(member):
    """Balance is 1 for a uniform router, grows along P = f, and is E when one expert has all."""
    uniform = member.statistics(jnp.zeros((8, T, E)), jnp.ones((8, T), bool))
    whole = jax.tree.map(lambda s: s.sum(0), uniform)
    close(member.losses["balance"](whole), 1)
    close(member.losses["z"](whole), np.log(E) ** 2)
    f = jnp.array([[s] + [(1 - s) / (E - 1)] * (E - 1) for s in (0.25, 0.4, 0.7, 1.0)])
    sums = f * whole.tokens
    along = whole._replace(tokens=sums.sum(1), assigned=sums, probability=sums)
    values = member.losses["balance"](along)
    assert (jnp.diff(values) > 0).all()
    close(values[jnp.array([0, 3])], [1, E])


def auxiliary_losses_add(member):
    """The losses of a batch in float64, for any cut into parts and over eight devices."""
    logits = 2 * jax.random.normal(jax.random.key(2), (8, T, E)) + jnp.arange(E)[None, None]
    live = jax.random.uniform(jax.random.key(3), (8, T)) < 0.8
    live = live.at[5].set(False)  # a part without a single token
    want = member.numpy_losses(logits, live)
    mesh = NamedSharding(Mesh(np.array(jax.devices()[:8]), ("data",)), PartitionSpec("data"))
    spread = member.statistics(*jax.device_put((logits, live), mesh))
    rows = jax.tree.map(np.asarray, member.statistics(logits, live))
    for name in member.losses:
        close(total_loss(member, name, spread), want[name], message=f"{name} on a mesh")
        for cut in ([0, 8], [0, 1, 8], [0, 3, 4, 6, 8]):
            parts = jax.tree.map(lambda s, cut=cut: jnp.asarray(np.add.reduceat(s, cut[:-1])), rows)
            total = jax.tree.map(lambda s: s.sum(0), parts)
            shares = member.losses[name](parts, total)
            close(shares.sum(), want[name], message=f"{name} cut at {cut}")
            close(total_loss(member, name, parts), want[name], message=f"{name} cut at {cut}")

    def in_parts(h):
        return member.losses["balance"](member.statistics(h, live), total).sum()

    def at_once(h):
        return total_loss(member, "balance", member.statistics(h, live))

    slopes = [jax.jit(jax.grad(form))(logits) for form in (in_parts, at_once)]
    assert slopes[0].std() > 1e-5
    close(*slopes, message="parts have other gradients than the whole")


def total_loss(member, name, statistics):
    return member.losses[name](jax.tree.map(lambda s: s.sum(0), statistics))


def one_expert_is_dense(member):
    params, x, live = draw(experts=1)
    dense = gelu_feedforward(x, params["up"][0], params["down"][0])
    want = jnp.where(live[..., None], dense, 0)
    close(member.train(params, x, live, slots=T)[0], want)
    close(member.evaluate(params, x, live), want)


def forms_agree(member):
    """Both forms equal the naive one in float64: with few slots, and without a drop."""
    params, x, live = draw()
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), (params, x))
        few, all_ = member.naive(*wide, live), member.naive(*wide, live, slots=T)
        few, all_ = np.asarray(few), np.asarray(all_)
    assert np.abs(few - all_).max() > 1e-3, "nothing dropped: vacuous"
    close(member.train(params, x, live)[0], few, rtol=2e-6)
    close(member.train(params, x, live, slots=T)[0], all_, rtol=2e-6)
    close(member.evaluate(params, x, live), all_, rtol=2e-6)


def gradients(member):
    """Of every parameter and the input, by name, in both forms."""
    params, x, live = draw()
    weights = jnp.asarray(np.linspace(-1, 1, x.size).reshape(x.shape), jnp.float32)

    def slope(form, arguments, weights):
        loss = lambda params, x: (form(params, x, live) * weights).sum()  # noqa: E731
        params, x = jax.jit(jax.grad(loss, (0, 1)))(*arguments)
        return {**params, "x": x}

    forms = {
        "train": (lambda *a: member.train(*a)[0], member.naive),
        "evaluate": (member.evaluate, functools.partial(member.naive, slots=T)),
    }
    for form, (fast, naive) in forms.items():
        with jax.enable_x64(True):
            wide = jax.tree.map(
                lambda a: jnp.asarray(np.asarray(a), jnp.float64), (params, x, weights)
            )
            want = {k: np.asarray(v) for k, v in slope(naive, wide[:2], wide[2]).items()}
        for name, got in slope(fast, (params, x), weights).items():
            assert np.abs(want[name]).max() > 1e-3
            close(got, want[name], rtol=1e-5, message=f"{form}: {name}")


LAWS = {
    law.__name__: law
    for law in (
        causality,
        batch_independence,
        padding,
        symmetry,
        conservation,
        auxiliary_closed_forms,
        auxiliary_losses_add,
        one_expert_is_dense,
        forms_agree,
        gradients,
    )
}


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("law", LAWS)
def test_law(law, name):
    LAWS[law](MEMBERS[name])


def with_slots(count):
    """Routing whose slots another rule hands out: a mutant changes `count` alone."""

    def route(logits, live, capacity):
        routing = switch.route(logits, live, capacity)
        slot = count(routing, live)
        return routing._replace(slot=slot, kept=live & (slot < capacity))

    return route


def by_gate(routing, live):
    """The surest token first (batch-prioritised routing)."""
    rivals = (routing.expert[:, None] == routing.expert[..., None]) & live[:, None]
    return (rivals & (routing.gate[:, None] > routing.gate[..., None])).sum(-1)


def over_the_batch(routing, live):
    """One set of slots for the whole batch."""
    chosen = jax.nn.one_hot(routing.expert, E, dtype=jnp.int32) * live[..., None]
    running = jnp.cumsum(chosen.reshape(-1, E), 0).reshape(chosen.shape)
    return (running * chosen).sum(-1) - 1


def padding_counts(routing, live):
    chosen = jax.nn.one_hot(routing.expert, E, dtype=jnp.int32)
    return (jnp.cumsum(chosen, 1) * chosen).sum(-1) - 1


def overflow_overwrites(routing, live):
    return jnp.minimum(routing.slot, SLOTS - 1)


def next_expert(y, routing):
    return switch.combine(jnp.roll(y, 1, axis=1) if y.shape[1] > 1 else y, routing)


def first_expert(y, routing):
    return switch.combine(y.at[:, 0].multiply(2), routing)


def constant_gate(y, routing):
    return switch.combine(y, routing._replace(gate=jax.lax.stop_gradient(routing.gate)))


def sigmoid_gate(logits, live, capacity):
    routing = switch.route(logits, live, capacity)
    return routing._replace(gate=jax.nn.sigmoid(logits.max(-1)))


def mean_of_parts(statistics, whole=None):
    """Each part's own loss, averaged."""
    own = switch.balance_loss(statistics)
    return own if whole is None else own / own.size


def without_the_number_of_experts(statistics, whole=None):
    return switch.balance_loss(statistics, whole) / E


MUTANTS = {
    "causality": switch_forms(route=with_slots(by_gate)),
    "batch_independence": switch_forms(route=with_slots(over_the_batch)),
    "padding": switch_forms(route=with_slots(padding_counts)),
    "symmetry": switch_forms(combine=first_expert),
    "conservation": switch_forms(route=with_slots(overflow_overwrites)),
    "auxiliary_closed_forms": {"losses": {"balance": without_the_number_of_experts}},
    "auxiliary_losses_add": {"losses": {"balance": mean_of_parts}},
    "one_expert_is_dense": switch_forms(route=sigmoid_gate),
    "forms_agree": switch_forms(combine=next_expert),
    "gradients": switch_forms(combine=constant_gate),
}


@pytest.mark.parametrize("law", LAWS)
def test_law_catches_its_mutant(law):
    with pytest.raises(AssertionError):
        LAWS[law](replace(MEMBERS["switch"], **MUTANTS[law]))


def test_every_router_is_a_member():
    """A file of the family that defines `route` is a router."""
    names = [m.name for m in pkgutil.iter_modules(family.__path__)]
    modules = {n: importlib.import_module(f"{family.__name__}.{n}") for n in names}
    assert {n for n, m in modules.items() if hasattr(m, "route")} == set(MEMBERS)
