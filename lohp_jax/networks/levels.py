"""How a network is told of a noise level, by its log signal-to-noise ratio λ = log α²/σ²."""

import jax
import jax.numpy as jnp


def level_features(log_snr: jax.Array) -> jax.Array:
    """`[12]` Fourier features of λ."""
    angles = log_snr / 10.0 * jnp.pi * 2.0 ** jnp.arange(-1, 5)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])
