import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.codec import make_codec
from lohp_jax.methods.hypernetwork import regression_loss, task_loss
from lohp_jax.networks.policy import Heads, PolicyNetwork
from lohp_jax.policy.config import HybridConfig
from lohp_jax.policy.kernels import Policy
from lohp_jax.tasks import make_family
from lohp_jax.tasks.support import canonical_order
from lohp_jax.types import Example, TaskFamily

CODEC = make_codec(
    {"w": jnp.zeros(3)},
    channels=2,
    reference={"w": jnp.array([1.0, 2.0, 3.0])},
    scale={"w": jnp.float32(0.5)},
)
REAL = np.flatnonzero(CODEC.mask)
CONFIG = HybridConfig(condition_dropout=0.0, start_std=0.1, end_std=0.3, correlation=0.5)
KEY = jax.random.key(0)
GAIN = 0.3
NETWORK = PolicyNetwork(
    init=lambda key, context: None,
    encode=lambda params, context, keep: keep * context["scale"],
    heads=lambda params, embedding, teacher, step, state: Heads(
        params[step] + embedding * state, *(jnp.full_like(state, 9.0) for _ in range(3))
    ),
    log_coefficient=None,
)
FAMILY = TaskFamily(
    sample=None,
    init=None,
    loss=lambda params, data, key: jnp.sum((params["w"] - data) ** 2),
    evaluate=None,
    context=None,
)
num_steps_cases = pytest.mark.parametrize("num_steps", [1, 3])


def case(num_steps):
    """Policy, drifts `[N, length, channels]` that are its parameters, and an example."""
    rng = np.random.default_rng(num_steps)
    drifts = jnp.float32(rng.normal(size=(num_steps, *CODEC.mask.shape)))
    tokens = rng.normal(size=(4, *CODEC.mask.shape)).astype(np.float32)
    context, target = {"scale": jnp.float32(GAIN)}, jnp.float32(rng.normal(size=3))
    example = Example(tokens, jnp.zeros((), jnp.int32), context, target)
    return Policy(NETWORK, CODEC, CONFIG, num_steps), drifts, example


def slopes(num_steps):
    """d s_{m+1} / d s_m of the means."""
    tau = np.geomspace(0.1, 0.3, num_steps + 1)
    return 0.5 * tau[1:] / tau[:-1] + GAIN


def end_oracle(drifts):
    """`[D]` end of the mean roll-out, in float64."""
    state = np.zeros(len(REAL))
    for drift, slope in zip(drifts, slopes(len(drifts)), strict=True):
        state = slope * state + np.float64(drift).ravel()[REAL]
    return state


@num_steps_cases
def test_task_loss_is_the_inner_loss_of_the_generated_weights(num_steps):
    policy, drifts, example = case(num_steps)
    weights = 0.5 * end_oracle(drifts) + [1, 2, 3]
    loss, info = jax.jit(functools.partial(task_loss, policy, FAMILY))(drifts, example, KEY)
    np.testing.assert_allclose(loss, np.sum((weights - example.data) ** 2), rtol=1e-5)
    assert info == {}


@pytest.mark.slow
def test_task_loss_sees_labels_in_their_canonical_order():
    """As generation does: the policy sees the renamed labels, the task the weights named back."""
    family = make_family("digits_5way", shots=1)
    data = family.sample(KEY)
    context = family.context(data, KEY)
    ordered, rank = canonical_order(family, context)
    assert (rank != np.arange(5)).any()
    theta_0 = family.init(KEY)
    codec = make_codec(theta_0, channels=8, class_axes=family.class_axes)
    end = jnp.float32(np.random.default_rng(0).normal(size=codec.mask.shape) * codec.mask)
    network = NETWORK._replace(
        encode=lambda params, context, keep: context["y"],
        heads=lambda params, embedding, teacher, step, state: Heads(
            params * jnp.array_equal(embedding, ordered["y"]), *(state for _ in range(3))
        ),
    )
    policy = Policy(network, codec, dataclasses.replace(CONFIG, correlation=0.0), 1)
    example = Example(None, jnp.zeros((), jnp.int32), context, data)
    loss, _ = task_loss(policy, family, end, example, KEY)
    weights = codec.decode(end)
    named_back = jax.tree.map(lambda leaf: leaf[..., rank], weights)
    np.testing.assert_allclose(loss, family.loss(named_back, data, KEY), rtol=1e-6)
    assert abs(float(loss - family.loss(weights, data, KEY))) > 0.1


@num_steps_cases
def test_the_gradient_of_task_loss_flows_through_the_whole_roll_out(num_steps):
    """d loss / d drift_m = d loss / d s_N times the slopes of the steps after m."""
    policy, drifts, example = case(num_steps)
    grads, _ = jax.grad(functools.partial(task_loss, policy, FAMILY), has_aux=True)(
        drifts, example, KEY
    )
    at_end = 0.5 * 2 * (0.5 * end_oracle(drifts) + [1, 2, 3] - example.data)
    for m in range(num_steps):
        expected = at_end * np.prod(slopes(num_steps)[m + 1 :])
        np.testing.assert_allclose(grads[m].ravel()[REAL], expected, rtol=1e-4)


@num_steps_cases
def test_regression_loss_is_the_mean_square_distance_to_the_last_stored_state(num_steps):
    policy, drifts, example = case(num_steps)
    error = end_oracle(drifts) - np.float64(example.tokens[-1]).ravel()[REAL]
    loss, info = jax.jit(functools.partial(regression_loss, policy))(drifts, example, KEY)
    np.testing.assert_allclose(loss, np.mean(error**2), rtol=1e-5)
    assert info == {}


@pytest.fixture(params=["task_loss", "regression_loss"])
def loss_of(request):
    """`(policy, drifts, example, key) -> loss` of either loss."""
    if request.param == "task_loss":
        return lambda policy, *args: task_loss(policy, FAMILY, *args)[0]
    return lambda policy, *args: regression_loss(policy, *args)[0]


def test_nothing_is_sampled(loss_of):
    first, second = (loss_of(*case(2), jax.random.key(seed)) for seed in range(2))
    assert first == second


def test_the_context_is_dropped_now_and_then(loss_of):
    policy, drifts, example = case(2)
    policy = policy._replace(config=HybridConfig(condition_dropout=0.5))
    losses = jax.vmap(lambda key: loss_of(policy, drifts, example, key))(jax.random.split(KEY, 16))
    assert len(np.unique(np.float32(losses).round(4))) == 2
