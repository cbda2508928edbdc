"""The loss of one problem: reconstruction and task, stateless or over a roll-out.

At one noise level the loss is α reconstruction + (1 - α) task. The reconstruction is the mean squared
error of the prediction. The task loss is the gap f(x_0) - f* over the gap of the family's start, or over
f*, which has no units, bent by log1p where it is positive so that far points do not rule. It is weighted
by α_t²: where z is all noise, x_0 is the mean of all solutions, and f there says nothing.

Stateless training hides the solution, or a point of the oracle in its place, in noise of a random level.
A roll-out starts from noise and follows DDIM on the denoiser's own x_0, which it is fed with one step
later; the gradient runs through `window` steps. It draws each roll-out to the one label, so that it is
for problems with one solution.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lohp_jax.diffusion import guidance as guiding
from lohp_jax.diffusion.config import DiffusionConfig
from lohp_jax.diffusion.generator import frame_of, make_observer
from lohp_jax.diffusion.oracle import Solved, draw_point
from lohp_jax.diffusion.sampler import ddim_rule
from lohp_jax.diffusion.schedule import alpha_sigma, from_x0, to_x0
from lohp_jax.networks.denoiser import make_network
from lohp_jax.types import ProblemFamily, PyTree

REACH = 20.0
"""Solutions further from the centre, in units of the frame, are not learned from: one would outweigh
thousands of others."""


def make_loss(
    family: ProblemFamily,
    config: DiffusionConfig,
    warm: PyTree | None = None,
    *,
    regression: bool = False,
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """Builds `(params, solved, key) -> (loss, metrics)` of one problem.

    Args:
      family: the problems.
      config: settings.
      warm: of a warm start; None without one.
      regression: whether to say x_0 from z = 0 instead, which is training a warm start.
    """
    network = make_network(config.network)
    weights = guiding.resolve_weights(config.guidance, None)

    def loss_fn(params, item, key):
        # all at once: every call of jax.random adds 0.4 s to the compilation
        uniform_key, normal_key, key = jax.random.split(key, 3)
        chance = jax.random.uniform(uniform_key, (4 + len(config.guidance.parts),))
        problem = family.sample(item.key, "train")
        centre, scale = frame_of(family, config, warm, problem)
        keep = _keep(config.guidance, chance[4:])
        see = make_observer(family, config, params["gates"], problem, (centre, scale), weights)
        target = (item.solution - centre) / scale
        counts = 1.0 - (jnp.max(jnp.abs(target)) > REACH)  # also where it is NaN, to be found
        target = jnp.clip(target, -REACH, REACH)
        noise = jax.random.normal(normal_key, (2, len(target)))

        def at(z, log_snr, previous, key, trust=1.0):
            condition = see(z, log_snr, previous, key, keep)
            prediction = network.apply(params["network"], z, log_snr, condition)
            wanted = from_x0(config.prediction, target, z, log_snr)
            x0 = to_x0(config.prediction, prediction, z, log_snr)
            value = family.objective(centre + scale * x0, problem)
            signal = 1.0 if regression else jax.nn.sigmoid(log_snr)
            metrics = {
                "reconstruction": jnp.mean((trust * (prediction - wanted)) ** 2),
                "task": signal * task_loss(config.gap_unit, value, item),
            }
            loss = config.alpha * metrics["reconstruction"]
            return loss + (1.0 - config.alpha) * metrics["task"], (x0, metrics)

        if regression:
            zero = jnp.zeros_like(target)
            loss, (_, metrics) = at(zero, jnp.float32(config.schedule.log_snr_min), zero, key)
        elif config.training == "rollout":
            loss, metrics = _rollout_loss(config, at, noise[0], key)
        else:
            iterates = jax.tree.map(lambda x: (x - centre[None]) / scale[None], item.iterates)
            point, certain = draw_point(config.oracle, target, iterates, chance[:3], noise[1])
            loss, metrics = _stateless_loss(config, at, point, certain, chance[3], noise[0], key)
        values = jax.tree.map(lambda value: counts * value, {"loss": loss, **metrics})
        return values["loss"], values

    return loss_fn


def _keep(config: guiding.GuidanceConfig, chance: jax.Array) -> dict[str, jax.Array]:
    """Part -> 0 to drop it or 1, from a uniform number for each."""
    rates = config.dropout * (len(config.parts) if len(config.dropout) == 1 else 1)
    kept = (chance >= jnp.array(rates)).astype(jnp.float32)
    return dict(zip(config.parts, kept, strict=True))


def task_loss(unit: str, value: jax.Array, item: Solved) -> jax.Array:
    """The gap in units of the start's, or of the optimum; its logarithm where it is positive."""
    size, least = jnp.abs(item.value), 1e-12
    if unit == "start":
        size, least = item.start_value - item.value, 1e-3 * size + least
    gap = (value - item.value) / jnp.maximum(size, least)
    return jnp.log1p(jnp.maximum(gap, 0.0)) + jnp.minimum(gap, 0.0)


def _stateless_loss(config, at, point, certain, time, noise, key):
    """Denoising at the level of a random time.

    Off the solution, ε and v would be wanted with an error of 1 / σ times that of z; it is taken off.
    """
    log_snr = config.schedule.log_snr(time)
    alpha, sigma = alpha_sigma(log_snr)
    z = alpha * point + sigma * noise
    damped = {"x0": 1.0, "eps": jnp.minimum(sigma / alpha, 1.0), "v": sigma}[config.prediction]
    loss, (_, metrics) = at(z, log_snr, jnp.zeros_like(z), key, jnp.where(certain, 1.0, damped))
    return loss, metrics


def _rollout_loss(config, at, start, key):
    """Mean loss over a roll-out on the levels of a sampler, from noise."""
    count = config.rollout_steps
    levels = config.schedule.log_snr(jnp.linspace(1.0, 0.0, count + 1)[:-1])
    rows, advance = ddim_rule(jnp.append(levels, jnp.inf), jnp.zeros(()))
    cuts = jnp.arange(count) % config.window == 0

    def body(state, inputs):
        row, cut, key = inputs
        z, previous = (jnp.where(cut, jax.lax.stop_gradient(x), x) for x in state)
        loss, (x0, metrics) = at(z, row["level"], previous, key)
        return (advance(row, z, x0, (), 0.0)[0], x0), (loss, metrics)

    inputs = rows, cuts, jax.random.split(key, count)
    values = jax.lax.scan(body, (start, jnp.zeros_like(start)), inputs)[1]
    return jax.tree.map(jnp.mean, values)
