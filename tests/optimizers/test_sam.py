import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax.optimizers import sam
from lohp_jax.optimizers.hub import hub, hub_diagnostics
from lohp_jax.optimizers.velo import celo_adam

PARAMS = {"w": np.float32([1.0, -2.0, 0.3]), "b": np.float32(0.5)}


def loss_fn(params):
    return jnp.sum(params["w"] ** 4) / 4 + jnp.prod(params["w"]) * params["b"] + params["b"] ** 2


def grad_fn(params, i):
    del i
    return jax.grad(loss_fn)(params)


def gradient_oracle(params):
    """The gradient of `loss_fn` by hand, in float64."""
    w, b = params["w"], params["b"]
    others = np.array([w[1] * w[2], w[0] * w[2], w[0] * w[1]])
    return {"w": w**3 + b * others, "b": np.prod(w) + 2 * b}


def sam_oracle(params, *, learning_rate, momentum, rho, num_steps):
    """States of SAM around SGD with momentum, one gradient to climb and one to descend."""
    params = jax.tree.map(np.float64, params)
    trace = jax.tree.map(np.zeros_like, params)
    states = [params]
    for _ in range(num_steps):
        gradient = gradient_oracle(params)
        norm = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
        climbed = {k: params[k] + rho * gradient[k] / norm for k in params}
        descent = gradient_oracle(climbed)
        trace = {k: descent[k] + momentum * trace[k] for k in params}
        params = {k: params[k] - learning_rate * trace[k] for k in params}
        states.append(params)
    return states


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("momentum, rho", [(0.0, 0.05), (0.9, 0.5)])
def test_states_are_those_of_sam_by_hand(momentum, rho, transform):
    optimizer = sam(optax.sgd(0.03, momentum=momentum), rho)

    @transform
    def step(params, state):
        updates, state = optimizer.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    expected = sam_oracle(PARAMS, learning_rate=0.03, momentum=momentum, rho=rho, num_steps=5)
    params, state = PARAMS, optimizer.init(PARAMS)
    for oracle in expected[1:]:
        params, state = step(params, state)
        chex.assert_trees_all_close(params, oracle, rtol=1e-5, atol=1e-6)


def test_one_update_asks_for_one_more_gradient_at_distance_rho():
    visited = []

    def recording(params, i):
        visited.append((params, i))
        return grad_fn(params, i)

    optimizer = sam(optax.sgd(0.03), rho=0.5)
    gradient = grad_fn(PARAMS, 0)
    optimizer.update(gradient, optimizer.init(PARAMS), PARAMS, grad_fn=recording)
    ((climbed, i),) = visited
    assert i == 0
    move = jax.tree.map(lambda c, p: c - p, climbed, PARAMS)
    np.testing.assert_allclose(optax.tree.norm(move), 0.5, rtol=1e-5)
    along = optax.tree.vdot(move, gradient) / optax.tree.norm(gradient)
    np.testing.assert_allclose(along, 0.5, rtol=1e-5)


def test_a_zero_gradient_moves_nothing():
    params = jax.tree.map(np.zeros_like, PARAMS)
    optimizer = sam(optax.sgd(0.1))
    updates, _ = optimizer.update(
        grad_fn(params, 0), optimizer.init(params), params, grad_fn=grad_fn
    )
    chex.assert_trees_all_equal(optax.apply_updates(params, updates), params)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("size", [0.0, 1e-4, 1e3], ids=str)
def test_gradients_in_half_precision_are_normalised_in_single(dtype, size):
    """Their squares are beyond float16."""
    visited, params = [], {"w": jnp.zeros(4, dtype)}
    gradient = {"w": jnp.full(4, size, dtype)}
    optimizer = sam(optax.sgd(0.1), rho=0.5)
    updates, _ = optimizer.update(
        gradient,
        optimizer.init(params),
        params,
        grad_fn=lambda p, i: visited.append(p) or gradient,
    )
    ((climbed),) = visited
    np.testing.assert_allclose(climbed["w"], 0.25 if size else 0.0)  # of norm 0.5
    np.testing.assert_allclose(updates["w"], jnp.asarray(-0.1 * size, dtype), rtol=1e-2)
    assert updates["w"].dtype == climbed["w"].dtype == dtype


