import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax.optimizers import (
    OPTIMIZERS,
    celo,
    celo2,
    celo_adam,
    hub,
    hub_trust,
    lgl2o,
    make_optimizer,
    pretrained,
    pretrained_optimizer,
    sam,
    save_theta,
    velo,
)

PARAMS = {"w": np.float32([1.0, -2.0]), "b": np.float32(0.5)}


def loss_fn(params):
    return jnp.sum(params["w"] ** 4) + (params["b"] - 1.0) ** 2


def run(optimizer, num_steps=3, **extra):
    """Weights after a few steps."""
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(num_steps):
        updates, state = optimizer.update(jax.grad(loss_fn)(params), state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize(
    "name, expected",
    [
        ("sgd", optax.sgd(0.5)),
        ("sgd:0.01", optax.sgd(0.01)),
        ("momentum:1e-2", optax.sgd(0.01, momentum=0.9)),
        ("adam", optax.adam(0.05)),
        ("adam:0.2", optax.adam(0.2)),
        ("adamw:0.2", optax.adamw(0.2)),
    ],
)
def test_a_name_stands_for_an_optimizer_of_optax(name, expected):
    chex.assert_trees_all_close(run(make_optimizer(name)), run(expected), rtol=1e-6)


def test_a_learning_rate_of_sam_is_that_of_its_descent():
    updates = run(
        make_optimizer("sam:0.01"), num_steps=1, grad_fn=lambda params, _: jax.grad(loss_fn)(params)
    )
    gradient = jax.tree.map(np.float64, jax.grad(loss_fn)(PARAMS))
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(gradient)))
    climbed = jax.tree.map(lambda p, g: p + 0.05 * g / norm, PARAMS, gradient)
    expected = jax.tree.map(lambda p, g: p - 0.01 * g, PARAMS, jax.grad(loss_fn)(climbed))
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)


EXTRA = {"value": 1.0, "value_fn": loss_fn, "grad_fn": lambda p, _: jax.grad(loss_fn)(p)}
FROM_FILES = {"velo", "celo", "celo_adam"}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - FROM_FILES))
def test_every_optimizer_takes_what_learned_ones_ask_for(name):
    assert loss_fn(run(make_optimizer(f"{name}:0.01", 3), **EXTRA)) < loss_fn(PARAMS)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("hub", hub(optax.adam(0.05), pretrained_optimizer("small", 3))),
        ("hub_trust:0.1", hub_trust(optax.adam(0.1), pretrained_optimizer("small", 3))),
        ("lgl2o:0.1", lgl2o(optax.adam(0.1), pretrained_optimizer("small", 3))),
        ("hub:0.1:adamw:0.2", hub(optax.adam(0.1), optax.adamw(0.2))),
        ("small", pretrained_optimizer("small", 3)),
        ("small:0.1", pretrained_optimizer("small", 3, learning_rate=0.1)),
        ("sam:adam:0.1", sam(optax.adam(0.1))),
        ("sam:adam", sam(optax.adam(0.05))),
        ("celo2:0.1", celo2(pretrained("small"), 0.1, orthogonalise=False)),
    ],
)
def test_a_name_stands_for_an_optimizer_of_ours(name, expected):
    actual = run(make_optimizer(name, 3), **EXTRA)
    chex.assert_trees_all_close(actual, run(expected, **EXTRA), rtol=1e-5, atol=1e-7)


def assert_same(actual, expected):
    """The same start and the same program, which costs less than to run it."""
    params, extra = {"w": np.ones((2, 2), np.float32)}, {"value": np.float32(1.0)}
    chex.assert_trees_all_equal(actual.init(params), expected.init(params))
    programs = [
        str(jax.make_jaxpr(lambda o=o: o.update(params, o.init(params), params, **extra))())
        for o in (actual, expected)
    ]
    assert programs[0] == programs[1]


@pytest.mark.parametrize("rule", ["velo", "celo", "celo_adam"])
def test_weights_come_from_a_file(tmp_path, random_theta, narrow, rule):
    theta, factory = random_theta(rule), {"velo": velo, "celo": celo, "celo_adam": celo_adam}[rule]
    file = tmp_path / "theta:1"  # a colon is as good a letter as any
    save_theta(file, theta)
    assert_same(make_optimizer(f"{rule}:{file}", 7), factory(theta, 7))
    assert_same(
        make_optimizer(f"hub:0.1:{rule}:{file}", 7), hub(optax.adam(0.1), factory(theta, 7))
    )
    with pytest.raises(ValueError, match=rf"expected weights of celo2 in .*got some of {rule}"):
        make_optimizer(f"celo2:{file}", 7)


@pytest.mark.parametrize("suffix, rate", [("", 0.05), (":0.2", 0.2)])
def test_celo2_takes_a_file_and_a_rate(tmp_path, random_theta, narrow, suffix, rate):
    save_theta(tmp_path / "theta:1", random_theta("celo2"))
    optimizer = make_optimizer(f"celo2:{tmp_path / 'theta:1'}{suffix}")
    assert_same(optimizer, celo2(random_theta("celo2"), rate))
    with pytest.raises(AssertionError):
        assert_same(optimizer, celo2(random_theta("celo2"), 0.1))


@pytest.mark.parametrize(
    "name, error, message",
    [
        ("hub", ValueError, "'hub' plans for a number of steps, got none; give num_steps"),
        ("sam:small", ValueError, "'small' plans for a number of steps"),
        ("velo", ValueError, "expected a file of weights, got 'velo'; write 'velo:FILE'"),
        ("celo:", ValueError, "expected a file of weights, got 'celo:'; write 'celo:FILE'"),
        ("velo:no.state", FileNotFoundError, "there is no file 'no.state' of weights for 'velo:no"),
        ("celo2:no.state", FileNotFoundError, "no file 'no.state'"),
        ("celo2:no.state:0.1", FileNotFoundError, "no file 'no.state'"),
        ("celo2:-1", ValueError, "positive learning rate .* got 'celo2:-1'"),
        ("hub:fast", ValueError, "positive learning rate .* got 'hub:fast'; write e.g. 'hub:0.05'"),
        ("hub:0.1:adma", ValueError, "got 'adma'; did you mean 'adam'"),
        ("sam:adma", ValueError, "got 'adma'; did you mean 'adam'"),
        ("sam:adam:-1", ValueError, "positive learning rate .* got 'adam:-1'"),
        ("sam:0", ValueError, "positive learning rate .* got 'sam:0'; write e.g. 'sam:0.5'"),
    ],
)
def test_a_name_without_sense(name, error, message):
    num_steps = 5 if name.startswith(("hub:", "velo")) else None
    with pytest.raises(error, match=f"make_optimizer: .*{message}"):
        make_optimizer(name, num_steps)


@pytest.mark.parametrize(
    "name, nearest", [("adma", "adam"), ("SGD", "sgd"), ("", ""), ("smal", "small")]
)
def test_an_unknown_name_is_answered_with_the_nearest(name, nearest):
    with pytest.raises(
        ValueError, match=f"make_optimizer: .*got '{name}'; did you mean '{nearest}"
    ):
        make_optimizer(name)


@pytest.mark.parametrize("rate", ["", "0", "-0.1", "nan", "inf", "fast", "0.1:0.2"])
def test_a_learning_rate_must_be_positive_and_finite(rate):
    message = f"positive learning rate after the colon, got 'adam:{rate}'; write e.g. 'adam:0.05'"
    with pytest.raises(ValueError, match=message):
        make_optimizer(f"adam:{rate}")
