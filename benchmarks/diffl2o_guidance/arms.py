"""Networks, ways to guide them, and what their samples are worth: the parts of `run.py`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.diffusion.config import DiffusionConfig
from lohp_jax.diffusion.generator import make_denoiser, make_observer, to_points
from lohp_jax.diffusion.guidance import (
    GRADIENTS,
    PARTS,
    GuidanceConfig,
    gradient_calls,
    resolve_weights,
)
from lohp_jax.diffusion.sampler import sample
from lohp_jax.diffusion.training import diffusion_params
from lohp_jax.problems import make_problem
from lohp_jax.solvers.newton import damped_newton
from lohp_jax.solvers.proximal import fista
from lohp_jax.solvers.refine import refine
from lohp_jax.solvers.trace import objective_of
from lohp_jax.types import ProblemFamily, PyTree

SETS = (
    "rastrigin_2",
    "ackley_2",
    "rastrigin_shifted_2",
    "lasso_fixed",
    "rastrigin_10",
    "ackley_10",
    "rastrigin_shifted_10",
)
"""Names of `make_problem`."""
LEAKS = tuple(f"{name}_leak" for name in SETS if name.startswith(("ackley", "rastrigin_shifted")))
"""Controls, whose parameters are the solution."""
DROPOUT = (0.25, 0.5, 0.5)
NETWORKS = {
    "alone": GuidanceConfig(("parameters",), (0.0,)),
    "fixed": GuidanceConfig(PARTS, DROPOUT),
    "wiener": GuidanceConfig(PARTS, DROPOUT, "wiener"),
    "learned": GuidanceConfig(PARTS, DROPOUT, "learned"),
}
"""What is trained: parameters alone, or all parts with dropout, in the three combinations."""
CONFIG = DiffusionConfig(pool=4096, batch_size=128, updates=1500, ema=0.995, alpha=0.9)
SAMPLERS = ("ddim", "ancestral", "dpmpp_2m")
"""Those that evaluate the denoiser once to a step."""
SAMPLER_STEPS = 10
SAMPLES = 16
CONTROL_SAMPLES = 48
"""Of the network that sees parameters alone: enough for as many starts as equal calls allow."""
NEWTON_STEPS, FISTA_STEPS = 20, 10
SUCCESS = 1e-2
QUICKLY = {"xla_backend_optimization_level": 1}
"""Compilation takes more time than anything else; this saves a third of it and nothing runs slower."""
WEIGHTS = (0.25, 0.5, 1.0)
"""Fixed ones, besides 0."""


class Arm(NamedTuple):
    """A network and what it is shown in sampling.

    Attributes:
      network: a key of `NETWORKS`.
      shown: part -> what multiplies its weight; 0 leaves it out.
      gated: whether Wiener weights take the place of fixed ones.
    """

    network: str
    shown: dict[str, float]
    gated: bool = False

    @property
    def adaptive(self) -> bool:
        """Whether weights follow the SNR."""
        return self.gated or self.network in ("wiener", "learned")

    @property
    def weights(self) -> dict[str, float | str]:
        """As in `resolve_weights`."""
        if self.network == "alone":
            return {}
        kind = "learned" if self.network == "learned" else "wiener"
        gradients = {part: self.shown[part] for part in GRADIENTS}
        if self.adaptive:
            gradients = {part: kind if factor else 0.0 for part, factor in gradients.items()}
        return {"parameters": self.shown["parameters"]} | gradients

    @property
    def sampling_calls(self) -> int:
        """Gradients of the objective for one sample."""
        return gradient_calls(NETWORKS[self.network], SAMPLER_STEPS, weights=self.weights)


def _shown(parameters: float, raw: float, smoothed: float) -> dict[str, float]:
    return dict(zip(PARTS, (parameters, raw, smoothed), strict=True))


def _arms() -> dict[str, Arm]:
    arms = {
        "parameters_alone": Arm("alone", {"parameters": 1.0}),
        "parameters": Arm("fixed", _shown(1, 0, 0)),
        **{f"raw_{w:g}": Arm("fixed", _shown(1, w, 0)) for w in WEIGHTS},
        **{f"smoothed_{w:g}": Arm("fixed", _shown(1, 0, w)) for w in WEIGHTS},
        **{f"both_{w:g}": Arm("fixed", _shown(1, w, w)) for w in WEIGHTS},
        "blind_raw": Arm("fixed", _shown(0, 1, 0)),
        "blind_smoothed": Arm("fixed", _shown(0, 0, 1)),
        "blind_both": Arm("fixed", _shown(0, 1, 1)),
    }
    for name, network in (("gated", "fixed"), ("wiener", "wiener"), ("learned", "learned")):
        gated = name == "gated"
        arms |= {
            f"{name}_raw": Arm(network, _shown(1, 1, 0), gated),
            f"{name}_smoothed": Arm(network, _shown(1, 0, 1), gated),
            f"{name}_both": Arm(network, _shown(1, 1, 1), gated),
        }
    return arms | {
        "blind_wiener": Arm("wiener", _shown(0, 1, 1)),
        "blind_learned": Arm("learned", _shown(0, 1, 1)),
    }


ARMS = _arms()
"""By name. `gated_*` puts Wiener weights on the network that was trained with fixed ones; `blind_*`
hides the parameters."""


def make_set(name: str) -> ProblemFamily:
    """The family of a set, or of a control."""
    if name in LEAKS:
        return make_problem(name.removesuffix("_leak"), features="shift")
    return make_problem(name)


def make_config(network: str, quick: bool) -> DiffusionConfig:
    """Settings of a training."""
    small = {"updates": 2, "pool": 16, "batch_size": 4} if quick else {}
    return dataclasses.replace(CONFIG, guidance=NETWORKS[network], **small)


def make_trainer(family: ProblemFamily, config: DiffusionConfig) -> Callable[[jax.Array], PyTree]:
    """`(key) -> params`, compiled once for all seeds."""
    train = functools.partial(diffusion_params, family, config)
    return jax.jit(train, compiler_options=QUICKLY)


class Problems(NamedTuple):
    """Held-out problems and the objective at their labels.

    Attributes:
      arrays: with a leading axis.
      optimum: `[N]`.
      unit: `[N]` of gaps: the optimum for LASSO, whose gaps are relative, else 1.
    """

    arrays: PyTree
    optimum: np.ndarray
    unit: np.ndarray


def draw_problems(family: ProblemFamily, count: int) -> Problems:
    """The same for all networks and seeds."""

    @jax.jit
    def draw(keys):
        arrays = jax.vmap(lambda key: family.sample(key, "held_out"))(keys)
        return arrays, jax.lax.map(
            lambda item: family.objective(family.solve(*item), item[0]), (arrays, keys)
        )

    arrays, optimum = jax.device_get(draw(jax.random.split(jax.random.key(2024), count)))
    return Problems(
        arrays, optimum, optimum if family.composite is not None else np.ones_like(optimum)
    )


def make_sampler(
    family: ProblemFamily, network: str, gated: bool, num_samples: int, sampler: str
) -> Callable[..., jax.Array]:
    """`(params, shown, problems, key) -> [N, num_samples, n]` points, compiled once for all `shown`.

    What is not shown is multiplied by 0 as dropout does in training, rather than left out.
    """
    config = dataclasses.replace(CONFIG, guidance=NETWORKS[network])
    wiener = dict.fromkeys(GRADIENTS, "wiener") if gated else None
    weights = resolve_weights(config.guidance, wiener)

    def observe(params, context, _):
        frame = family.frame(context)
        see = make_observer(family, config, params["gates"], context, frame, weights)
        return functools.partial(see, keep=params["shown"])

    denoiser = make_denoiser(family, config)._replace(observe=observe)

    def one(params, problem, key):
        options = {"schedule": config.schedule, "num_steps": SAMPLER_STEPS, "sampler": sampler}
        found = sample(denoiser, params, problem, key, num_samples=num_samples, **options)
        return to_points(family, config, params, problem, found)

    def run(params, shown, problems, key):
        count = len(jax.tree.leaves(problems)[0])
        keys = jax.random.split(key, count)
        return jax.vmap(one, (None, 0, 0))(params | {"shown": shown}, problems, keys)

    return jax.jit(run, compiler_options=QUICKLY)


def make_refiner(family: ProblemFamily, num_steps: int) -> Callable[..., jax.Array]:
    """`(problems, points [N, K, n]) -> [2, N, K]`, objectives before and after refinement."""

    def one(problem, points):
        if family.composite is not None:
            solver = functools.partial(fista, family, problem, restart=True)
        else:
            solver = functools.partial(damped_newton, family, problem)
        objective = objective_of(family, problem)
        raw = jax.vmap(objective)(points)
        return jnp.stack([raw, refine(objective, points, solver, num_steps).values])

    return jax.jit(jax.vmap(one, out_axes=1), compiler_options=QUICKLY)


def refine_steps(family: ProblemFamily) -> int:
    """Steps of the refinement."""
    return FISTA_STEPS if family.composite is not None else NEWTON_STEPS


def refine_calls(family: ProblemFamily, problems: Problems) -> int:
    """Gradients that the refinement of one sample takes."""
    if family.composite is not None:
        return FISTA_STEPS
    one = jax.tree.map(lambda leaf: leaf[0], problems.arrays)
    return NEWTON_STEPS * (1 + jax.eval_shape(family.start, one).size)


def score(gaps: np.ndarray, num_starts: int) -> dict[str, Any]:
    """Expected gap and success of the best of some of the samples, without replacement.

    Args:
      gaps: `[N, M]`.
      num_starts: K <= M.

    Returns: means over the even and the odd problems, so that what is chosen on one half can be
      measured on the other, and the median over all of them.
    """
    count = gaps.shape[1]
    ordered = np.sort(np.nan_to_num(gaps, nan=np.inf, posinf=np.inf), axis=1)
    # the chance that sample i, in order, is the best of K: C(M - i - 1, K - 1) / C(M, K)
    chance = np.zeros(count)
    chance[0] = num_starts / count
    for i in range(1, count - num_starts + 1):
        chance[i] = chance[i - 1] * (count - i - num_starts + 1) / (count - i)
    used = chance > 0
    expected = ordered[:, used] @ chance[used]
    wins = (ordered[:, used] < SUCCESS) @ chance[used]

    def halves(values):
        return [_number(values[0::2].mean()), _number(values[1::2].mean())]

    return {
        "gap": halves(expected),
        "success": halves(wins),
        "gap_median": _number(np.median(expected)),
    }


def _number(value: float) -> float | None:
    """Four significant digits, None for what is not finite."""
    return float(f"{value:.4g}") if np.isfinite(value) else None