def test_its_rho_can_be_injected():
    injected = optax.inject_hyperparams(sam)(inner=optax.sgd(0.03), rho=0.5)
    step = jax.jit(
        lambda state: injected.update(grad_fn(PARAMS, 0), state, PARAMS, grad_fn=grad_fn)
    )
    plain = sam(optax.sgd(0.03), 0.5)
    expected, _ = plain.update(grad_fn(PARAMS, 0), plain.init(PARAMS), PARAMS, grad_fn=grad_fn)
    chex.assert_trees_all_close(step(injected.init(PARAMS))[0], expected, rtol=1e-5)


def test_vmap_equals_a_loop():
    optimizer = sam(optax.adam(0.1))

    def step(params):
        return optimizer.update(
            grad_fn(params, 0), optimizer.init(params), params, grad_fn=grad_fn
        )[0]

    batch = jax.tree.map(lambda leaf: np.stack([leaf, 2 * leaf, leaf - 1]), PARAMS)
    updates, step = jax.jit(jax.vmap(step))(batch), jax.jit(step)
    for n in range(3):
        one = jax.tree.map(lambda leaf, n=n: leaf[n], batch)
        actual = jax.tree.map(lambda leaf, n=n: leaf[n], updates)
        chex.assert_trees_all_close(actual, step(one), rtol=1e-5)


@pytest.mark.parametrize("rho", [0.0, -0.1, float("nan"), float("inf")])
def test_sam_rejects_a_rho_that_is_not_positive(rho):
    with pytest.raises(ValueError, match=f"sam: rho must be positive and finite, got {rho}"):
        sam(optax.sgd(0.1), rho)


def test_update_needs_a_gradient_function():
    optimizer = sam(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"sam: update needs grad_fn=\(params, i\) -> gradient"):
        optimizer.update(grad_fn(PARAMS, 0), optimizer.init(PARAMS), PARAMS)


# --- around and inside a learned optimizer


def test_a_learned_inner_optimizer_gets_the_loss_and_the_climbed_gradient():
    seen = []

    def spy(updates, state, params=None, *, value, grad_fn, **extra):
        seen.append((updates, params, value, sorted(extra)))
        return jax.tree.map(lambda u: -0.1 * u, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), spy)
    optimizer = sam(inner, rho=0.5)
    gradient = grad_fn(PARAMS, 0)
    state = optimizer.init(PARAMS)
    updates, _ = optimizer.update(
        gradient, state, PARAMS, grad_fn=grad_fn, value=2.5, value_fn=loss_fn
    )
    ((descent, params, value, extra),) = seen
    norm = optax.tree.norm(gradient)
    climbed = jax.tree.map(lambda p, g: p + 0.5 * g / norm, PARAMS, gradient)
    chex.assert_trees_all_close(descent, grad_fn(climbed, 0), rtol=1e-5)
    chex.assert_trees_all_equal(params, PARAMS)
    assert value == 2.5 and extra == ["value_fn"]
    chex.assert_trees_all_close(updates, jax.tree.map(lambda g: -0.1 * g, descent), rtol=1e-6)


@pytest.mark.parametrize("order", ["sam of hub", "hub of sam"])
def test_it_combines_with_hub_and_a_learned_rule(order, random_theta):
    """Celo-Adam, which compiles soonest; like the others it needs the loss."""
    learned = celo_adam(random_theta("celo_adam"), num_steps=10)
    if order == "sam of hub":
        optimizer = sam(hub(optax.sgd(0.05), learned, mode="trust"))
    else:
        optimizer = hub(sam(optax.sgd(0.05)), learned, mode="trust")

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(gradient, state, params, value=value, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(3):
        params, state = step(params, state)
    assert loss_fn(params) < loss_fn(PARAMS)
    assert hub_diagnostics(state)["guard_events"] == 0
