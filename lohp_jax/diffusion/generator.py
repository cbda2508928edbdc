"""From trained params to denoisers and generators: what is diffused, and what is seen of a problem."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.diffusion import guidance as guiding
from lohp_jax.diffusion.config import DiffusionConfig
from lohp_jax.diffusion.sampler import Denoiser, sample
from lohp_jax.networks.denoiser import Condition, make_network
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
    denoiser = _framed_denoiser(family, config)

    def path(params, context, key, *, temperature=1.0, num_steps=None, guidance=None):
        if guidance and not isinstance(guidance, Mapping):
            raise ValueError(
                "diffusion: guidance must be 0 or weights of parts, such as "
                f'{{"gradient": 0.5}}, got {guidance!r}.'
            )
        frame = frame_of(family, config, params["warm"], context)
        _, passed = sample(
            denoiser,
            params,
            (context, frame),
            key,
            schedule=config.schedule,
            sampler=config.sampler,
            num_steps=config.num_steps if num_steps is None else num_steps,
            guidance=guidance or None,
            temperature=temperature,
            return_path=True,
        )
        return _out_of(frame, passed.x0[0])

    def apply(params, context, key, **options):
        return path(params, context, key, **options)[-1]

    return Generator(apply, params, family.name, config, problem_check(family, config), path)


def problem_check(
    family: ProblemFamily, config: DiffusionConfig
) -> Callable[[PyTree], None] | None:
    """What refuses problems that the network of a config does not serve; see `check_as_trained`."""
    kind = config.network.kind
    if kind == "lasso":  # sees all of a problem
        return family.check
    return check_as_trained(
        family, f"a denoiser of kind {kind!r}", "of a LASSO, kind 'lasso' serves all"
    )


def check_as_trained(family: ProblemFamily, network: str, other: str) -> Callable[[PyTree], None]:
    """Builds the check of a network that knows the problems of training only.

    It refuses what the family does, arrays of other shapes, and other values of those arrays that all
    training problems share, such as a fixed A: the network has them in its weights.

    Args:
      family: of the training.
      network: what messages call the network.
      other: what serves more problems, for messages.
    """
    arrays = functools.cache(functools.partial(_training_arrays, family))

    def check(problem):
        if family.check is not None:
            family.check(problem)
        for name, trained in arrays().items():
            if name not in problem or np.shape(problem[name]) != trained.shape[1:]:
                got = list(np.shape(problem[name])) if name in problem else sorted(problem)
                raise ValueError(
                    f"{family.name}: expected {name} of shape {list(trained.shape[1:])}, as in "
                    f"training, got {got}; {network} serves one size, so train one for this size "
                    f"({other})."
                )
            shared = (trained == trained[:1]).all()
            if shared and not np.allclose(trained[0], problem[name]):
                raise ValueError(
                    f"{family.name}: expected the {name} that all training problems share, got "
                    f"another; {network} does not see it, so train one for it ({other})."
                )

    return check


def _training_arrays(family: ProblemFamily) -> dict[str, np.ndarray]:
    """The arrays of a few training problems, with a leading axis."""
    with jax.ensure_compile_time_eval():
        keys = jax.random.split(jax.random.key(0), 4)
        return jax.device_get(jax.jit(jax.vmap(lambda key: family.sample(key, "train")))(keys))


def make_denoiser(family: ProblemFamily, config: DiffusionConfig) -> Denoiser:
    """The denoiser of a family, for `sample` with params of `train_diffusion` and problems."""
    framed = _framed_denoiser(family, config)

    def observe(params, problem, weights):
        frame = frame_of(family, config, params["warm"], problem)
        return framed.observe(params, (problem, frame), weights)

    return framed._replace(size=lambda problem: framed.size((problem, None)), observe=observe)


def _framed_denoiser(family: ProblemFamily, config: DiffusionConfig) -> Denoiser:
    """As `make_denoiser`, for contexts `(problem, frame)`, frames being those of `frame_of`."""
    network = make_network(config.network)

    def observe(params, context, weights):
        problem, frame = context
        resolved = guiding.resolve_weights(config.guidance, weights)
        return make_observer(family, config, params["gates"], problem, frame, resolved)

    return Denoiser(
        lambda params, *seen: network.apply(params["network"], *seen),
        lambda context: jax.eval_shape(family.start, context[0]).shape[0],
        config.prediction,
        observe,
    )


def to_points(
    family: ProblemFamily, config: DiffusionConfig, params: PyTree, context: PyTree, y: jax.Array
) -> jax.Array:
    """`[K, n]` of `sample` -> `[K, n]` points x."""
    return _out_of(frame_of(family, config, params["warm"], context), y)


def _out_of(frame: tuple[jax.Array, jax.Array], y: jax.Array) -> jax.Array:
    centre, scale = frame
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
) -> Callable[..., Condition]:
    """Builds `(z, log_snr, previous, key, keep=None) -> Condition` of one problem."""
    centre, scale = frame
    prepared = make_network(config.network).prepare(context, centre, scale)
    features = jnp.zeros(0)
    if "parameters" in config.guidance.parts and family.features is not None:
        features = family.features(context)

    def see(z, log_snr, previous, key, keep=None):
        return guiding.observe(
            config.guidance,
            gates,
            lambda y: family.objective(centre + scale * y, context),
            features,
            prepared,
            z,
            log_snr,
            previous if config.training == "rollout" else None,
            key,
            weights=weights,
            keep=keep,
        )

    return see
