"""From trained params to denoisers and generators: what is diffused, and what is seen of a problem."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from lohp_jax.diffusion import guidance as guiding
from lohp_jax.diffusion.config import DiffusionConfig
from lohp_jax.diffusion.denoiser import make_network
from lohp_jax.diffusion.sampler import Denoiser, sample
from lohp_jax.types import Generator, ProblemFamily, PyTree


def diffusion_generator(
    family: ProblemFamily, config: DiffusionConfig, params: PyTree
) -> Generator:
    """Wraps trained params as a `Generator` of points x `[n]`: the sampler's x_0, out of its frame.

    `guidance` is a mapping from parts to weights, as in `resolve_weights`; 0 or None leaves the
    denoiser as trained. `path` gives x_0 at every evaluation, as points.

    Args:
      family: the problems.
      config: of the training.
      params: `{"network", "gates", "warm"}`, of `train_diffusion`.
    """
    denoiser = make_denoiser(family, config)

    def path(params, context, key, *, temperature=1.0, num_steps=None, guidance=None):
        if guidance and not isinstance(guidance, Mapping):
            raise ValueError(
                "diffusion: guidance must be 0 or weights of parts, such as "
                f'{{"gradient": 0.5}}, got {guidance!r}.'
            )
        _, passed = sample(
            denoiser,
            params,
            context,
            key,
            schedule=config.schedule,
            sampler=config.sampler,
            num_steps=config.num_steps if num_steps is None else num_steps,
            guidance=guidance or None,
            temperature=temperature,
            return_path=True,
        )
        return to_points(family, config, params, context, passed.x0[0])

    def apply(params, context, key, **options):
        return path(params, context, key, **options)[-1]

    check = functools.partial(_check_problem, family, config)
    return Generator(apply, params, family.name, config, check, path)


def _check_problem(family: ProblemFamily, config: DiffusionConfig, problem: PyTree) -> None:
    """Refuses what the family does, and sizes that the network was not made for."""
    if family.check is not None:
        family.check(problem)
    if config.network.kind == "lasso":
        return
    trained = jax.eval_shape(lambda: family.sample(jax.random.key(0), "train"))
    for (path, one), leaf in zip(
        jax.tree.leaves_with_path(trained), jax.tree.leaves(problem), strict=True
    ):
        if one.shape != jnp.shape(leaf):
            raise ValueError(
                f"{family.name}: expected {jax.tree_util.keystr(path, simple=True)} of shape "
                f"{list(one.shape)}, as in training, got {list(jnp.shape(leaf))}; a denoiser of kind "
                f"{config.network.kind!r} serves one size, so train one for this size (of a LASSO, kind "
                "'lasso' serves all)."
            )


def make_denoiser(family: ProblemFamily, config: DiffusionConfig) -> Denoiser:
    """The denoiser of a family, for `sample` with params of `train_diffusion`."""
    network = make_network(config.network)

    def observe(params, context, weights):
        frame = frame_of(family, config, params["warm"], context)
        resolved = guiding.resolve_weights(config.guidance, weights)
        return make_observer(family, config, params["gates"], context, frame, resolved)

    return Denoiser(
        lambda params, *seen: network.apply(params["network"], *seen),
        lambda context: jax.eval_shape(family.start, context).shape[0],
        config.prediction,
        observe,
    )


def to_points(
    family: ProblemFamily, config: DiffusionConfig, params: PyTree, context: PyTree, y: jax.Array
) -> jax.Array:
    """`[K, n]` of `sample` -> `[K, n]` points x."""
    centre, scale = frame_of(family, config, params["warm"], context)
    return centre[None] + scale[None] * y


def frame_of(
    family: ProblemFamily, config: DiffusionConfig, warm: PyTree | None, context: PyTree
) -> tuple[jax.Array, jax.Array]:
    """Centre and scale of what is diffused: the family's own, or those of the regression's residual.

    Args:
      family: the problems.
      config: of the training.
      warm: `{"network", "gates", "scale"}` of a warm start; None without one.
      context: the problem.
    """
    centre, scale = family.frame(context)
    if warm is None:
        return centre, scale
    regression = regression_config(config)
    weights = guiding.resolve_weights(regression.guidance, None)
    see = make_observer(family, regression, {}, context, (centre, scale), weights)
    zero, level = jnp.zeros_like(centre), jnp.float32(config.schedule.log_snr_min)
    condition = see(zero, level, zero, jax.random.key(0))  # no probes: the key does nothing
    mean = make_network(config.network).apply(warm["network"], zero, level, condition)
    return centre + scale * mean, scale * warm["scale"]


def regression_config(config: DiffusionConfig) -> DiffusionConfig:
    """That of a warm start, which says x_0 from the parameters of the problem and z = 0."""
    return dataclasses.replace(
        config,
        prediction="x0",
        training="stateless",
        guidance=guiding.GuidanceConfig(dropout=(0.0,)),
        warm_start=False,
    )


def make_observer(
    family: ProblemFamily,
    config: DiffusionConfig,
    gates: Mapping[str, jax.Array],
    context: PyTree,
    frame: tuple[jax.Array, jax.Array],
    weights: Mapping[str, float | str],
) -> Callable[..., guiding.Condition]:
    """Builds `(z, log_snr, previous, key, keep=None) -> Condition` of one problem."""
    centre, scale = frame
    problem = make_network(config.network).prepare(context, centre, scale)
    features = jnp.zeros(0)
    if "parameters" in config.guidance.parts and family.features is not None:
        features = family.features(context)

    def see(z, log_snr, previous, key, keep=None):
        return guiding.observe(
            config.guidance,
            gates,
            lambda y: family.objective(centre + scale * y, context),
            features,
            problem,
            z,
            log_snr,
            previous if config.training == "rollout" else None,
            key,
            weights=weights,
            keep=keep,
        )

    return see
