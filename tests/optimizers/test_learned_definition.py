"""VeLO and its relatives, restated in float64 from their description, one tensor at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.optimizers.celo2 import scale_by_celo2
from lohp_jax.optimizers.velo import celo, celo_adam, velo

DECAYS = (0.9, 0.99, 0.999)
GROUPS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
SHAPES = {
    "scalar": (),
    "vector": (5,),
    "matrix": (4, 3),
    "same_matrix": (4, 3),
    "column": (6, 1),
    "kernel": (2, 1, 4, 4),
}
ENOUGH = {
    "celo": ("vector", "matrix", "same_matrix"),  # VeLO but for what the recurrent network does
    "celo2_orthogonal": ("same_matrix", "column", "kernel"),  # Celo2 but for matrices
}
NUM_STEPS = 40
RULES = {"velo": velo, "celo": celo, "celo_adam": celo_adam}


def inv_root(x):
    return 1 / np.sqrt(np.maximum(x, 1e-9))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def phi(x):
    return 0.5 * np.clip(np.log(1e-8 + np.abs(10 * x)), -5, 5)


class Tensor:
    """Accumulators of one tensor and what follows from them."""

    def __init__(self, shape, rms_decay):
        self.shape, self.rms_decay = shape or (1,), rms_decay
        self.m = [np.zeros(self.shape) for _ in DECAYS]
        self.r = np.zeros(self.shape)
        if len(self.shape) >= 2:
            order = np.argsort(self.shape, kind="stable")
            self.d0, self.d1 = order[-1], order[-2]
            self.row = [np.zeros(np.delete(self.shape, self.d0)) for _ in DECAYS]
            self.col = [np.zeros(np.delete(self.shape, self.d1)) for _ in DECAYS]
        else:
            self.diag = [np.zeros(self.shape) for _ in DECAYS]

    def see(self, p):
        """mean_rms, rank, var_m and var_rms of the accumulators as they are."""
        q = 1 / np.sqrt(max(1e-9, np.mean(p**2)))
        rank = np.zeros(5)
        rank[sum(n > 1 for n in self.shape)] = 1
        means = [np.mean(m * q) for m in self.m]
        var_m = [np.mean((m * q - mean) ** 2) for m, mean in zip(self.m, means, strict=True)]
        var_rms = [np.mean((self.r * q - mean) ** 2) for mean in means]
        return [phi(np.mean(self.r * q))], rank, phi(np.array(var_m)), phi(np.array(var_rms))

    def update(self, g):
        e = g**2 + 1e-30
        self.r = self.rms_decay * self.r + (1 - self.rms_decay) * g**2
        for i, d in enumerate(DECAYS):
            self.m[i] = d * self.m[i] + (1 - d) * g
            if len(self.shape) >= 2:
                self.row[i] = d * self.row[i] + (1 - d) * e.mean(self.d0)
                self.col[i] = d * self.col[i] + (1 - d) * e.mean(self.d1)
            else:
                self.diag[i] = d * self.diag[i] + (1 - d) * e

    def channels(self, g, p, rms_floor):
        s = 1 / np.sqrt(self.r + rms_floor)
        if len(self.shape) >= 2:
            axis = self.d1 - 1 if self.d1 > self.d0 else self.d1
            rows = [np.expand_dims(x, self.d0) + 0 * p for x in self.row]
            cols = [np.expand_dims(x, self.d1) + 0 * p for x in self.col]
            big = [
                np.expand_dims(inv_root(x / (x.mean(axis, keepdims=True) + 1e-9)), self.d0)
                * np.expand_dims(inv_root(y), self.d1)
                for x, y in zip(self.row, self.col, strict=True)
            ]
            fac_g, fac_m = [g * f for f in big], [m * f for m, f in zip(self.m, big, strict=True)]
        else:
            rows = cols = self.diag
            fac_g = [g * inv_root(x + 1e-9) for x in self.diag]
            fac_m = [m / np.sqrt(x) for m, x in zip(self.m, self.diag, strict=True)]
        return [
            *([g], [np.clip(g, -0.1, 0.1)], [p], self.m, [self.r]),
            *([m * s for m in self.m], [s], fac_g, [g * s], rows, cols),
            *([1 / np.sqrt(x + 1e-8) for x in rows], [1 / np.sqrt(x + 1e-8) for x in cols], fac_m),
        ]


def network(groups, weights, axes, floor):
    """Outputs `[..., 3]` of the perceptron, entry by entry."""
    x = np.stack(
        [
            c / np.sqrt(floor + np.mean(c**2, axes, keepdims=True))
            for group in groups
            for c in group
        ],
        axis=-1,
    )
    first = np.concatenate([weights[f"w0__{k}"] for k in range(len(GROUPS))])
    h = np.maximum(x @ first + weights["b0"], 0)
    h = np.maximum(h @ weights["w1"] + weights["b1"], 0)
    return h @ weights["w2"] + weights["b2"]


class Losses:
    """The loss buffer."""

    def __init__(self, num_steps):
        half_lives = np.logspace(1, np.log10(num_steps), 10)
        self.d = np.exp(-1 / half_lives)
        self.mean, self.least, self.n = np.zeros(10), np.full(10, 999999999999.0), 0

    def see(self, loss):
        correction = 1 - self.d ** (self.n + 1)
        largest = loss if self.n == 0 else np.max(self.mean / correction)
        loss = min(2 * abs(largest), loss)
        self.mean = self.d * self.mean + (1 - self.d) * loss
        current = self.mean / correction
        self.least = np.minimum(self.least, current)
        self.n += 1
        if self.n <= 2:
            return np.zeros(9)
        above = np.maximum(1e-8, current[1:] - self.least[:-1])
        return np.clip((current[:-1] - self.least[:-1]) / above - 1, -1, 1)


class Recurrent:
    """VeLO, Celo and Celo-Adam."""

    def __init__(self, rule, theta, num_steps, shapes):
        self.rule, self.num_steps, self.t = rule, num_steps, 0
        self.theta = jax.tree.map(np.float64, theta)
        self.tensors = {k: Tensor(shape, 0.999) for k, shape in shapes.items()}
        self.losses = Losses(num_steps)
        start = self.theta["lstm_init_state"]
        self.hidden, self.cell = (
            np.repeat(start[k], len(shapes), axis=0) for k in ("hidden", "cell")
        )

    def linear(self, name, x):
        return x @ self.theta["rnn_params"][name]["w"] + self.theta["rnn_params"][name]["b"]

    def control(self, params, loss):
        s = np.array([0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1])
        common = [np.tanh(10 * (self.t / self.num_steps - s)), self.losses.see(loss)]
        rows = []
        for k in sorted(params):
            own = ()
            if self.rule == "velo":
                mean_rms, rank, var_m, var_rms = self.tensors[k].see(params[k])
                own = mean_rms, rank, var_m, var_rms
            fraction, features = common
            rows.append(np.concatenate([fraction, features, *own]))
        x = np.stack(rows)
        pooled = np.max(np.maximum(self.linear("linear_1", x), 0), axis=0)
        y = self.linear("linear_2", x) + pooled
        z = self.linear("rnn/linear", np.concatenate([y, self.hidden], axis=1))
        i, g, f, o = np.split(z, 4, axis=1)
        self.cell = sigmoid(f + 1) * self.cell + sigmoid(i) * np.tanh(g)
        self.hidden = sigmoid(o) * np.tanh(self.cell)
        return self.linear("step_size", self.hidden)[:, 0]

    def step(self, params, grads, loss):
        clipped = {k: np.clip(g, -1000, 1000) for k, g in grads.items()}
        pace = self.control(params, loss)
        pace = pace if self.rule == "velo" else 0.1 * np.exp(pace)
        updates = {}
        for j, k in enumerate(sorted(params)):
            tensor, g, p = self.tensors[k], clipped[k], params[k]
            if self.rule == "celo_adam":
                updates[k] = -pace[j] * 0.001 * self.adam(tensor, g)
                continue
            tensor.update(g)
            out = network(tensor.channels(g, p, 1e-6), self.mixed(j), None, 1e-5)
            size = np.sqrt(np.mean(p**2) + 1e-9)
            updates[k] = -pace[j] * 0.001 * out[..., 0] * np.exp(0.001 * out[..., 1]) * size
        self.t += 1
        return updates

    def mixed(self, j):
        c = self.linear("rnn_to_controls", self.hidden)[j]
        if self.rule == "celo":
            c = np.exp(c) / np.exp(c).sum()
        factor = 100 if self.rule == "velo" else 1
        banks = self.theta["ff_mod_stack"]["~"]
        return {
            name: factor * np.mean([c[i] * bank[i] for i in range(len(c))], axis=0)
            for name, bank in banks.items()
        }

    def adam(self, tensor, g):
        tensor.update(g)
        mean, square = tensor.m[0], tensor.r  # decays .9 and .999
        t = self.t + 1
        return mean / (1 - 0.9**t) / (1e-8 + np.sqrt(square / (1 - 0.999**t) + 1e-10))


class Celo2:
    """Celo2 without a learning rate; `orthogonalise` as in the rule."""

    def __init__(self, theta, orthogonalise, shapes):
        self.weights = jax.tree.map(np.float64, theta)["ff_mod_stack"]["~"]
        self.orthogonalise = orthogonalise
        self.tensors = {k: Tensor(shape, 0.95) for k, shape in shapes.items()}

    def step(self, params, grads, loss):
        del loss
        updates = {}
        for k, tensor in self.tensors.items():
            g, axes = np.clip(grads[k], -1000, 1000), tuple(range(params[k].ndim))[-2:]
            tensor.update(g)
            out = network(tensor.channels(g, params[k], 1e-8), self.weights, axes, 1e-9)[..., 0]
            if self.orthogonalise and out.ndim >= 2:
                out = self.newton_schulz(out)
            updates[k] = out / np.sqrt(np.mean(out**2, axes, keepdims=True) + 1e-9)
        return updates

    def newton_schulz(self, out):
        results = []
        for x in out.reshape(-1, *out.shape[-2:]):
            x = x / (np.linalg.norm(x) + 1e-8)
            for _ in range(5):
                gram = x @ x.T
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            results.append(x)
        return np.stack(results).reshape(out.shape)


@pytest.fixture
def make_pair(random_theta, narrow):
    """Makes a rule and its oracle, with the same weights."""

    def make(rule, shapes):
        if rule.startswith("celo2"):
            theta, orthogonalise = random_theta("celo2", scale=0.4), rule.endswith("orthogonal")
            optimizer = scale_by_celo2(theta, orthogonalise=orthogonalise)
            return optimizer, Celo2(theta, orthogonalise, shapes)
        theta = random_theta(rule, scale=0.4, hidden=7, bank=5)
        if rule == "velo":  # it multiplies them by 100
            theta["ff_mod_stack"] = jax.tree.map(lambda x: x / 20, theta["ff_mod_stack"])
        return RULES[rule](theta, NUM_STEPS), Recurrent(rule, theta, NUM_STEPS, shapes)

    return make


@pytest.mark.parametrize("rule", [*RULES, "celo2", "celo2_orthogonal"])
def test_six_steps_equal_the_definition(rule, make_pair):
    """On tensors of all ranks; step 2 has a gradient of 5000, step 3 a loss that jumps."""
    rng = np.random.default_rng(7)
    shapes = {k: SHAPES[k] for k in ENOUGH.get(rule, SHAPES)}
    optimizer, oracle = make_pair(rule, shapes)
    params = {k: np.float32(rng.normal(size=shape)) for k, shape in shapes.items()}
    if "vector" in params:
        params["vector"] *= 0  # as biases begin
    state = optimizer.init(jax.tree.map(jnp.asarray, params))
    extra = (lambda loss: {}) if rule.startswith("celo2") else (lambda loss: {"value": loss})
    update = jax.jit(lambda g, s, p, loss: optimizer.update(g, s, p, **extra(loss)))
    for step in range(6):
        grads = {k: np.float32(rng.normal(size=shape)) for k, shape in shapes.items()}
        if step == 2:
            grads["same_matrix"][1, 2] = 5000.0
        loss = np.float32(100.0 if step == 3 else 3.0 - 0.3 * step + 0.1 * rng.normal())
        updates, state = update(grads, state, params, loss)
        expected = oracle.step(
            {k: np.float64(p).reshape(p.shape or (1,)) for k, p in params.items()},
            {k: np.float64(g).reshape(g.shape or (1,)) for k, g in grads.items()},
            float(loss),
        )
        for k, shape in shapes.items():
            want = expected[k].reshape(shape)
            scale = np.sqrt(np.mean(want**2))
            np.testing.assert_allclose(
                updates[k], want, rtol=0, atol=2e-4 * scale + 1e-9, err_msg=f"{k}, step {step}"
            )
        params = {k: np.float32(params[k] + 0.1 * expected[k].reshape(shapes[k])) for k in shapes}
